"""What workers report of themselves in Redis, so that one place shows the whole fleet.

A worker may have several caches, as an engine has one in its scheduler and one in each of its workers: each reports
under a name of its own, and readers add them up.
"""

from __future__ import annotations

from typing import Any, cast

import msgpack
import redis

from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.redis.replies import clock_ms, count_of, pairs

__all__ = ["breakers_off", "figure", "read_metrics", "withdraw_metrics", "write_metrics"]

_FRESH_MS = 30_000
_MAX_DEPTH = 2
_MAX_FIGURE = 1e18
"""Nothing that is counted gets as large."""
_GAUGES = frozenset({"at", "epoch", "l2_bytes", "l2_budget_use", "l2_chunks", "l2_leaves"})
"""What caches of one worker say of the same thing: the largest counts, not the sum."""
_STATES = ("closed", "half-open", "open")
"""Of a breaker, the best first."""


def write_metrics(client: Client, keys: Keys, name: str, metrics: dict[str, Any], deadline: float) -> None:
    """Report how a cache is doing, dated by the server. One script call. Raises what the client raises."""
    client.call("report", keys.metrics, (name, cast("bytes", msgpack.packb(metrics))), deadline)


def withdraw_metrics(client: Client, keys: Keys, name: str, deadline: float) -> None:
    """A cache is closed. One call. Raises what the client raises."""
    client.command("HDEL", keys.metrics, name, deadline=deadline)


def read_metrics(client: redis.Redis, keys: Keys) -> dict[str, dict[str, Any]]:
    """What workers reported within the last half minute, by holder, all their caches together. Two calls."""
    try:
        reply: Any = client.execute_command("HGETALL", keys.metrics)
        now_ms = clock_ms(client.time())
    except redis.ResponseError:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for name, value in pairs(reply).items():
        metrics = _unpack(value)
        if metrics is None or abs(now_ms - 1000 * metrics["at"]) >= _FRESH_MS:
            continue
        holder = name.decode(errors="replace").partition(" ")[0]
        found[holder] = _added(found[holder], metrics) if holder in found else metrics
    return found


def figure(report: dict[str, Any], name: str) -> float:
    """A number of a report; 0 where it has none of this name."""
    value = report.get(name, 0)
    return value if isinstance(value, int | float) else 0


def breakers_off(report: dict[str, Any]) -> list[str]:
    """The breakers of a report that are not closed."""
    breakers = report.get("breakers")
    states = cast("dict[str, Any]", breakers) if isinstance(breakers, dict) else {}
    return [name for name, state in states.items() if state != "closed"]


def _unpack(value: bytes) -> dict[str, Any] | None:
    """A report with the time when the server got it, in seconds since 1970; None for what is no report."""
    at_ms, _, packed = value.partition(b":")
    try:
        metrics = msgpack.unpackb(packed)
    except (ValueError, TypeError, RecursionError):
        return None
    at = count_of(at_ms)
    return {**_figures(cast("dict[Any, Any]", metrics)), "at": at / 1000} if isinstance(metrics, dict) and at else None


def _figures(metrics: dict[Any, Any], depth: int = 0) -> dict[str, Any]:
    """What can be a report of all that was told: numbers and words by name, and dictionaries of these."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if isinstance(value, dict) and depth < _MAX_DEPTH:
            found[str(name)] = _figures(cast("dict[Any, Any]", value), depth + 1)
        elif isinstance(value, str) or (isinstance(value, int | float) and abs(value) < _MAX_FIGURE):
            found[str(name)] = value
    return found


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two reports as one."""
    total = dict(one)
    for name, value in other.items():
        before = one.get(name)
        if before is None:
            total[name] = value
        elif isinstance(value, str | dict) or isinstance(before, str | dict):
            total[name] = _joined(before, value)
        else:
            total[name] = max(before, value) if name in _GAUGES else before + value
    hits, lookups = (total.get(name, 0) for name in ("hits", "lookups"))
    if "hit_rate" in total and isinstance(hits, int | float) and isinstance(lookups, int | float):
        total["hit_rate"] = hits / lookups if lookups else 0.0
    return total


def _joined(one: Any, other: Any) -> Any:
    """Two dictionaries added up, or the worse of two states; the first where they are not of one kind."""
    if isinstance(one, dict) and isinstance(other, dict):
        return _added(cast("dict[str, Any]", one), cast("dict[str, Any]", other))
    if isinstance(one, str) and isinstance(other, str):
        return max(one, other, key=lambda state: _STATES.index(state) if state in _STATES else -1)
    return one
