"""Filling L1 with what the cluster uses most, before anybody asks for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from distprefix import operations
from distprefix.chunking import HASH_BYTES
from distprefix.damage import Damage, Progress
from distprefix.errors import DistPrefixError
from distprefix.model import CacheTier, PrefixEntry
from distprefix.node_replies import HotNode
from distprefix.nodes import Snapshot
from distprefix.radix import PrefixTree
from distprefix.results import entry_of
from distprefix.state import State

__all__ = ["Prewarmed", "candidates", "prewarm", "speculate"]

_CHUNKS_A_CALL = 4096
_CANDIDATES_A_CALL = 200
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

    `progress` is called after each call that brings nodes: about 4,096 chunks, or 50 nodes. One call more finds 200
    candidates.
    """
    began, before = time.monotonic(), state.l1.bytes
    paths = _Paths()
    nodes = chunks = generation = 0
    complete = False

    def is_over() -> bool:
        held = state.l1.bytes - before + paths.waiting_bytes
        return paths.is_stuck or time.monotonic() - began >= time_s or held >= max_bytes

    while not is_over():
        deadline = min(began + time_s, state.link.publish_deadline())
        if not paths.waiting:
            generation = state.feed.generation
        try:
            complete = not paths.heads and not paths.find(state, deadline)
            if complete:
                break
            reply = state.link.publish(operations.prewarm(paths.heads, _CHUNKS_A_CALL), deadline)
        except DistPrefixError:
            break
        with state.lock:
            sure = generation == state.feed.generation
            known = nodes
            for chain, node in paths.take(*reply):
                if is_over():
                    break
                if state.l1.learn_chain(chain, node.view, time.monotonic(), sure=sure):
                    nodes += 1
                    chunks += node.view.size
            state.l1.shrink()
        paths.finish_call(state.link.damage, has_changed=nodes > known)
        if progress is not None:
            progress(Prewarmed(nodes, chunks, state.l1.bytes - before, time.monotonic() - began, complete=False))
    state.counts["prewarmed_chunks"] += chunks
    return Prewarmed(nodes, chunks, state.l1.bytes - before, time.monotonic() - began, complete)


class _Paths:
    """The way from candidates up to the root, as it comes in parts, the lower ones first."""

    def __init__(self) -> None:
        self.heads: list[str] = []
        """What to ask for."""
        self.waiting: list[HotNode] = []
        """Nodes of which something that precedes them has not come yet."""
        self.is_stuck = False
        """Whether calls come back to where they were, as circles in a damaged tree would have it."""
        self._progress = Progress()
        self._rank = 0
        self._damaged = 0
        """Nodes whose depth is not where their path ends."""
        self._lasts: dict[str, bytes] = {}
        """Heads of candidates to the hashes of their last chunks."""
        self._known: dict[bytes, tuple[bytes, bytes]] = {}
        """Last chunk of a node that came with all that precedes it, to the chunk before the node and the run."""
        self._path = (b"", b"")
        """The last chunk of the node that came last, and the chain up to there."""

    @property
    def waiting_bytes(self) -> int:
        """What the nodes take that wait."""
        return sum(len(node.run) for node in self.waiting)

    def find(self, state: State, deadline: float) -> bool:
        """Find candidates that have not come yet. Whether there are any more."""
        while not self.heads:
            page = state.link.publish(operations.hot(_CANDIDATES_A_CALL, self._rank), deadline)
            self._rank += _CANDIDATES_A_CALL
            self._lasts = {one.head.hex(): bytes.fromhex(one.last) for one in page}
            self.heads = [head for head, last in self._lasts.items() if last not in self._known]
            if not page:
                return False
        return True

    def take(self, done: int, above: str, nodes: list[HotNode]) -> Iterator[tuple[bytes, HotNode]]:
        """What a call brought: nodes that came with all that precedes them, with their chains."""
        ready = [*nodes, *self.waiting]
        self.waiting = []
        for node in ready:
            if node.parent and node.parent not in self._known:
                self.waiting.append(node)
                continue
            last = node.run[-HASH_BYTES:]
            if last in self._known:
                continue
            chain = self._chain_to(node.parent) + node.run
            if len(chain) != HASH_BYTES * (node.view.start + node.view.size):
                self._damaged += 1
                continue
            self._known[last] = (node.parent, node.run)
            self._path = (last, chain)
            yield chain, node
        if not above:
            self.waiting = []  # the way up is broken
        left = [head for head in self.heads[done:] if self._lasts.get(head) not in self._known]
        self.heads = [above, *left] if self.waiting else left

    def finish_call(self, damage: Damage, *, has_changed: bool) -> None:
        """Count what the call brought and what cannot be, and look whether the next one gets any further."""
        self.is_stuck = not self._progress.goes_on((tuple(self.heads), len(self.waiting)), has_changed=has_changed)
        damage.note(self._damaged + self.is_stuck)
        self._damaged = 0

    def _chain_to(self, last: bytes) -> bytes:
        if last == self._path[0]:
            return self._path[1]
        runs: list[bytes] = []
        while last:
            last, run = self._known[last]
            runs.append(run)
        return b"".join(reversed(runs))


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
                if not state.l1.learn_chain(chain, each.view, time.monotonic()):
                    break
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
