"""Taking whole namespaces out, as demos and replays do with their own."""

from __future__ import annotations

import time

import redis

from distprefix.errors import NotAttachedError
from distprefix.operations import drop
from distprefix.redis.client import Client, run
from distprefix.redis.connections import connect
from distprefix.redis.keys import Keys

__all__ = ["remove_namespaces"]


def remove_namespaces(client: redis.Redis, name: str, nodes: int, cold_url: str | None = None) -> None:
    """Take out a namespace and its nodes' own ones (`name-0`, ...); those that are not there are passed over.

    On the server of the cold tier it takes a scan of all keys there.
    """
    calls = Client(client)
    for each in (name, *(f"{name}-{i}" for i in range(nodes))):
        keys = Keys(each)
        try:
            run(drop(), calls, keys.meta, time.monotonic() + 60)
        except NotAttachedError:
            continue
        for key in (keys.meta, keys.log, keys.writers, keys.holders, *keys.own):
            client.delete(key)
    if cold_url:
        with connect(cold_url, 60.0) as cold:
            for each in (name, *(f"{name}-{i}" for i in range(nodes))):
                for key in cold.scan_iter(match=f"{Keys(each).base}*", count=1000):
                    cold.unlink(key)
