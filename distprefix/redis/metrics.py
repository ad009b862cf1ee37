"""What workers tell of themselves in Redis, so that one place shows the whole fleet."""

from __future__ import annotations

import time
from typing import Any, cast

import msgpack
import redis

from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.redis.replies import pairs

__all__ = ["read_metrics", "withdraw_metrics", "write_metrics"]

_FRESH_S = 30.0


def write_metrics(client: Client, keys: Keys, holder: str, metrics: dict[str, Any], deadline: float) -> None:
    """Say how this worker is doing. One call. Raises what the client raises."""
    packed = cast("bytes", msgpack.packb({**metrics, "at": time.time()}))
    client.command("HSET", keys.metrics, holder, packed, deadline=deadline)


def withdraw_metrics(client: Client, keys: Keys, holder: str, deadline: float) -> None:
    """This worker ends. One call. Raises what the client raises."""
    client.command("HDEL", keys.metrics, holder, deadline=deadline)


def read_metrics(client: redis.Redis, keys: Keys) -> dict[str, dict[str, Any]]:
    """What workers told within the last half minute, by holder. One call."""
    try:
        reply: Any = client.execute_command("HGETALL", keys.metrics)
    except redis.ResponseError:
        return {}
    found: dict[str, dict[str, Any]] = {}
    for holder, packed in pairs(reply).items():
        try:
            metrics = msgpack.unpackb(packed)
        except ValueError:  # another hand wrote it
            continue
        if isinstance(metrics, dict) and time.time() - float(cast("Any", metrics).get("at", 0)) < _FRESH_S:
            found[holder.decode()] = cast("dict[str, Any]", metrics)
    return found
