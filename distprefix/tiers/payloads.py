"""Storing and loading the KV bytes of chunks: bytes first, then the tree says that they are there."""

from __future__ import annotations

import threading
import time
from array import array
from collections import deque
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from distprefix import operations
from distprefix.budget import keep_within
from distprefix.chunking import HASH_BYTES, Prompt
from distprefix.errors import (
    DistPrefixError,
    InvalidInputError,
    NoParentError,
    NotAttachedError,
    UnavailableError,
)
from distprefix.operations import Places
from distprefix.redis.data import Buffer
from distprefix.state import State
from distprefix.tiers.cache import PayloadCache
from distprefix.tiers.store import PayloadStore, Want, check_fits, groups

__all__ = ["COLD", "TIER_EPOCH", "WARM", "Loaded", "Payloads"]

WARM, COLD = "@warm", "@cold"
TIER_EPOCH = 1
_ATTEMPTS = 3
_GONE = ("missing", "damaged")
"""Why a payload counts for nothing."""


class Loaded(NamedTuple):
    """What came of a load."""

    chunks: int
    """Leading chunks whose payloads are good."""
    payloads: tuple[memoryview, ...]
    """One for each; those given in `into`, where there were any."""


class Payloads:
    """The payloads of one cache. Thread-safe."""

    def __init__(self, state: State, warm: PayloadStore, cold: PayloadStore | None) -> None:
        self.cache = PayloadCache(state.config.l1_payload_bytes)
        self.warm = warm
        self.cold = cold
        """None when cold payloads lie on another server, and it was not said where."""
        self.to_promote: deque[bytes] = deque(maxlen=256)
        """Chains that were found cold."""
        self._state = state

    def close(self) -> None:
        """Close the connections."""
        for store in (self.warm, self.cold):
            if store is not None:
                store.close()

    def places(self, hashes: bytes, deadline: float) -> Places:
        """Where the payloads of a chain lie. One call. Raises UnavailableError."""
        link = self._state.link
        try:
            return link.publish(operations.where(hashes), deadline)
        except NotAttachedError:
            link.attach_again(link.epoch, deadline)
            return Places(array("I"), array("I"), ())

    # Store

    def store(self, prompt: Prompt, payloads: Sequence[Buffer | None]) -> int:
        """See `PrefixCacheOptimizer.store`."""
        state, deadline = self._state, self._deadline()
        if len(payloads) > prompt.chunks:
            raise InvalidInputError(f"{len(payloads)} payloads do not fit {prompt.chunks} full chunks: one for each")
        hashes, stored = state.chain(prompt)[: len(payloads) * HASH_BYTES], 0
        try:
            for _ in range(_ATTEMPTS):
                places = self.places(hashes, deadline)
                stored = places.chunks
                fresh = _leading(hashes, payloads, stored)
                if not fresh:
                    break
                self._make_warm(hashes, places, deadline)
                self.warm.write(fresh, deadline)
                begin = max((start for start in places.starts if start <= stored), default=0)
                stored = self._tell(hashes[: (stored + len(fresh)) * HASH_BYTES], begin, deadline)
                done = fresh[: max(0, stored - places.chunks)]
                self._count("payloads_stored", len(done))
                self._count("payload_bytes_stored", sum(memoryview(payload).nbytes for _, payload in done))
                if len(done) == len(fresh):
                    break
        except DistPrefixError as error:
            self._count("stores_failed", 1)
            if state.config.strict or isinstance(error, InvalidInputError):
                raise
        return stored

    def _make_warm(self, hashes: bytes, places: Places, deadline: float) -> None:
        """What is warm has only warm ones above it: bring back what lies cold there."""
        if any(places.cold):
            self.promote(hashes[: places.chunks * HASH_BYTES], deadline)

    def _tell(self, hashes: bytes, begin: int, deadline: float) -> int:
        """Tell the tree. Returns how many leading chunks are warm now."""
        state = self._state
        while True:
            chain, now_ms = hashes[begin * HASH_BYTES :], int(time.time() * 1000)
            operation = operations.store(chain, begin, now_ms=now_ms, max_run=state.config.max_run)
            try:
                stored, usage = state.link.publish(operation, deadline)
            except NoParentError:
                if not begin:
                    raise
                begin = 0
                continue
            state.usage = usage
            keep_within(state, usage)
            return begin + stored

    # Load

    def load(self, prompt: Prompt, into: Sequence[memoryview] | None, most: int) -> Loaded:
        """See `PrefixCacheOptimizer.load`."""
        deadline = self._deadline()
        hashes = self._state.chain(prompt)[: most * HASH_BYTES]
        try:
            places = self.places(hashes, deadline)
        except DistPrefixError:
            self._count("loads_failed", 1)
            if self._state.config.strict:
                raise
            return Loaded(0, ())
        good, ended = self._load(hashes, places, into, deadline)
        for _ in range(_ATTEMPTS):
            before, places = places, self._places_now(hashes, places, deadline) if ended in _GONE else places
            if _place(before, len(good)) == _place(places, len(good)):
                break
            good, ended = self._load(hashes, places, into, deadline)  # it was moved, or evicted, meanwhile
        if ended:
            self._give_up(hashes[: (len(good) + 1) * HASH_BYTES], ended)
        if any(places.cold[: len(good)]):
            self.to_promote.append(hashes[: len(good) * HASH_BYTES])
            self._state.wake()
        self._count("payloads_loaded", len(good))
        self._count("payload_bytes_loaded", sum(map(len, good)))
        return Loaded(len(good), tuple(good))

    def _places_now(self, hashes: bytes, before: Places, deadline: float) -> Places:
        """Where the payloads lie now; as before when nobody can tell."""
        try:
            return self.places(hashes, deadline)
        except DistPrefixError:
            return before

    def _load(
        self, hashes: bytes, places: Places, into: Sequence[memoryview] | None, deadline: float
    ) -> tuple[list[memoryview], str]:
        """The good payloads, and what ended them; empty when nothing did."""
        good: list[memoryview] = []
        wants = [
            Want(
                hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES],
                places.warm[at] or places.cold[at],
                into[at] if into is not None else None,
            )
            for at in range(places.chunks)
        ]
        try:
            for is_cold, run in groupby(range(len(wants)), lambda at: not places.warm[at]):
                store = self.cold if is_cold else self.warm
                if store is None:
                    return good, "unavailable"
                for group in groups([wants[at] for at in run]):
                    for read in self._read(store, group, deadline):
                        if isinstance(read, str):
                            return good, read
                        good.append(read)
        except UnavailableError:
            if self._state.config.strict:
                raise
            return good, "unavailable"
        return good, ""

    def _read(self, store: PayloadStore, wants: Sequence[Want], deadline: float) -> list[memoryview | str]:
        """As `PayloadStore.read`, from L1 where it has it.

        What another thread is reading is waited for, after what this one reads.
        """
        if not self.cache.is_on:
            return store.read(wants, deadline)
        found: dict[bytes, memoryview | str] = {}
        mine: list[Want] = []
        others: list[tuple[Want, threading.Event]] = []
        try:
            for want in wants:
                kept = self.cache.get(want.chunk)
                if kept is not None:
                    found[want.chunk] = _copy(kept, want.target)
                    continue
                reading = self.cache.begin(want.chunk)
                if reading is None:
                    mine.append(want)
                else:
                    others.append((want, reading))
            found.update(zip((want.chunk for want in mine), store.read(mine, deadline), strict=True))
        finally:
            for want in mine:
                read = found.get(want.chunk)
                self.cache.end(want.chunk, read if isinstance(read, memoryview) else None)
        for want, reading in others:
            reading.wait(max(0.0, deadline - time.monotonic()))
            kept = self.cache.get(want.chunk)
            found[want.chunk] = store.read([want], deadline)[0] if kept is None else _copy(kept, want.target)
        return [found[want.chunk] for want in wants]

    def _give_up(self, chain: bytes, reason: str) -> None:
        """Count what ended a load. What is not there, or is damaged, goes from the tree with all behind it."""
        self._count(f"payloads_{reason}", 1)
        if reason not in _GONE:
            return
        try:
            for tier in (COLD, WARM):
                self._state.link.publish(operations.trim(chain, tier, TIER_EPOCH))
        except DistPrefixError:
            self._count("loads_failed", 1)

    # Between the tiers

    def promote(self, hashes: bytes, deadline: float) -> int:
        """Make warm what of a chain is cold, from the top down. Returns the chunks moved. Raises UnavailableError."""
        places, moved = self.places(hashes, deadline), 0
        for start, stop in zip(places.starts, (*places.starts[1:], places.chunks), strict=True):
            sizes = places.cold[start:stop]
            if any(sizes) and self.cold is not None:
                run = hashes[start * HASH_BYTES : stop * HASH_BYTES]
                done = self._move(run, sizes.tobytes(), self.cold, self.warm, deadline)
                moved += done
                if not done:
                    break
        self._count("promoted_chunks", moved)
        return moved

    def demote(self, deadline: float, idle_s: float | None = None) -> int:
        """Make cold what nobody used for `cold_timeout_s`. Returns the chunks moved. Raises UnavailableError."""
        state, moved, rank = self._state, 0, 0
        if self.cold is None:
            return 0
        before = int(1000 * (time.time() - (state.config.cold_timeout_s if idle_s is None else idle_s)))
        while rank >= 0 and time.monotonic() < deadline:
            rank, found = state.link.publish(operations.idle(before, rank, 50), deadline)
            for each in found:
                key = state.link.keys.moving(each.head)
                if self._is_mine(key, deadline):
                    moved += self._move(each.run, each.sizes, self.warm, self.cold, deadline)
                    state.link.publishes.command("DEL", key, deadline=deadline)
        self._count("demoted_chunks", moved)
        return moved

    def _is_mine(self, key: str, deadline: float) -> bool:
        """Whether this process moves a node: nobody else does at the same time, which would be in vain."""
        link, ttl_ms = self._state.link, int(1000 * self._state.config.payload_timeout_s)
        return link.publishes.command("SET", key, "1", "NX", "PX", ttl_ms, deadline=deadline) is not None

    def _move(self, run: bytes, sizes: bytes, source: PayloadStore, target: PayloadStore, deadline: float) -> int:
        """Copy the payloads of a node's chunks, and tell the tree. Returns the chunks moved, 0 if it changed."""
        from_tier = COLD if source.cold else WARM
        count = len(sizes) // 4
        copies = bytearray(4 * count)
        view = memoryview(sizes).cast("I")
        wants = [(at, Want(run[at * HASH_BYTES : (at + 1) * HASH_BYTES], view[at])) for at in range(count) if view[at]]
        for at, want in wants:
            (read,) = source.read([want], deadline)
            if isinstance(read, str):
                self._count(f"payloads_{read}", 1)
                return 0
            size = target.copy(want.chunk, read, deadline)
            if not size:
                return 0
            copies[4 * at : 4 * at + 4] = size.to_bytes(4, "little")
        moved = self._state.link.publish(
            operations.move(run[:HASH_BYTES].hex(), from_tier, sizes, bytes(copies)), deadline
        )
        return len(wants) if moved else 0

    def _count(self, name: str, count: int) -> None:
        with self._state.lock:
            self._state.counts[name] += count

    def _deadline(self) -> float:
        return time.monotonic() + self._state.config.payload_timeout_s


def _leading(hashes: bytes, payloads: Sequence[Buffer | None], first: int) -> list[tuple[bytes, Any]]:
    """Payloads by chunk from `first` on, up to the first that is not given."""
    found: list[tuple[bytes, Any]] = []
    for at in range(first, len(payloads)):
        payload = payloads[at]
        if payload is None:
            break
        found.append((hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES], payload))
    return found


def _place(places: Places, at: int) -> tuple[int, int] | None:
    """Where the payload of a chunk lies: its size in each tier."""
    return (places.warm[at], places.cold[at]) if at < places.chunks else None


def _copy(payload: bytes, target: memoryview | None) -> memoryview:
    if target is None:
        return memoryview(payload)
    check_fits(len(payload), target)
    target[:] = payload
    return target
