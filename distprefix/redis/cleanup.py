"""Taking whole namespaces out, as demos and replays do with their own."""

from __future__ import annotations

import time

import redis

from distprefix.redis.client import Client
from distprefix.redis.connections import connect
from distprefix.redis.purge import purge_cold, remove_namespace

__all__ = ["remove_namespaces"]

_TIMEOUT_S = 60.0


def remove_namespaces(client: redis.Redis, name: str, nodes: int, cold_url: str | None = None) -> None:
    """Take out a namespace and its nodes' own ones (`name-0`, ...); those that are not there are passed over.

    On the server of the cold tier it takes a scan of all keys there.
    """
    names = (name, *(f"{name}-{i}" for i in range(nodes)))
    calls = Client(client)
    for each in names:
        remove_namespace(calls, each, None, time.monotonic() + _TIMEOUT_S)
    if cold_url:
        cold = connect(cold_url, _TIMEOUT_S)
        try:
            for each in names:
                purge_cold(Client(cold), each, time.monotonic() + _TIMEOUT_S)
        finally:
            cold.close()
