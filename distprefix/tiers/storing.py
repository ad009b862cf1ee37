"""Storing the KV bytes of chunks: bytes first, then the tree names them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from distprefix.budget import keep_within
from distprefix.chunking import HASH_BYTES, Prompt, read_items
from distprefix.errors import DistPrefixError, InvalidInputError, NoParentError, OrphansError, UnavailableError
from distprefix.redis.transfers import Buffer
from distprefix.tiers import operations
from distprefix.tiers.moving import promote
from distprefix.tiers.operations import Places
from distprefix.tiers.payloads import ATTEMPTS, Payloads

__all__ = ["store"]


@dataclass(slots=True)
class _Prompt:
    """A prompt whose payloads are being stored."""

    prompt: Prompt
    chunks: list[bytes]
    stored: int = 0
    """Leading chunks that are there."""
    begin: int = 0
    """First chunk of the node that the next one lies in, or follows."""
    wanted: int = 0
    """Leading chunks that are to be there."""

    def look(self, places: Places, given: Mapping[bytes, Buffer]) -> None:
        """See what is there, and what is to be written: up to the first chunk whose payload is not given."""
        self.stored = self.wanted = places.chunks
        self.begin = max((start for start in places.starts if start <= self.stored), default=0)
        while self.wanted < len(self.chunks) and self.chunks[self.wanted] in given:
            self.wanted += 1

    @property
    def fresh(self) -> list[bytes]:
        """What is to be written."""
        return self.chunks[self.stored : self.wanted]


def store(payloads: Payloads, wanted: Sequence[tuple[Prompt, Sequence[Buffer | None]]]) -> list[int]:
    """See `PrefixCacheOptimizer.store_batch`."""
    wanted = [(prompt, _checked(prompt, buffers)) for prompt, buffers in wanted]
    state, deadline = payloads.state, payloads.deadline()
    prompts: list[_Prompt] = []
    given: dict[bytes, Buffer] = {}
    named: set[bytes] = set()
    for prompt, buffers in wanted:
        hashes = state.chain(prompt)
        chunks = [hashes[at : at + HASH_BYTES] for at in range(0, len(buffers) * HASH_BYTES, HASH_BYTES)]
        prompts.append(_Prompt(prompt, chunks))
        given.update((chunk, buffer) for chunk, buffer in zip(chunks, buffers, strict=True) if buffer is not None)
    try:
        waiting = prompts
        for _ in range(ATTEMPTS):
            chains = [b"".join(each.chunks) for each in waiting]
            for each, hashes, places in zip(waiting, chains, payloads.places(chains, deadline), strict=True):
                payloads.touch(each.prompt, hashes, places, hits=0)
                each.look(places, given)
                if each.fresh and any(places.cold):  # what is warm has only warm ones above it
                    promote(payloads, hashes[: each.stored * HASH_BYTES], deadline)
            waiting = [each for each in waiting if each.fresh]
            fresh = dict.fromkeys(chunk for each in waiting for chunk in each.fresh)
            began = time.perf_counter()
            try:
                payloads.warm.write([(chunk, given[chunk]) for chunk in fresh], deadline)
                payloads.count("payload_store_us", int(1e6 * (time.perf_counter() - began)))
                for each in waiting:
                    named |= _name(payloads, each, deadline)
            except UnavailableError as error:
                if not (error.is_full and state.relief.relieve(deadline, is_full=True)):
                    raise
            waiting = [each for each in waiting if each.fresh]
    except DistPrefixError as error:
        payloads.count("stores_failed", 1)
        if state.config.strict or isinstance(error, InvalidInputError):
            raise
    payloads.count("payloads_stored", len(named))
    payloads.count("payload_bytes_stored", sum(memoryview(given[chunk]).nbytes for chunk in named))
    return [each.stored for each in prompts]


def _checked(prompt: Prompt, buffers: Sequence[Buffer | None]) -> Sequence[Buffer | None]:
    """The payloads of a prompt, as many as it has chunks at most. Raises InvalidInputError."""
    given: Sequence[Buffer | None] = read_items(buffers, "payloads", "a list with a buffer or None for each chunk")
    for i, buffer in enumerate(given):
        try:
            is_whole = buffer is None or memoryview(buffer).c_contiguous
        except (TypeError, ValueError, BufferError):
            raise InvalidInputError(
                f"payload {i} is {type(buffer).__name__}: pass a buffer of bytes, or None"
            ) from None
        if not is_whole:
            raise InvalidInputError(f"payload {i} is not in one piece: pass a contiguous buffer")
    if len(given) > prompt.chunks:
        raise InvalidInputError(f"{len(given)} payloads do not fit {prompt.chunks} full chunks: one for each")
    prompt.leading(len(given)).check_chain()
    return given


def _name(payloads: Payloads, prompt: _Prompt, deadline: float) -> set[bytes]:
    """Have the tree name what was written. Returns what it took of that."""
    state, before = payloads.state, prompt.stored
    while True:
        chain = b"".join(prompt.chunks[prompt.begin : prompt.wanted])
        operation = operations.store(chain, prompt.begin, max_run=state.config.max_run)
        try:
            stored, state.usage = state.link.publish(operation, deadline)
        except OrphansError:  # a part of them is removed with each call
            continue
        except NoParentError:
            if not prompt.begin:
                raise
            prompt.begin = 0
            continue
        keep_within(state, state.usage)
        prompt.stored = prompt.begin + stored
        return set(prompt.chunks[before : prompt.stored])
