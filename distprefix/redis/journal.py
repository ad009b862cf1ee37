"""One engine's stream in Redis: who writes it, how far it is written, and what it holds."""

from __future__ import annotations

import time
import uuid
from collections.abc import Generator, Mapping, Sequence
from math import isfinite
from typing import Any, NamedTuple

from distprefix.chunking import HASH_BYTES
from distprefix.errors import DamagedNodeError, FencedError, LostHistoryError
from distprefix.events.changes import Change, Covered
from distprefix.events.journal import Fate, Lead, Outcome, Position
from distprefix.operations import ITEMS_A_CALL, MAX_CALLS, SCHEMA, WORK_A_CALL, Call, report_damage
from distprefix.redis.client import Client, run
from distprefix.redis.holders import read_holders
from distprefix.redis.keys import Keys
from distprefix.redis.replies import count_of, is_chunk_name
from distprefix.redis.roster import WorkerInfo, heartbeat, register

__all__ = ["RedisJournal", "census"]

_READ_TIMEOUT_S = 60.0
_AT_ONCE_S = 0.001
_MAX_RUN = 256
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
        self._written = 0
        """How often the stream was written, as the server acknowledged."""
        self._generation = b""
        self._epoch = 0
        self._keep_at = 0.0
        """When the right to write is asked for again."""
        self._resume: dict[tuple[str, bytes], bytes] = {}
        """Of withdrawals that were done in part, by medium and chain: where the script resumes."""

    def lead(self) -> Lead | None:
        """Take the right to write, or keep it; None while another ingester has it. Two calls.

        Raises FencedError, once, when another one had it since it was asked for last, and LostHistoryError, once, when
        the server no longer has all that it acknowledged since then.
        """
        self._keep_at = time.monotonic() + self._ttl_ms / 3000
        reply, generation = self._stream(self._ttl_ms)
        held, _, number, _, seq, digest, at, epoch, state, written = reply
        # What fails so far leaves all as it was.
        found = self._client.command("HGET", self._keys.epochs, self._member, deadline=self._deadline())
        before, self._number = self._number, 0
        if held.decode() != self._owner:
            return None
        if before and int(number) > before:  # a lower one: everything was flushed
            raise FencedError("another ingester wrote this stream meanwhile: begin again")
        lost = before and (int(number) < before or written < self._written or generation != self._generation)
        self._written = written
        self._generation = generation
        if lost:  # once: what is asked for next begins with what the server has
            raise LostHistoryError("the server has lost what was written of this stream: begin again")
        self._number = int(number)
        position = _position(seq, digest, at)
        current = count_of(found)
        self._epoch = max(self._epoch, current, count_of(epoch))  # a new one must be above, whatever was lost
        return Lead(position, count_of(epoch), current, state)

    def keep(self) -> None:
        """Keep the right to write, when a third of its time has passed. No call before that.

        Raises FencedError when another ingester has it, and as `lead` does.
        """
        if time.monotonic() >= self._keep_at and self.lead() is None:
            raise FencedError("another ingester took the stream over: begin again")

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
        """What the tree says that the engine holds under this epoch.

        One call for 1,000 holders that there are, and one for about 100 of the engine's nodes.
        """
        deadline = time.monotonic() + _READ_TIMEOUT_S
        named = read_holders(self._client, self._keys, deadline, self._member)
        found: list[Covered] = []
        nodes = run(census(named), self._client, self._keys.meta, deadline, between=self.keep) if named else []
        for parent, depth, holders in nodes:
            for holder, (held_epoch, chunks, keys) in holders.items():
                if held_epoch == epoch:
                    found.append(Covered(holder.rpartition("@")[2], parent, depth, chunks, keys))
        return found

    def commit(self, epoch: int, changes: Sequence[Change], position: Position | None, state: bytes) -> list[Outcome]:
        """Write changes, and the position with them once all of them are written."""
        args: list[Any] = [SCHEMA, self._max_run, self._member, f"{self._number} {self._written}", epoch]
        args += (position.seq, position.digest, repr(position.at)) if position else ("", "", "")
        args.append(state)
        for change in changes:
            labels = change.labels if change.publish else self._resume.get((change.medium, change.chain), b"")
            args += (change.medium, change.depth if change.publish else "", change.chain, labels)
        try:
            reply, generation, _, _ = self._client.call("ingest", self._keys.meta, tuple(args), self._deadline())
            if generation != self._generation:
                raise LostHistoryError("the server was restored: what was written of this stream may be lost")
        except LostHistoryError:
            self._number = 0  # the right to write is asked for anew, and with it what is there
            raise
        self._written += 1
        words: list[bytes] = list(reply)
        told = zip(changes, words, strict=False)
        again = [(change, word) for change, word in told if word.startswith(b"again ")]
        self._resume = {(change.medium, change.chain): word.removeprefix(b"again ") for change, word in again}
        return [_outcome(word.decode()) for word in words]

    def _stream(self, ttl_ms: int) -> tuple[list[Any], bytes]:
        """What `stream` says, and the generation of the shard."""
        args = (SCHEMA, self._member, self._owner, ttl_ms, self._source)
        reply, generation, _, _ = self._client.call("stream", self._keys.meta, args, self._deadline())
        return reply, generation

    def _deadline(self) -> float:
        return time.monotonic() + self._timeout_s


def _position(seq: bytes, digest: bytes, at: bytes) -> Position | None:
    """How far a stream is written; None where nothing is, or what is stored cannot be a place."""
    number = count_of(seq, -1)
    try:
        made = float(at)
        return Position(number, digest.decode(), made) if number >= 0 and isfinite(made) else None
    except ValueError:
        return None


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


def census(holders: Sequence[str] = ()) -> Generator[Call, Any, list[Node]]:
    """Every node, or those that any of some holders covers. One call for some 100 nodes.

    Without holders, chunks and keys are not read; then there are as many zero bytes as chunks covered would take.
    Parents come before their children: what is split meanwhile is not missed.
    """
    found: dict[bytes, Node] = {}
    stack: list[bytes] = [b"root"]
    for _ in range(MAX_CALLS):
        if not stack:
            return list(found.values())
        items = b" ".join(stack[-ITEMS_A_CALL:])
        left, *nodes = yield Call("census", (SCHEMA, WORK_A_CALL, items, *holders))
        stack[-ITEMS_A_CALL:] = left
        damaged = 0
        for head, parent, depth, *rest in nodes:
            node, wrong = _node_of(parent, depth, rest, with_chunks=bool(holders))
            damaged += wrong
            if node is not None:
                found.setdefault(head, node)
        yield from report_damage(damaged)
    raise DamagedNodeError("a census of the tree does not end: run `distprefix maintain --repair`")


def _node_of(parent: bytes, depth: bytes, rest: list[Any], *, with_chunks: bool) -> tuple[Node | None, int]:
    """A node as the script tells it, None for one that cannot be; and how much of it cannot be."""
    holders: dict[str, tuple[int, bytes, bytes]] = {}
    if count_of(depth, -1) < 0 or (parent and not is_chunk_name(parent)):
        return None, 1
    damaged = 0
    for holder, held, chunks, keys in zip(*(rest[i::4] for i in range(4)), strict=True):
        epoch, _, covered = held.partition(b":")
        count = count_of(covered)
        if 0 < count <= _MAX_RUN and count_of(epoch, -1) >= 0:
            told = chunks if with_chunks else bytes(count * HASH_BYTES)
            holders[holder.decode(errors="replace")] = (count_of(epoch), told, keys)
        else:
            damaged += 1
    return Node(bytes.fromhex(parent.decode()), count_of(depth), holders), damaged
