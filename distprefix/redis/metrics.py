"""What workers report of themselves in Redis, so that one place shows the whole fleet.

A worker may have several caches, as an engine has one in its scheduler and one in each of its workers: each reports
under a name of its own, and readers add them up.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, cast

import msgpack
import redis

from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.redis.replies import clock_ms, is_wrong_type, pairs, whole

__all__ = ["breakers_off", "figure", "read_metrics", "withdraw_metrics", "write_metrics"]

_FRESH_MS = 30_000
_GAUGES = frozenset({"at", "epoch", "l2_bytes", "l2_budget_use", "l2_chunks", "l2_leaves"})
"""What caches of one worker say of the same thing: the largest counts, not the sum."""
_STATES = ("closed", "half-open", "open")
"""Of a breaker, the best first."""
_LONGEST_NAME = 200


def write_metrics(client: Client, keys: Keys, name: str, metrics: dict[str, Any], deadline: float) -> None:
    """Report how a cache is doing, dated by the server. One script call. Raises what the client raises."""
    client.call("report", keys.metrics, (name, cast("bytes", msgpack.packb(metrics))), deadline)


def withdraw_metrics(client: Client, keys: Keys, name: str, deadline: float) -> None:
    """A cache is closed. One call. Raises what the client raises."""
    client.command("HDEL", keys.metrics, name, deadline=deadline)


def read_metrics(client: redis.Redis, keys: Keys) -> dict[str, dict[str, Any]]:
    """What workers reported within the last half minute, by holder, all their caches together. Two calls.

    Values that are neither numbers nor states, nor some of these by name, are left out.
    """
    try:
        reply: Any = client.execute_command("HGETALL", keys.metrics)
    except redis.ResponseError as error:
        if not is_wrong_type(error):
            raise
        return {}
    now_ms = clock_ms(client.time())
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
    if not isinstance(metrics, dict) or not whole(at_ms):
        return None
    return {**_figures(cast("dict[Any, Any]", metrics)), "at": whole(at_ms) / 1000}


def _figures(metrics: dict[Any, Any]) -> dict[str, Any]:
    """What readers add up: finite numbers, short texts, and dictionaries of these."""
    found: dict[str, Any] = {}
    for name, value in metrics.items():
        if not isinstance(name, str) or len(name) > _LONGEST_NAME:
            continue
        if isinstance(value, dict):
            found[name] = {at: each for at, each in _figures(cast("dict[Any, Any]", value)).items() if _is_figure(each)}
        elif _is_figure(value):
            found[name] = value
    return found


def _is_figure(value: Any) -> bool:
    if isinstance(value, str):
        return len(value) <= _LONGEST_NAME
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value) and value >= 0


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two reports as one."""
    total = dict(one)
    for name, value in other.items():
        before = one.get(name)
        if before is None or _kind(before) is not _kind(value):
            total[name] = value
        elif isinstance(value, dict):
            total[name] = _added(before, cast("dict[str, Any]", value))
        elif isinstance(value, str):
            total[name] = max(before, value, key=lambda state: _STATES.index(state) if state in _STATES else -1)
        else:
            total[name] = max(before, value) if name in _GAUGES else before + value
    if "hit_rate" in total:
        hits = figure(total, "hits")
        lookups = figure(total, "lookups")
        total["hit_rate"] = hits / lookups if lookups else 0.0
    return total


def _kind(value: Any) -> type:
    return float if isinstance(value, int | float) else type(value)
