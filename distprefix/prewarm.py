"""Filling L1 with what the cluster uses most, before anybody asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from distprefix import operations
from distprefix.chunking import HASH_BYTES
from distprefix.errors import DistPrefixError
from distprefix.state import State

__all__ = ["Prewarmed", "prewarm"]

_CHUNKS_A_CALL = 4096


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
    while time.monotonic() - began < time_s and state.l1.bytes - before < max_bytes:
        generation = state.feed.generation
        deadline = min(began + time_s, state.link.publish_deadline())
        try:
            rank, found = state.link.publish(operations.prewarm(rank, _CHUNKS_A_CALL), deadline)
        except DistPrefixError:
            break
        with state.lock:
            for node in found:
                if generation != state.feed.generation or state.l1.bytes - before >= max_bytes:
                    break
                chain = chains.get(node.parent, b"") + node.run
                chains[node.run[-HASH_BYTES:]] = chain
                state.l1.learn_chain(chain, node.view, time.monotonic())
                nodes, chunks = nodes + 1, chunks + node.view.size
            state.l1.shrink()
        if progress is not None:
            progress(Prewarmed(nodes, chunks, state.l1.bytes - before, time.monotonic() - began, rank < 0))
        if rank < 0:
            complete = True
            break
    state.counts["prewarmed_chunks"] += chunks
    return Prewarmed(nodes, chunks, state.l1.bytes - before, time.monotonic() - began, complete)
