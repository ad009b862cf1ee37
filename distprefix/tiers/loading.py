"""Loading the KV bytes of chunks: into the caller's buffers, verified, up to the first that is not good."""

from __future__ import annotations

import time
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import index
from pickle import PickleBuffer
from typing import Any, NamedTuple, SupportsIndex

from distprefix.chunking import HASH_BYTES, Prompt, read_items
from distprefix.errors import DistPrefixError, InvalidInputError, UnavailableError
from distprefix.model import CacheHitResult
from distprefix.redis.transfers import Buffer
from distprefix.state import State
from distprefix.tiers import operations
from distprefix.tiers.cache import Reading
from distprefix.tiers.operations import Evidence, Places
from distprefix.tiers.payloads import ATTEMPTS, COLD, WARM, Payloads
from distprefix.tiers.store import UNFIT, Flaw, PayloadStore, Want, groups

__all__ = ["Asked", "Loaded", "asked_of", "load"]

_GROUP_BYTES = 64 * 1024 * 1024
"""As many are read at once: what is not received where it is wanted lies in memory meanwhile."""
_PROTOCOL_WITH_BUFFERS = 5
_NOWHERE = Places(array("I"), array("I"), ())
_SUSPECT = ("missing", "damaged")
"""Flaws that may mean that the tree is wrong, once they were seen twice."""
_UNAVAILABLE = Flaw("unavailable")


class Asked(NamedTuple):
    """A prompt whose payloads are wanted."""

    prompt: Prompt
    into: Sequence[memoryview] | None
    """Where they are wanted, one a chunk; None for memory of their own."""
    most: int
    """Chunks."""
    first: int = 0
    """Leading chunks that are not wanted."""
    hits: int = 1
    """Of the nodes passed; 0 for a prompt whose look-up counted already: the load moves the last use alone."""


def asked_of(
    state: State,
    token_ids: Any,
    into: Sequence[Buffer] | None,
    first: int,
    most: int | None,
    *,
    was_looked_up: bool,
) -> Asked:
    """What a caller of `PrefixCacheOptimizer.load` asks for. Raises InvalidInputError."""
    is_result = isinstance(token_ids, CacheHitResult)
    prompt = state.read(token_ids.prompt if is_result else token_ids)
    hits = 0 if is_result or was_looked_up else 1
    targets = None if into is None else writable(into)
    most = prompt.chunks if most is None else min(most, prompt.chunks)
    if not isinstance(first, int) or first < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidInputError(f"first is {first!r}: it must be 0 or more")
    return Asked(prompt, targets, most if targets is None else min(most, first + len(targets)), first, hits)


class Loaded(NamedTuple):
    """What came of a load."""

    chunks: int
    """Chunks whose payloads are good, from the first that was wanted on."""
    payloads: tuple[memoryview, ...]
    """One for each; those given in `into`, where there were any."""

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        """Pickled, it has the bytes; out of band where the pickler takes buffers."""
        pack = PickleBuffer if index(protocol) >= _PROTOCOL_WITH_BUFFERS else bytes
        return _restored, (self.chunks, tuple(map(pack, self.payloads)))

    def __copy__(self) -> Loaded:
        return self


def _restored(chunks: int, payloads: tuple[bytes | bytearray, ...]) -> Loaded:
    """What was pickled."""
    return Loaded(chunks, tuple(map(memoryview, payloads)))


@dataclass(slots=True)
class _Load:
    """A prompt whose payloads are being loaded."""

    hashes: bytes
    into: Sequence[memoryview] | None
    first: int
    places: Places = _NOWHERE
    good: list[memoryview] = field(default_factory=list[memoryview])
    ended: Flaw | None = None
    """What ended it; None when nothing did."""

    @property
    def stop(self) -> int:
        """The first chunk of the prompt that is not good, or not wanted."""
        return self.first + len(self.good)

    @property
    def place(self) -> tuple[int, int] | None:
        """Where the first payload that is not good lies: its size in each tier."""
        at, places = self.stop, self.places
        return (places.warm[at], places.cold[at]) if at < places.chunks else None

    def wants(self) -> Iterator[_Wanted]:
        """All its payloads, from the first on, as nothing had been read yet."""
        self.good = []
        self.ended = None
        for at in range(self.first, self.places.chunks):
            chunk = self.hashes[at * HASH_BYTES : (at + 1) * HASH_BYTES]
            warm, cold = self.places.warm[at], self.places.cold[at]
            yield _Wanted(
                self, not warm, Want(chunk, warm or cold, self.into[at - self.first] if self.into is not None else None)
            )


