"""Looking a prompt up: L1 first, one walk of Redis from where L1 stopped, the answer taken over into L1."""

from __future__ import annotations

import time
from array import array
from functools import partial
from random import random
from typing import Any

from distprefix import operations
from distprefix.chunking import HASH_BYTES, Prompt
from distprefix.errors import NotAttachedError
from distprefix.l1 import Found, Node
from distprefix.model import CacheHitResult, CacheTier, Holder
from distprefix.nodes import NodeView
from distprefix.results import entry_of
from distprefix.state import State

__all__ = ["look_up", "own_blocks", "touch"]

_HASHING_SHARE = 0.6
"""Of a look-up's deadline: a prompt so long that hashing takes longer is looked up in part."""


def look_up(
    state: State, token_ids: Any, blocks_of: str | None = None, max_cache_hit_length: int | None = None
) -> CacheHitResult:
    """See `PrefixCacheOptimizer.find_longest_cache_hit`."""
    began = time.perf_counter_ns()
    prompt = state.read(token_ids)
    if max_cache_hit_length is not None:
        prompt = prompt.within(max_cache_hit_length, state.config.chunk_size)
    now = time.monotonic()
    deadline = now + state.config.lookup_timeout_s
    with state.lock:
        found, coverage = _trusted(state, prompt, now)
        if found.fresh == prompt.chunks and blocks_of is None:
            return _answer(state, prompt, found, coverage, began)
    hashes = state.hashes(prompt, found, now + _HASHING_SHARE * state.config.lookup_timeout_s)
    with state.lock:
        if not prompt.is_chain and blocks_of is None and state.l1.chains:
            state.l1.adopt(prompt, hashes, now)
            found, coverage = _trusted(state, prompt, now)
            if found.fresh == prompt.chunks:
                return _answer(state, prompt, found, coverage, began)
        start = found.resume if blocks_of is None else 0
        generation = state.feed.generation
    hashes = hashes[start * HASH_BYTES :]
    views, calls = _ask(state, operations.walk(hashes, start, blocks_of or "", in_part=True), deadline)
    with state.lock:
        try:
            return _take_over(state, prompt, found, hashes, start, views, calls, generation, blocks_of, now, began)
        except BaseException:  # what was learned may be outdated
            state.l1.is_torn = True
            raise


def _take_over(
    state: State,
    prompt: Prompt,
    found: Found,
    hashes: bytes,
    start: int,
    views: list[NodeView] | None,
    calls: int,
    generation: int,
    blocks_of: str | None,
    now: float,
    began: int,
) -> CacheHitResult:
    """L1 learns what Redis said, if it said anything; the result is what L1 knows then. Under the lock."""
    blocks = None if blocks_of is None else b""
    learned: list[Node] = []
    answered = found.chunks
    if views is not None:
        answered = found.fresh
        if prompt.is_chain:
            views = state.l1.credible(hashes, start, views)
        reached = views[-1].start + views[-1].matched if views else start
        learned = state.l1.learn(prompt, hashes, start, views, now)
        if reached < found.chunks:
            state.l1.cut(prompt, reached)
        if blocks_of is not None:
            blocks = _blocks_of(state, views, blocks_of)
    is_path = learned and not start  # then there is no need to search for it
    found = Found(learned, learned[-1].stop, learned[-1].stop, 0) if is_path else state.find(prompt, now)
    coverage = state.l1.coverage(found.path, found.chunks, state.link.is_live)
    result = _conclude(state, prompt, found, coverage, answered, calls, blocks, began)
    if generation != state.feed.generation:
        state.l1.distrust(learned)
    state.l1.shrink()  # not before: the prompt may be larger than the budget
    return result


def _trusted(state: State, prompt: Prompt, now: float) -> tuple[Found, dict[str, int]]:
    """What L1 knows of a prompt and who covers it, as far as it may be trusted.

    Nothing is revoked when somebody covers more of a node: where L1 sees a gap, Redis is asked from there on.
    """
    found = state.find(prompt, now)
    coverage = state.l1.coverage(found.path, found.fresh, state.link.is_live) if found.fresh else {}
    covered = max(coverage.values()) if coverage else 0
    if covered < found.fresh:
        for node in found.path:
            if node.stop > covered and node.value is not None:
                return found._replace(fresh=min(node.start, covered), resume=node.value.start), coverage
    return found, coverage


