"""Replaying a trace on a fleet, and the figures."""

from __future__ import annotations

import random
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from distprefix.replay.fleet import Fleet, Outcome
from distprefix.replay.trace import Request, ideal_hits

__all__ = ["Figures", "Payloads", "Restarting", "replay", "router"]

_AFTER_RESTART = 100


@dataclass(frozen=True, slots=True)
class Figures:
    """What a replay measured; `--json` prints exactly these."""

    requests: int
    chunks: int
    unique_chunks: int
    hit_chunks: int
    hit_rate: float
    ideal_hit_rate: float
    l1_hit_chunks: int
    shared_hit_chunks: int
    redis_calls_per_lookup: float
    lookup_p50_us: float
    lookup_p99_us: float
    publish_p50_us: float
    publish_p99_us: float
    redis_bytes_per_chunk: float
    nodes: int
    wall_s: float
    evicted_chunks: int | None = None
    """Only with a capacity."""
    restart_l1_share: float | None = None
    """Of what the restarted node hit in its first 100 look-ups: how much its L1 answered. Only with a restart."""

    payload_bytes: int | None = None
    """This and what follows only with payloads."""
    loaded_chunks: int | None = None
    wrong_payloads: int | None = None
    load_tokens_per_s: float | None = None
    """Tokens whose KV a second of loading brought back: to be held against a model's prefill."""
    store_gb_per_s: float | None = None
    """Into the warm tier, in bytes of payloads, as are all of these."""
    load_warm_gb_per_s: float | None = None
    load_cold_gb_per_s: float | None = None
    demote_gb_per_s: float | None = None
    cold_ratio: float | None = None
    """How many times smaller payloads are in the cold tier."""

    def as_dict(self) -> dict[str, Any]:
        """By name, for JSON; what was not asked for is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Restarting(NamedTuple):
    """Which request a restart of node 0 comes before, and whether it pre-warms then."""

    at: int
    prewarm: bool


class Payloads(NamedTuple):
    """That requests load and store payloads."""

    size: int
    block_size: int
    demote_at: int
    """The request before which all that was stored becomes cold."""


def router(route: str, nodes: int) -> Callable[[int, Request], int]:
    """Which node gets a request: ``round-robin``, ``session`` (its session's node), ``random`` (the same each run)."""
    choose = random.Random(0)  # noqa: S311 - repeatable, not secret
    if route == "random":
        return lambda _i, _request: choose.randrange(nodes)
    if route == "session":
        return lambda i, request: (zlib.crc32(request.session.encode()) if request.session else i) % nodes
    return lambda i, _request: i % nodes


def replay(
    fleet: Fleet,
    requests: Sequence[Request],
    *,
    nodes: int,
    route: str,
    concurrency: int,
    used_memory: Callable[[], int],
    progress: Callable[[], None] = lambda: None,
    restarting: Restarting | None = None,
    payloads: Payloads | None = None,
) -> Figures:
    """Send every request in order, at most `concurrency` at a time, and measure."""
    choose, outcomes = router(route, nodes), list[Outcome]()
    before, began = used_memory(), time.perf_counter()

    def collect() -> None:
        for outcome in fleet.outcomes():
            outcomes.append(outcome)
            progress()

    def collect_until(in_flight: int) -> None:
        while fleet.in_flight > in_flight:
            collect()

    restarted = 0
    for i, request in enumerate(requests):
        if restarting is not None and i == restarting.at:
            collect_until(0)
            fleet.restart(0, prewarm=restarting.prewarm)
            restarted = len(outcomes)
        if payloads is not None and i == payloads.demote_at:
            collect_until(0)
            fleet.demote()
        collect_until(concurrency - 1)
        if request.chunks:
            fleet.send(choose(i, request), request.runs)
    collect_until(0)
    wall_s = time.perf_counter() - began
    figures = _figures(requests, outcomes, nodes, used_memory() - before, wall_s)
    if payloads is not None:
        figures = replace(figures, **_payload_figures(payloads, outcomes, fleet.metrics()))
    return figures if restarting is None else replace(figures, restart_l1_share=_l1_share(outcomes[restarted:]))


def _l1_share(outcomes: list[Outcome]) -> float:
    after = [outcome for outcome in outcomes if outcome.node == 0][:_AFTER_RESTART]
    return round(sum(o.l1 for o in after) / max(1, sum(o.matched for o in after)), 4)


def _figures(requests: Sequence[Request], outcomes: list[Outcome], nodes: int, grown: int, wall_s: float) -> Figures:
    chunks = sum(request.chunks for request in requests)
    ideal_by_request, unique = ideal_hits(requests)
    ideal = sum(ideal_by_request)
    hit = sum(outcome.matched for outcome in outcomes)
    l1 = sum(outcome.l1 for outcome in outcomes)
    lookups, publishes = [o.lookup_us for o in outcomes], [o.publish_us for o in outcomes]
    return Figures(
        requests=len(requests),
        chunks=chunks,
        unique_chunks=unique,
        hit_chunks=hit,
        hit_rate=round(hit / chunks, 6) if chunks else 0.0,
        ideal_hit_rate=round(ideal / chunks, 6) if chunks else 0.0,
        l1_hit_chunks=l1,
        shared_hit_chunks=hit - l1,
        redis_calls_per_lookup=round(sum(o.calls for o in outcomes) / max(1, len(outcomes)), 4),
        lookup_p50_us=_percentile(lookups, 0.5),
        lookup_p99_us=_percentile(lookups, 0.99),
        publish_p50_us=_percentile(publishes, 0.5),
        publish_p99_us=_percentile(publishes, 0.99),
        redis_bytes_per_chunk=round(grown / unique, 2) if unique else 0.0,
        nodes=nodes,
        wall_s=round(wall_s, 3),
        evicted_chunks=sum(o.evicted for o in outcomes),
    )


def _payload_figures(payloads: Payloads, outcomes: list[Outcome], metrics: list[dict[str, Any]]) -> dict[str, Any]:
    def total(name: str) -> int:
        return sum(each[name] for each in metrics)

    def gb_per_s(size: int, us: int) -> float | None:
        return round(size / us / 1000, 3) if us and size else None

    cold, cold_us = total("payload_bytes_loaded_cold"), total("payload_load_cold_us")
    loaded, load_us = sum(o.moved.loaded for o in outcomes), sum(o.moved.load_us for o in outcomes)
    return {
        "payload_bytes": payloads.size,
        "loaded_chunks": loaded,
        "wrong_payloads": sum(o.moved.wrong for o in outcomes),
        "load_tokens_per_s": round(loaded * payloads.block_size / load_us * 1e6) if loaded else None,
        "store_gb_per_s": gb_per_s(total("payload_bytes_stored"), total("payload_store_us")),
        "load_warm_gb_per_s": gb_per_s(total("payload_bytes_loaded") - cold, total("payload_load_us") - cold_us),
        "load_cold_gb_per_s": gb_per_s(cold, cold_us),
        "demote_gb_per_s": gb_per_s(total("demoted_bytes"), total("demote_us")),
        "cold_ratio": round(total("demoted_bytes") / total("demoted_bytes_packed"), 3)
        if total("demoted_bytes")
        else None,
    }


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else 0.0