class _Wanted(NamedTuple):
    """A payload to be read, for a load."""

    load: _Load
    is_cold: bool
    want: Want


def load(payloads: Payloads, asked: Sequence[Asked], *, requests: int) -> list[Loaded]:
    """See `PrefixCacheOptimizer.load_batch`. `requests`: as how many loads they count."""
    state = payloads.state
    deadline = payloads.deadline()
    payloads.count("loads", requests)
    loads = [_Load(state.chain(each.prompt)[: each.most * HASH_BYTES], each.into, each.first) for each in asked]
    try:
        places = payloads.places([each.hashes for each in loads], deadline)
        for each, load, found in zip(asked, loads, places, strict=True):
            load.places = found
            payloads.touch(each.prompt, load.hashes, found, each.hits)
    except DistPrefixError:
        payloads.count("loads_failed", len(loads))
        if state.config.strict:
            raise
    _read_all(payloads, loads, deadline)
    again = loads
    for attempt in range(ATTEMPTS + 1):
        suspect = [each for each in again if each.ended is not None and each.ended.reason in _SUSPECT]
        # In the first round also what has not moved: it may have left and returned.
        again = [each for each in suspect if _has_moved(payloads, each, deadline) or not attempt]
        if not again:
            break
        if attempt < ATTEMPTS:
            _read_all(payloads, again, deadline)
    for each in again:
        each.ended = _UNAVAILABLE  # wherever it was looked for it had just left
    return [_finish(payloads, each, deadline) for each in loads]


def writable(buffers: Sequence[Buffer]) -> list[memoryview]:
    """The bytes of buffers to load into. Raises InvalidInputError for what is none."""
    return [_writable(each) for each in read_items(buffers, "buffers to load into", "a list with one for each chunk")]


def _writable(buffer: Buffer) -> memoryview:
    try:
        view = memoryview(buffer)
    except (TypeError, ValueError, BufferError):
        kind = type(buffer).__name__
        raise InvalidInputError(f"a buffer to load into cannot be {kind}: pass a writable one") from None
    if view.readonly or not view.c_contiguous:
        raise InvalidInputError("a buffer to load into must be writable and in one piece")
    return view.cast("B")


def _has_moved(payloads: Payloads, load: _Load, deadline: float) -> bool:
    """Whether what ended a load was moved, or evicted, meanwhile. Where the tree does not answer, nothing is known."""
    before = load.place
    try:
        load.places = payloads.places([load.hashes], deadline)[0]
    except DistPrefixError:
        load.ended = _UNAVAILABLE
        return False
    return load.place != before


def _finish(payloads: Payloads, load: _Load, deadline: float) -> Loaded:
    """Trim what is proved to be gone, have promoted what is cold, and count."""
    if load.ended is not None:
        payloads.count(f"payloads_{load.ended.reason}", 1)
        if load.ended is UNFIT:
            payloads.warn_of_unfit(*_lengths(load))
        if load.ended.reason in _SUSPECT:
            _disprove(payloads, load, load.ended, deadline)
    if any(load.places.cold[load.first : load.stop]):
        payloads.to_promote.append(load.hashes[: load.stop * HASH_BYTES])
        payloads.state.wake()
    payloads.count("payloads_loaded", len(load.good))
    payloads.count("payload_bytes_loaded", sum(map(len, load.good)))
    return Loaded(len(load.good), tuple(load.good))


def _lengths(load: _Load) -> tuple[int, int]:
    """Of the payload that ended a load, as stored, and of the buffer for it."""
    place = load.place or (0, 0)
    return max(place), len(load.into[load.stop - load.first]) if load.into is not None else 0