def _answer(state: State, prompt: Prompt, found: Found, coverage: dict[str, int], began: int) -> CacheHitResult:
    """What L1 says, which is all that is asked for. Now and then it is to be checked. Under the lock."""
    result = _conclude(state, prompt, found, coverage, found.chunks, 0, None, began)
    if state.config.staleness_sample and random() < state.config.staleness_sample:  # noqa: S311 - not for secrets
        state.samples.append((state.l1.hashes(found.path, 0, found.chunks), dict(result.holders)))
        state.wake()  # checked later, what changed in between would count as stale
    return result


def _ask(state: State, operation: Any, deadline: float) -> tuple[list[NodeView] | None, int]:
    try:
        return state.link.look_up(operation, deadline)
    except NotAttachedError:
        if state.config.strict:
            raise
        return [], 1


def _conclude(
    state: State,
    prompt: Prompt,
    found: Found,
    coverage: dict[str, int],
    answered: int,
    calls: int,
    blocks: bytes | None,
    began: int,
) -> CacheHitResult:
    """The result, from what L1 knows now. Under the lock.

    `answered`: leading chunks that L1 vouched for; `blocks`: block ids of the holder that was asked for.
    """
    size, counts = state.config.chunk_size, state.counts
    matched = max(coverage.values()) if coverage else 0
    if matched * size < state.config.min_prefix_length:
        matched, coverage = 0, {}
    l1_chunks = min(matched, answered)
    make_entry = make_blocks = tier = None
    if matched:
        tier = CacheTier.HOT if l1_chunks == matched else CacheTier.WARM
        path = found.path_to(matched)
        node = path[-1]
        state.l1.touch(node, time.monotonic())
        state.outbox.touches.add(path)
        if state.config.speculate and not node.children and node.value and node.value.stop == matched:
            state.guesses.append((node, matched))
            state.wake()
        make_entry = entry_of(path, matched, size, tier, state.outbox.touches)
        if blocks is not None:
            ids = tuple(array("I", blocks[: 4 * matched]))
            make_blocks = lambda: ids  # noqa: E731
        elif len(state.own):
            make_blocks = lambda: own_blocks(state, prompt, matched)  # noqa: E731
    # Together, with no call in between: an interrupt must not leave some of them behind the others.
    counts["lookups"] += 1
    counts["chunks"] += prompt.chunks
    if matched:
        counts["hits"] += 1
        counts["chunks_hit"] += matched
        counts["chunks_hit_l1"] += l1_chunks
        counts["hits_hot" if tier is CacheTier.HOT else "hits_warm"] += 1
    holders = sorted(coverage.items(), key=lambda item: -item[1]) if len(coverage) > 1 else coverage.items()
    return CacheHitResult(
        hit=matched > 0,
        matched_tokens=matched * size,
        matched_chunks=matched,
        tier=tier,
        holders=tuple(map(Holder._make, holders)),
        lookup_time_us=(time.perf_counter_ns() - began) / 1000,
        l1_chunks=l1_chunks,
        redis_calls=calls,
        _make_entry=make_entry,
        _make_blocks=make_blocks,
        _reservations=state.reservations,
        _prompt=prompt,
        _again=partial(look_up, state, prompt.tokens, None, prompt.chunks * size),
    )


def own_blocks(state: State, prompt: Prompt, chunks: int) -> tuple[int, ...]:
    """This worker's own block ids for a prompt's leading chunks, as many as it has. No Redis call."""
    if not len(state.own):
        return ()
    hashes = state.chain(prompt.leading(chunks))
    with state.lock:
        return state.own.ids(hashes)


def touch(state: State, prompt: Prompt, chunks: int) -> None:
    """Record a use of a prompt's leading chunks, as far as L1 knows them. No Redis call."""
    now = time.monotonic()
    with state.lock:
        found = state.l1.find(prompt, now)
        if found.chunks:
            path = found.path_to(min(chunks, found.chunks))
            state.l1.touch(path[-1], now)
            state.outbox.touches.add(path)


def _blocks_of(state: State, views: list[NodeView], holder: str) -> bytes:
    """A holder's block ids up to its first gap; none that an older process of its worker id left behind."""
    blocks: list[bytes] = []
    for view in views:
        epoch, end = view.holders.get(holder, (0, 0))
        if end <= view.start or not state.link.is_live(holder, epoch):
            break
        told = view.blocks[: 4 * min(end - view.start, view.matched)]
        blocks.append(told[: len(told) // 4 * 4])
        if len(blocks[-1]) < 4 * view.matched:
            break
    return b"".join(blocks)
