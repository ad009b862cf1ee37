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

__all__ = ["Figures", "Restarting", "replay", "router"]

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

    def as_dict(self) -> dict[str, Any]:
        """By name, for JSON; what was not asked for is left out."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class Restarting(NamedTuple):
    """Which request a restart of node 0 comes before, and whether it pre-warms then."""

    at: int
    prewarm: bool


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
) -> Figures:
    """Send every request in order, at most `concurrency` at a time, and measure."""
    choose, outcomes = router(route, nodes), list[Outcome]()
    before, began = used_memory(), time.perf_counter()

    def collect() -> None:
        for outcome in fleet.outcomes():
            outcomes.append(outcome)
            progress()

    restarted = 0
    for i, request in enumerate(requests):
        if restarting is not None and i == restarting.at:
            while fleet.in_flight:
                collect()
            fleet.restart(0, prewarm=restarting.prewarm)
            restarted = len(outcomes)
        while fleet.in_flight >= concurrency:
            collect()
        if request.chunks:
            fleet.send(choose(i, request), request.runs)
    while fleet.in_flight:
        collect()
    wall_s = time.perf_counter() - began
    figures = _figures(requests, outcomes, nodes, used_memory() - before, wall_s)
    if restarting is None:
        return figures
    after = [outcome for outcome in outcomes[restarted:] if outcome.node == 0][:_AFTER_RESTART]
    return replace(figures, restart_l1_share=round(sum(o.l1 for o in after) / max(1, sum(o.matched for o in after)), 4))


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


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 1) if ordered else 0.0
