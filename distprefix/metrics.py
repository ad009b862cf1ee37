"""What happened so far in a process, as numbers."""

from __future__ import annotations

from typing import Any

from distprefix.config import PrefixCacheConfig
from distprefix.operations import Usage
from distprefix.state import State
from distprefix.tiers.tiers import Tiers

__all__ = ["metrics_of"]


_PAYLOADS = (
    *("loads", "payloads_stored", "payload_bytes_stored", "payload_store_us", "payloads_loaded"),
    *("payload_bytes_loaded", "payloads_trimmed", "evidence_refuted", "trims_failed"),
    *("payload_bytes_loaded_cold", "payload_load_us", "payload_load_cold_us", "payloads_missing"),
    *("payloads_damaged", "payloads_unreadable", "payloads_unfit", "payloads_unavailable"),
    *("stores_failed", "loads_failed"),
    *("demoted_chunks", "demoted_bytes", "demoted_bytes_packed", "demote_us", "demotions_failed"),
    *("promoted_chunks", "promoted_bytes", "promote_us", "promotions_failed"),
)


def metrics_of(state: State, tiers: Tiers) -> dict[str, Any]:
    """Every counter and gauge; `PrefixCacheOptimizer.get_metrics` has it. No Redis call."""
    pools = tiers.pools
    breakers = {"walk": state.link.breakers.reads, "write": state.link.breakers.writes}
    for name, pool in pools.items():
        breakers |= {f"{name}_read": pool.breakers.reads, f"{name}_write": pool.breakers.writes}
    counts, link, outbox, l1 = state.counts, state.link, state.outbox, state.l1
    usage = state.usage or Usage(0, 0, 0, 0)
    return {
        "lookups": counts["lookups"],
        "hits": counts["hits"],
        "misses": counts["lookups"] - counts["hits"],
        "hits_hot": counts["hits_hot"],
        "hits_warm": counts["hits_warm"],
        "hits_stored": counts["hits_stored"],
        "hit_rate": counts["hits"] / counts["lookups"] if counts["lookups"] else 0.0,
        "chunks_looked_up": counts["chunks"],
        "chunks_hit": counts["chunks_hit"],
        "tokens_hit": counts["chunks_hit"] * state.config.chunk_size,
        "chunks_hit_l1": counts["chunks_hit_l1"],
        "tokens_cut": counts["tokens_cut"],
        "publishes": counts["publishes"],
        "publishes_short": counts["publishes_short"],
        "publishes_dropped": counts["publishes_dropped"],
        "publishes_dropped_by": dict(state.drops),
        "publishes_cut": counts["publishes_cut"],
        "chunks_unpublished_by": dict(state.unpublished),
        "redis_calls_lookup": link.lookups.calls,
        "redis_calls_publish": link.publishes.calls,
        "redis_failures": dict(link.failures),
        "breakers": {name: str(breaker.state) for name, breaker in breakers.items()},
        "breaker_opened": sum(breaker.opened for breaker in breakers.values()),
        **{f"payload_failures_{name}": dict(pool.failures) for name, pool in pools.items()},
        "reconnects": dict(link.endpoint.renewals),
        "touches_dropped": outbox.touches.dropped,
        "retractions_waiting": outbox.waiting,
        "retractions_refused": outbox.retractions_refused,
        "retractions_overrun": outbox.retractions_overrun,
        "l1_bytes": l1.bytes,
        "l1_chunks": l1.chunks,
        "l1_nodes": l1.nodes,
        "l1_evicted_chunks": l1.evicted_chunks,
        "own_chunks": len(state.own),
        "l2_chunks": usage.chunks,
        "l2_bytes": usage.bytes,
        "l2_leaves": usage.leaves,
        "l2_budget_use": _budget_use(state.config, usage),
        "evictions": counts["evictions"],
        "evicted_nodes": counts["evicted_nodes"],
        "evicted_chunks": counts["evicted_chunks"],
        "evictions_failed": counts["evictions_failed"],
        "leases": counts["leases"],
        "leases_failed": counts["leases_failed"],
        "claims": counts["claims"],
        "claims_lost": counts["claims_lost"],
        "claims_open": state.reservations.claims,
        "swept_coverage": counts["swept_coverage"],
        "swept_chunks": counts["swept_chunks"],
        "prewarmed_chunks": counts["prewarmed_chunks"],
        "speculated_chunks": counts["speculated_chunks"],
        **{name: counts[name] for name in _PAYLOADS},
        "tokens_loaded": counts["payloads_loaded"] * state.config.chunk_size,
        "feed_entries": state.feed.entries,
        "feed_gaps": state.feed.gaps,
        "feed_failures": state.feed.failures,
        "staleness_checked": counts["staleness_checked"],
        "staleness_over": counts["staleness_over"],
        "staleness_under": counts["staleness_under"],
        "background_errors": counts["background_errors"],
        "history_lost": dict(link.losses),
        "rekeyed": link.rekeyed,
        "republished": counts["republished"],
        "republish_waiting": counts["republish_waiting"],
        "republish_failed": counts["republish_failed"],
        "epoch": link.epoch,
        "l1_payload_bytes_used": tiers.payloads.cache.bytes,
        "l1_payload_hits": tiers.payloads.cache.hits,
    }


def _budget_use(config: PrefixCacheConfig, usage: Usage) -> float:
    """How much of the budget that is nearest to its end is used, as a share."""
    budgets = ((config.l2_max_chunks, usage.chunks), (config.l2_max_bytes, usage.bytes))
    shares = [held / budget for budget, held in (*budgets, (config.max_cached_sequences, usage.leaves)) if budget]
    return round(max(shares), 4)
