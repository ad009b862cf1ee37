"""`distprefix purge` and `maintain --server`: what an operator does for the whole server."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.redis.keys import REGISTRY, Keys
from tests.commands import run_cli
from tests.servers import Server, limited_server


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of its own: these commands look after all of it."""
    with limited_server("64mb") as server:
        yield server


def publish(server: Server, namespace: str) -> None:
    """Have a namespace with a prompt in it."""
    settings: dict[str, Any] = {"touch_interval_s": 0, "feed_interval_s": 0, "worker_id": "w", "chunk_size": 4}
    with PrefixCacheOptimizer(PrefixCacheConfig(url=server.url, namespace=namespace, **settings)) as cache:
        cache.cache_prefix(list(range(40)))
        cache.store(list(range(40)), [bytes([n]) * 100_000 for n in range(10)])


def test_a_namespace_is_purged(server: Server) -> None:
    """Everything of it is gone, others stay, the counts are told; the second time there is nothing, exit code 1."""
    publish(server, "a")
    publish(server, "b")
    result = run_cli("purge", "a", "--url", server.url, "--yes", "--json")
    assert result.returncode == 0
    value = json.loads(result.stdout)
    assert (value["namespace"], value["nodes"], value["chunks"]) == ("a", 1, 10)
    assert {name.partition(b"}")[0] for name in server.client().scan_iter(match="dp:{*")} == {b"dp:{b", b"dp:{b:0"}
    again = run_cli("purge", "a", "--url", server.url, "--yes")
    assert again.returncode == 1
    assert json.loads(run_cli("namespaces", "--url", server.url, "--json").stdout)[0]["name"] == "b"


def test_a_purge_asks_first(server: Server) -> None:
    """Without --yes nothing is removed unless the answer is yes; a name that no namespace has is refused."""
    publish(server, "a")
    assert run_cli("purge", "a", "--url", server.url, stdin="n\n").returncode == 1
    assert server.client().exists(Keys("a").meta)
    assert run_cli("purge", "a", "--url", server.url, stdin="y\n").returncode == 0
    assert not server.client().exists(Keys("a").meta)
    for name in ("*", "a*", "", "x" * 65, "a}:"):
        assert run_cli("purge", name, "--url", server.url, "--yes").returncode == 2


def test_an_operator_looks_after_the_server(server: Server) -> None:
    """What is over the budget goes, what nobody used for its time is removed, and an idle round says so."""
    publish(server, "a")
    publish(server, "unused")
    admin = server.client()
    then = int(1000 * (time.time() - 30 * 86_400))
    admin.hset(Keys("unused").meta, mapping={"used": then})
    admin.zadd(REGISTRY, {"unused": then})
    idle = json.loads(run_cli("maintain", "--server", "--url", server.url, "--json").stdout)
    assert idle == {"wanted_bytes": 0, "freed_bytes": 0, "relieved_namespaces": 0, "removed_namespaces": 1}
    assert not admin.exists(Keys("unused").meta)
    done = json.loads(
        run_cli("maintain", "--server", "--server-bytes", "1000000", "--url", server.url, "--json").stdout
    )
    assert done["freed_bytes"] > 500_000
    assert done["relieved_namespaces"] == 1
    assert admin.exists(Keys("a").meta)
