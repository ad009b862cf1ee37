"""One engine's stream in Redis: who writes it, how far it is written, and what it holds."""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple

from distprefix.chunking import HASH_BYTES
from distprefix.errors import FencedError
from distprefix.events.changes import Change, Covered
from distprefix.events.journal import Fate, Lead, Outcome, Position
from distprefix.operations import SCHEMA, Call
from distprefix.redis.client import Client, run
from distprefix.redis.keys import Keys
from distprefix.redis.roster import WorkerInfo, heartbeat, register

__all__ = ["RedisJournal", "census"]

_NODES_A_CALL = 100
_READ_TIMEOUT_S = 60.0
_AT_ONCE_S = 0.001
_RIGHT_S = 10.0
"""How long the right to write lasts for a worker that holds no lease."""
_FATES = {"done": Fate.DONE, "again": Fate.AGAIN, "absent": Fate.MOVED, "noparent": Fate.MOVED, "refused": Fate.REFUSED}


class RedisJournal:
    """A `Journal` in a namespace. Every method is one script call unless it says more."""

    def __init__(
        self, client: Client, keys: Keys, member: str, source: str, info: WorkerInfo, *, lease_s: float, max_run: int
    ) -> None:
        self.lease_s = lease_s
        self._client = client
        self._keys = keys
        self._member = member
        self._source = source
        self._info = info
        self._max_run = max_run
        self._ttl_ms = int(1000 * (lease_s or _RIGHT_S))
        self._timeout_s = max(1.0, lease_s / 3)
        self._owner = uuid.uuid4().hex
        self._number = 0
        """Of the right to write: whoever takes it over gets a higher one."""
        self._epoch = 0

    def lead(self) -> Lead | None:
        """Take the right to write, or keep it; None while another ingester has it. Two calls.

        Raises FencedError, once, when another one had it since it was asked for last.
        """
        reply = self._stream(self._ttl_ms)
        held, _, number, _, seq, digest, at, epoch, state = reply
        before, self._number = self._number, 0
        if held.decode() != self._owner:
            return None
        if before and int(number) > before:  # a lower one: everything was flushed
            raise FencedError("another ingester wrote this stream meanwhile: begin again")
        self._number = int(number)
        position = Position(int(seq), digest.decode(), float(at)) if seq else None
        found = self._client.command("HGET", self._keys.epochs, self._member, deadline=self._deadline())
        current = int(found) if found and found.isdigit() else 0
        self._epoch = max(self._epoch, current, int(epoch))  # a new one must be above, whatever was lost
        return Lead(position, int(epoch), current, state)

    def resign(self) -> None:
        """Let another ingester go on at once."""
        self._stream(0)

    def renew(self) -> int:
        """A new epoch, with a lease: all that was published so far counts no more."""
        deadline = self._deadline()
        self._epoch = register(self._client, self._keys, self._member, self._epoch, self.lease_s, self._info, deadline)
        return self._epoch

    def heartbeat(self, epoch: int, load: Mapping[str, float]) -> None:
        """The engine lives. Raises StaleEpochError when the epoch counts no more."""
        info = WorkerInfo(self._info.address, self._info.model, self._info.media, load)
        heartbeat(self._client, self._keys, self._member, epoch, self.lease_s, info, self._deadline())

    def suspend(self, epoch: int) -> None:
        """The engine does not answer: nothing of it counts until the next heartbeat."""
        heartbeat(self._client, self._keys, self._member, epoch, _AT_ONCE_S, self._info, self._deadline())

    def covered(self, epoch: int) -> list[Covered]:
        """What the tree says that the engine holds under this epoch. One call for 100 nodes."""
        operation = census(self._member)
        found: list[Covered] = []
        for parent, depth, holders in run(operation, self._client, self._keys.meta, time.monotonic() + _READ_TIMEOUT_S):
            for holder, (held_epoch, chunks, keys) in holders.items():
                if held_epoch == epoch:
                    found.append(Covered(holder.rpartition("@")[2], parent, depth, chunks, keys))
        return found

    def commit(self, epoch: int, changes: Sequence[Change], position: Position | None, state: bytes) -> list[Outcome]:
        """Write changes, and the position with them once all of them are written."""
        args: list[Any] = [SCHEMA, self._max_run, self._member, self._number, epoch]
        args += (position.seq, position.digest, repr(position.at)) if position else ("", "", "")
        args.append(state)
        for change in changes:
            args += (change.medium, change.depth if change.publish else "", change.chain, change.labels)
        reply = self._client.call("ingest", self._keys.meta, tuple(args), self._deadline())
        return [_outcome(word.decode()) for word in reply]

    def _stream(self, ttl_ms: int) -> list[Any]:
        args = (SCHEMA, self._member, self._owner, ttl_ms, self._source)
        return self._client.call("stream", self._keys.meta, args, self._deadline())

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s


def _outcome(word: str) -> Outcome:
    first, *rest = word.split()
    if first == "part":
        chunks, *heads = map(int, rest)
        return Outcome(Fate.PART, tuple(heads), chunks)
    return Outcome(Fate.DONE, tuple(map(int, rest))) if first == "heads" else Outcome(_FATES[first])


class Node(NamedTuple):
    """A radix node, by who covers it."""

    parent: bytes
    """Hash of the chunk before it; empty for a root."""
    depth: int
    holders: dict[str, tuple[int, bytes, bytes]]
    """Holder to epoch, chunks and an engine's keys."""


def census(member: str = "") -> Generator[Call, Any, list[Node]]:
    """Every node, or every one that a member covers: who covers a node covers all above it. 1 call for 100 nodes.

    Without a member, chunks and keys are not read; then there are as many zero bytes as chunks covered would take.
    Goes from the top down: what is split meanwhile is not missed.
    """
    found: list[Node] = []
    waiting: list[Any] = ["root"]
    while waiting:
        batch, waiting = waiting[:_NODES_A_CALL], waiting[_NODES_A_CALL:]
        for parent, depth, children, *rest in (yield Call("census", (SCHEMA, member, *batch))):
            node = _node_of(parent, depth, rest, with_chunks=bool(member))
            if node.holders or not member or batch[0] == "root":
                waiting += children
            found.append(node)
    return found


def _node_of(parent: bytes, depth: bytes, rest: list[Any], *, with_chunks: bool) -> Node:
    holders: dict[str, tuple[int, bytes, bytes]] = {}
    for holder, held, chunks, keys in zip(*(rest[i::4] for i in range(4)), strict=True):
        epoch, _, covered = held.partition(b":")
        if epoch.isdigit() and covered.isdigit():
            told = chunks if with_chunks else bytes(int(covered) * HASH_BYTES)
            holders[holder.decode(errors="replace")] = (int(epoch), told, keys)
    return Node(bytes.fromhex(parent.decode()), int(depth), holders)
