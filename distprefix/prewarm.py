"""Filling L1 with what the cluster uses most, before anybody asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from distprefix import operations
from distprefix.chunking import HASH_BYTES
from distprefix.errors import DistPrefixError
from distprefix.model import CacheTier, PrefixEntry
from distprefix.nodes import Snapshot
from distprefix.operations import HotNode
from distprefix.radix import PrefixTree
from distprefix.results import entry_of
from distprefix.state import State

__all__ = ["Prewarmed", "candidates", "prewarm", "speculate"]

_CHUNKS_A_CALL = 4096
_CHUNKS_A_GUESS = 512


class Prewarmed(NamedTuple):
    """What a pre-warming brought."""

    nodes: int
    chunks: int
    bytes: int
    """How much L1 grew."""
    seconds: float
    complete: bool
    """Whether every candidate is here: neither the time nor the bytes ran out, and Redis answered."""


def prewarm(
    state: State, time_s: float, max_bytes: int, progress: Callable[[Prewarmed], object] | None = None
) -> Prewarmed:
    """Bring the hottest nodes and all that lies above them into L1, most hits first. Never raises on Redis failing.

    `progress` is called after each Redis call; one call brings about 4,096 chunks.
    """
    began, before = time.monotonic(), state.l1.bytes
    chains: dict[bytes, bytes] = {}
    nodes, chunks, rank, complete = 0, 0, 0, False
    above = ""
    lower: list[HotNode] = []
    waiting = generation = 0
    while time.monotonic() - began < time_s and state.l1.bytes - before + waiting < max_bytes:
        if not above:
            generation = state.feed.generation
        deadline = min(began + time_s, state.link.publish_deadline())
        try:
            rank, above, found = state.link.publish(operations.prewarm(rank, _CHUNKS_A_CALL, above), deadline)
        except DistPrefixError:
            break
        found += lower
        lower = found if above else []
        waiting = sum(len(node.run) for node in lower)
        if above:  # the lower part of a long path waits for what precedes it
            continue
        with state.lock:
            sure, room = generation == state.feed.generation, True
            for node in found:
                room = state.l1.bytes - before < max_bytes
                if not room:
                    break
                chain = chains.get(node.parent, b"") + node.run
                chains[node.run[-HASH_BYTES:]] = chain
                if len(chain) != HASH_BYTES * (node.view.start + node.view.size):
                    continue  # another hand wrote its depth
                state.l1.learn_chain(chain, node.view, time.monotonic(), sure=sure)
                nodes, chunks = nodes + 1, chunks + node.view.size
            state.l1.shrink()
        if progress is not None:
            progress(Prewarmed(nodes, chunks, state.l1.bytes - before, time.monotonic() - began, rank < 0))
        if rank < 0 or not room:
            complete = room
            break
    state.counts["prewarmed_chunks"] += chunks
    return Prewarmed(nodes, chunks, state.l1.bytes - before, time.monotonic() - began, complete)


def speculate(state: State) -> None:
    """Bring in what most likely follows where prompts ended. One Redis call for each. Never raises."""
    while True:
        try:
            node, depth = state.guesses.popleft()
        except IndexError:
            return
        generation = state.feed.generation
        with state.lock:
            chain = state.l1.as_chain(node, depth)
        if not chain:
            continue
        try:
            found = state.link.publish(operations.guess(chain[-HASH_BYTES:], _CHUNKS_A_GUESS))
        except DistPrefixError:
            return
        with state.lock:
            still = generation == state.feed.generation and state.l1.as_chain(node, depth) == chain
            for each in found if still else []:
                if each.view.start != len(chain) // HASH_BYTES:
                    break
                chain += each.run
                state.l1.learn_chain(chain, each.view, time.monotonic())
                state.counts["speculated_chunks"] += each.view.size
            state.l1.shrink()


def candidates(state: State, limit: int) -> list[PrefixEntry]:
    """See `PrefixCacheOptimizer.get_prewarm_candidates`."""
    size, touches = state.config.chunk_size, state.outbox.touches
    try:
        found = state.link.publish(operations.hot(limit)) if limit > 0 else []
    except DistPrefixError:
        with state.lock:
            nodes = state.l1.hottest(state.config.prewarm_threshold)[:limit]
            return [
                entry_of(PrefixTree[Snapshot].path_to(node), node.stop, size, CacheTier.HOT, touches, used_now=False)(
                    ()
                )
                for node in nodes
            ]
    return [
        PrefixEntry(
            prefix_hash=one.last,
            num_tokens=one.stop * size,
            block_ids=(),
            tier=CacheTier.WARM,
            access_count=one.hits,
            created_at=one.created / 1000,
            last_access=one.accessed / 1000,
            _on_touch=partial(touches.add_node, one.head),
        )
        for one in found
        if one.hits >= state.config.prewarm_threshold
    ]
