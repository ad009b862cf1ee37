"""The protocol without I/O: an operation is a generator that yields calls and is sent their replies.

A driver runs it over a client (`redis.client.run` does over a blocking one), so that other drivers share every line.
"""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from distprefix.chunking import HASH_BYTES
from distprefix.errors import DamagedNodeError
from distprefix.nodes import NodeView

__all__ = ["SCHEMA", "WINDOW", "Call", "Published", "drop", "parse_nodes", "publish", "touch", "trim", "walk"]

SCHEMA = b"1"
"""Version of the data model. Another one is refused at attach and by every script."""
WINDOW = 4096
"""Chunks a call goes further by. A call carries up to one run more, to begin at a node's head."""
TOUCHES_A_CALL = 300
TRIMS_A_CALL = 500
DROPS_A_CALL = 500


class Call(NamedTuple):
    """One script call on one shard."""

    script: str
    args: tuple[Any, ...]


Operation = Generator[Call, Any, Any]


class Published(NamedTuple):
    """What a publish did."""

    views: list[NodeView]
    nodes_made: int
    chunks_made: int
    shard_nodes: int
    shard_chunks: int


def parse_nodes(reply: Sequence[Any], start: int, at: int = 0) -> list[NodeView]:
    """Read what `walk` tells, from element `at` on; `start` is the depth of the first node.

    Raises DamagedNodeError for what another hand wrote.
    """
    try:
        return _parse_nodes(reply, start, at)
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        raise DamagedNodeError(f"a node's fields make no sense: {error}") from error


@lru_cache(4096)
def _name(holder: bytes) -> str:
    return sys.intern(holder.decode())


def _parse_nodes(reply: Sequence[Any], start: int, at: int) -> list[NodeView]:
    views: list[NodeView] = []
    while at < len(reply):
        size, matched, accessed, hits, created, metadata, blocks, count = reply[at : at + 8]
        at += 8
        holders: dict[str, tuple[int, int]] = {}
        for i in range(at, at + 2 * count, 2):
            epoch, _, covered = reply[i + 1].partition(b":")
            holders[_name(reply[i])] = (int(epoch), start + int(covered))
        at += 2 * count
        views.append(NodeView(start, size, matched, int(accessed), int(hits), int(created), metadata, blocks, holders))
        start += matched
    return views


def walk(chain: bytes, start: int, blocks_of: str = "") -> Generator[Call, Any, list[NodeView]]:
    """The nodes that a chain passes; its first chunk lies at depth `start` and is a node's head (or in no tree).

    One call for every 4,096 chunks that are there.
    """
    views: list[NodeView] = []
    total, pos, limit = len(chain) // HASH_BYTES, 0, WINDOW
    while True:
        window = chain[pos * HASH_BYTES : limit * HASH_BYTES]
        reply = yield Call("walk", (SCHEMA, blocks_of, window))
        views += parse_nodes(reply, start + pos)
        reached = views[-1].start + views[-1].matched - start if views else 0
        if reached < min(limit, total) or reached >= total:
            return views
        pos, limit = reached, limit + WINDOW
        if views[-1].matched < views[-1].size:  # the window ended inside this node: ask again from its head
            pos = views.pop().start - start


def publish(
    chain: bytes,
    start: int,
    holder: str,
    epoch: int,
    *,
    now_ms: int,
    max_run: int,
    blocks: bytes = b"",
    metadata: bytes = b"",
) -> Generator[Call, Any, Published]:
    """Put a chain into the tree and say that `holder` has it. `start` as in `walk`; blocks begin there as well.

    One call for every 4,096 chunks. Running it twice does the same as once.
    """
    views: list[NodeView] = []
    total, pos, limit = len(chain) // HASH_BYTES, 0, WINDOW
    nodes = chunks = shard_nodes = shard_chunks = 0
    while True:
        stop = min(limit, total)
        reply = yield Call(
            "insert",
            (
                SCHEMA,
                now_ms,
                max_run,
                holder,
                epoch,
                start + pos,
                chain[pos * HASH_BYTES : stop * HASH_BYTES],
                blocks[pos * 4 : stop * 4],
                metadata if stop == total else b"",
            ),
        )
        nodes, chunks = nodes + reply[0], chunks + reply[1]
        shard_nodes, shard_chunks = reply[2], reply[3]
        views += parse_nodes(reply, start + pos, 4)
        if stop == total:
            return Published(views, nodes, chunks, shard_nodes, shard_chunks)
        pos, limit = views.pop().start - start, limit + WINDOW


def trim(chain: bytes, holder: str, epoch: int) -> Generator[Call, Any, int]:
    """`holder` no longer has the last chunk of a chain, given from the root. Returns the coverage taken away.

    One call while few branches lie behind it; chains over 4,096 chunks are walked first, to find the node to begin at.
    """
    begin = 0
    if len(chain) > WINDOW * HASH_BYTES:
        views = yield from walk(chain, 0)
        begin = views[-1].start if views else 0
    taken, done = 0, False
    while not done:
        reply = yield Call("trim", (SCHEMA, holder, epoch, chain[begin * HASH_BYTES :], TRIMS_A_CALL))
        taken, done = taken + reply[0], bool(reply[3])
    return taken


def touch(touches: Sequence[tuple[bytes, int, int]]) -> Generator[Call, Any, int]:
    """Nodes (head, hits, last access in ms) were used. One call for every 300 of them. Returns how many were there."""
    touched = 0
    for i in range(0, len(touches), TOUCHES_A_CALL):
        args: list[Any] = [SCHEMA]
        for head, hits, accessed in touches[i : i + TOUCHES_A_CALL]:
            args += (head.hex(), hits, accessed)
        touched += yield Call("touch", tuple(args))
    return touched


def drop(head: str = "root") -> Generator[Call, Any, tuple[int, int]]:
    """Take out a subtree, or everything. One call for every 500 nodes. Returns nodes and chunks removed."""
    nodes = chunks = 0
    while True:
        reply = yield Call("drop", (SCHEMA, head, DROPS_A_CALL))
        nodes, chunks = nodes + reply[0], chunks + reply[1]
        if reply[2]:
            return nodes, chunks
