"""What scripts say of nodes, read without trust: a value that makes no sense is left out and counted. Pure."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from distprefix.hashing import HASH_BYTES
from distprefix.nodes import NodeView

__all__ = ["HotNode", "parse_hot", "parse_nodes", "read_count"]

_MAX_DIGITS = 15


class HotNode(NamedTuple):
    """A node that came for pre-warming."""

    parent: bytes
    """Hash of the chunk before its head; empty above a root."""
    run: bytes
    view: NodeView


def parse_nodes(reply: Sequence[Any], start: int, at: int = 0) -> tuple[list[NodeView], int]:
    """Read what `walk` tells, from element `at` on; `start` is the depth of the first node.

    Returns the nodes, and how many fields make no sense: a holder that has one is left out, a number counts as 0.
    """
    views: list[NodeView] = []
    damaged = 0
    while at < len(reply):
        size, matched, accessed, hits, created, metadata, blocks, count = reply[at : at + 8]
        at += 8
        stop = start + size
        holders: dict[str, tuple[int, int]] = {}
        try:
            for i in range(at, at + 2 * count, 2):
                epoch, _, covered = reply[i + 1].partition(b":")
                end = start + int(covered)
                if not start <= end <= stop:
                    raise ValueError
                holders[_name(reply[i])] = (int(epoch), end)
            times = (read_count(accessed), read_count(hits), read_count(created))
        except ValueError:
            holders, wrong = _sound_holders(reply[at : at + 2 * count], start, stop)
            numbers = [_count_or_none(value) for value in (accessed, hits, created)]
            times = (numbers[0] or 0, numbers[1] or 0, numbers[2] or 0)
            damaged += wrong + numbers.count(None)
        at += 2 * count
        views.append(NodeView(start, size, matched, *times, metadata, blocks, holders))
        start += matched
    return views, damaged


@lru_cache(4096)
def _name(holder: bytes) -> str:
    return sys.intern(holder.decode())


def read_count(value: bytes) -> int:
    """A stored whole number. Raises ValueError for what is none, or more than a server counts up to."""
    if len(value) > _MAX_DIGITS:
        raise ValueError
    return int(value)


def _count_or_none(value: bytes) -> int | None:
    try:
        return read_count(value)
    except ValueError:
        return None


def _sound_holders(told: Sequence[bytes], start: int, stop: int) -> tuple[dict[str, tuple[int, int]], int]:
    """The holders of a node whose coverage can be, and how many there are whose cannot."""
    holders: dict[str, tuple[int, int]] = {}
    for name, value in zip(told[::2], told[1::2], strict=True):
        epoch, _, covered = value.partition(b":")
        try:
            end = start + read_count(covered)
            if start <= end <= stop:
                holders[_name(name)] = (read_count(epoch), end)
        except ValueError:
            continue
    return holders, len(told) // 2 - len(holders)


def parse_hot(reply: Sequence[Any], at: int) -> tuple[list[HotNode], int]:
    """Read what `prewarm` and `guess` tell, from element `at` on. Returns the nodes, and how much makes no sense."""
    nodes: list[HotNode] = []
    damaged = 0
    while at < len(reply):
        if len(reply) < at + 11:  # what the script could not read it did not tell
            damaged += 1
            break
        parent, depth, run = reply[at : at + 3]
        count = 8 + 2 * int(reply[at + 10])
        views, wrong = parse_nodes(reply[at + 3 : at + 3 + count], _count_or_none(depth) or 0)
        damaged += wrong
        at += 3 + count
        above = _hash(parent)
        if above is None:
            damaged += 1
        else:
            nodes += [HotNode(above, run, view) for view in views]
    return nodes, damaged


def _hash(name: bytes) -> bytes | None:
    """A chunk hash by its name in Redis, empty for that above the roots; None for what is neither."""
    try:
        packed = bytes.fromhex(name.decode())
    except ValueError:
        return None
    return packed if len(packed) in (0, HASH_BYTES) else None