def _disprove(payloads: Payloads, load: _Load, flaw: Flaw, deadline: float) -> None:
    """Have the tree compare what was seen, twice, with what there is now; what is gone is trimmed with what follows.

    Any failure on the way is no evidence: the tree stays as it is.
    """
    state = payloads.state
    place = load.place
    if place is None:
        return
    warm, cold = place
    store = payloads.warm if warm else payloads.cold
    if store is None or not state.link.endpoint.is_settled:
        return
    chunk = load.hashes[load.stop * HASH_BYTES : (load.stop + 1) * HASH_BYTES]
    head = max(start for start in load.places.starts if start <= load.stop)
    run = load.hashes[head * HASH_BYTES : (load.stop + 1) * HASH_BYTES]
    evidence = Evidence(WARM if warm else COLD, warm or cold, flaw.header, flaw.digest)
    try:
        is_remote = store.cold and state.link.cold_is_elsewhere
        if is_remote and not store.confirms(Want(chunk, cold), flaw, deadline):
            payloads.count("evidence_refuted", 1)
            return
        disproved = state.link.publish(operations.disprove(run, evidence), min(deadline, state.link.publish_deadline()))
    except DistPrefixError:
        payloads.count("trims_failed", 1)
        return
    payloads.count("evidence_refuted", int(not disproved.agreed))
    payloads.count("payloads_trimmed", disproved.trimmed)


def _read_all(payloads: Payloads, loads: Sequence[_Load], deadline: float) -> None:
    """Read what is wanted, each load up to the first payload that is not good."""
    every = [wanted for each in loads for wanted in each.wants()]
    for is_cold, run in groupby(every, lambda wanted: wanted.is_cold):
        store = payloads.cold if is_cold else payloads.warm
        for group in groups(run, lambda wanted: wanted.want.size, _GROUP_BYTES):
            wanted = [each for each in group if each.load.ended is None]
            began = time.perf_counter()
            size = 0
            found = _read(payloads, store, [each.want for each in wanted], deadline)
            spent_us = int(1e6 * (time.perf_counter() - began))
            for each, read in zip(wanted, found, strict=True):
                if each.load.ended is not None:
                    continue
                if isinstance(read, Flaw):
                    each.load.ended = read
                else:
                    each.load.good.append(read)
                    size += len(read)
            payloads.count("payload_load_us", spent_us)
            if is_cold:
                payloads.count("payload_load_cold_us", spent_us)
                payloads.count("payload_bytes_loaded_cold", size)


def _read(
    payloads: Payloads, store: PayloadStore | None, wants: Sequence[Want], deadline: float
) -> Sequence[memoryview | Flaw]:
    """As `PayloadStore.read`; all are unavailable when the server is."""
    if store is None:
        return [_UNAVAILABLE] * len(wants)
    try:
        found = _read_through(payloads, store, wants, deadline) if payloads.cache.is_on else store.read(wants, deadline)
    except UnavailableError:
        if payloads.state.config.strict:
            raise
        return [_UNAVAILABLE] * len(wants)
    if payloads.state.config.strict and any(isinstance(each, Flaw) and each.reason == "unavailable" for each in found):
        raise UnavailableError("the server answered with an error in place of a payload")
    return found


def _read_through(
    payloads: Payloads, store: PayloadStore, wants: Sequence[Want], deadline: float
) -> list[memoryview | Flaw]:
    """As `PayloadStore.read`, from L1 where it has it.

    What another thread is reading is waited for, after what this one reads.
    """
    cache = payloads.cache
    found: dict[int, memoryview | Flaw] = {}
    mine: list[tuple[int, Reading]] = []
    others: list[tuple[int, Reading]] = []
    try:
        for i, want in enumerate(wants):
            kept = cache.get(want.chunk)
            if kept is not None:
                found[i] = _copy(kept, want.target)
                continue
            own = Reading(deadline)
            mine.append((i, own))  # first: an interrupt must not leave a reading that nobody ends
            reading = cache.begin(want.chunk, own)
            if reading is not own:
                mine.pop()
                others.append((i, reading))
        found.update(zip([i for i, _ in mine], store.read([wants[i] for i, _ in mine], deadline), strict=True))
    finally:
        for i, own in mine:
            read = found.get(i)
            cache.end(wants[i].chunk, own, read if isinstance(read, memoryview) else None)
    for i, reading in others:
        reading.ended.wait(max(0.0, deadline - time.monotonic()))
        kept = cache.get(wants[i].chunk)
        found[i] = store.read([wants[i]], deadline)[0] if kept is None else _copy(kept, wants[i].target)
    return [found[i] for i in range(len(wants))]


def _copy(payload: bytes, target: memoryview | None) -> memoryview | Flaw:
    if target is None:
        return memoryview(payload)
    if len(payload) != len(target):
        return UNFIT
    target[:] = payload
    return target
