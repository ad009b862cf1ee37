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
from distprefix.redis.replies import clock_ms, pairs

__all__ = ["read_metrics", "withdraw_metrics", "write_metrics"]

_FRESH_MS = 30_000
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
        if metrics is None or now_ms - 1000 * metrics["at"] >= _FRESH_MS:
            continue
        holder = name.decode(errors="replace").partition(" ")[0]
        found[holder] = _added(found[holder], metrics) if holder in found else metrics
    return found


def _unpack(value: bytes) -> dict[str, Any] | None:
    """A report with the time when the server got it, in seconds since 1970; None for what is no report."""
    at_ms, _, packed = value.partition(b":")
    try:
        metrics = msgpack.unpackb(packed)
        if not isinstance(metrics, dict):
            return None
        return {**cast("dict[str, Any]", metrics), "at": int(at_ms) / 1000}
    except ValueError:
        return None


def _added(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two reports as one."""
    total = dict(one)
    for name, value in other.items():
        before = one.get(name)
        if before is None:
            total[name] = value
        elif isinstance(value, dict):
            total[name] = _added(before, cast("dict[str, Any]", value))
        elif isinstance(value, str):
            total[name] = max(before, value, key=lambda state: _STATES.index(state) if state in _STATES else -1)
        else:
            total[name] = max(before, value) if name in _GAUGES else before + value
    if "hit_rate" in total:
        total["hit_rate"] = total["hits"] / total["lookups"] if total["lookups"] else 0.0
    return total
