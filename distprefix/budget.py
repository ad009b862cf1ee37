"""Keeping the shared tree within its budget: what it may hold, and evicting what is over."""

from __future__ import annotations

import time

from distprefix import operations
from distprefix.config import PrefixCacheConfig
from distprefix.errors import DistPrefixError, NotAttachedError
from distprefix.operations import Bounds, Evicted, Usage
from distprefix.state import State

__all__ = ["bounds_of", "keep_within", "maintain", "maintain_cold"]

_CALLS = 10_000


def bounds_of(config: PrefixCacheConfig, watermark: float) -> Bounds:
    """How much a shard may hold at a watermark, a share of the budgets."""

    def share(budget: int | None) -> int | None:
        return None if budget is None else int(budget * watermark)

    return Bounds(share(config.l2_max_chunks), share(config.l2_max_bytes), share(config.max_cached_sequences))


def keep_within(state: State, usage: Usage) -> None:
    """After a publish: evict down to the low watermark when the shard is over the high one.

    One call for every 25 leaves and for about 150 leased ones before these, as many as a publish may take time for.
    Never raises.
    """
    if bounds_of(state.config, state.config.high_watermark).exceeded_by(usage):
        try:
            _evict(state, _low(state), state.link.publish_deadline())
        except DistPrefixError:
            state.counts["evictions_failed"] += 1


def maintain(state: State, timeout_s: float = 60.0) -> Evicted:
    """Evict down to the low watermark, whoever else does so at the same time. Raises UnavailableError."""
    return _evict(state, _low(state), time.monotonic() + timeout_s)


def maintain_cold(state: State, deadline: float) -> Evicted:
    """Evict until cold payloads are within `cold_max_bytes`. Raises UnavailableError."""
    return _evict(state, Bounds(None, None, None, state.config.cold_max_bytes), deadline)


def _low(state: State) -> Bounds:
    return bounds_of(state.config, state.config.low_watermark)


def _evict(state: State, bounds: Bounds, deadline: float) -> Evicted:
    total = Evicted(0, 0, 0, more=False)
    before = total  # when the order of eviction was begun with last
    for _ in range(_CALLS):
        operation = operations.evict(bounds, state.config.eviction_batch_size, max(0, total.rank))
        try:
            evicted = state.link.publish(operation, deadline)
        except NotAttachedError:  # flushed: there is nothing to evict
            break
        total = total.then(evicted)
        with state.lock:
            state.counts["evicted_nodes"] += evicted.nodes
            state.counts["evicted_chunks"] += evicted.chunks
            state.counts["evictions"] += 1
        if evicted.rank < 0 and total.leased > before.leased and total.chunks > before.chunks:
            before = total  # parents that became leaves may stand before the leased ones: from the first one again
        elif not evicted.more:
            break
    return total
