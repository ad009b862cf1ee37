"""A server that many namespaces share: nobody fills it, what nobody uses goes, and a purge leaves nothing."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import redis

from distprefix import Chain, PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import NamespaceError
from distprefix.redis.client import Client
from distprefix.redis.connections import connect
from distprefix.redis.keys import REGISTRY, RELIEVING, Keys
from distprefix.redis.purge import purge, purge_cold, remove_namespace
from distprefix.redis.registry import read_enrolled
from distprefix.relief import relieve, remove_unused
from tests.servers import Backend, Server, limited_server

MIB = 1 << 20
PAYLOAD = 100_000


@pytest.fixture
def small() -> Iterator[Server]:
    """A server with room for 24 MiB."""
    with limited_server("24mb") as server:
        yield server


def config(server: Server, namespace: str, **settings: Any) -> PrefixCacheConfig:
    """Settings without a background."""
    quiet: dict[str, Any] = {"touch_interval_s": 0, "feed_interval_s": 0, "worker_id": "w", "payload_timeout_s": 30.0}
    return PrefixCacheConfig(url=server.url, namespace=namespace, **{**quiet, **settings})


def fill(server: Server, namespace: str, payloads: int, **settings: Any) -> int:
    """Store a chain of random payloads in a namespace. Returns how many are there then."""
    with PrefixCacheOptimizer(config(server, namespace, **settings)) as cache:
        chain = Chain([os.urandom(16) for _ in range(payloads)])
        return cache.store(chain, [os.urandom(PAYLOAD)] * payloads)


def client_of(server: Server) -> Client:
    """Calls as an operator."""
    return Client(connect(server.url, 10))


def soon() -> float:
    """A deadline that a test does not reach."""
    return time.monotonic() + 30


def leave(admin: redis.Redis, namespace: str, hours: float) -> None:
    """Have a namespace be made and used so many hours ago."""
    then = int(1000 * (time.time() - 3600 * hours))
    admin.hset(Keys(namespace).meta, mapping={"used": then, "created": f"{then // 1000}.0"})
    admin.zadd(REGISTRY, {namespace: then})


def test_a_tenant_with_a_salt_for_each_request_fills_no_server(small: Server) -> None:
    """Ten times the server's memory under ever new salts: each store goes well, and so does that of an old tenant."""
    with PrefixCacheOptimizer(config(small, "honest", salt="honest")) as honest:
        leave(small.client(), "honest", 2)
        honest._state.relief.enroll(soon())
        chain = Chain([os.urandom(16) for _ in range(20)])
        assert honest.store(chain, [os.urandom(PAYLOAD)] * 20) == 20
        for number in range(240):
            assert fill(small, f"n{number}", 10, salt=f"salt {number}") == 10
        assert honest.load(chain).chunks == 20
        assert honest.store(Chain([os.urandom(16)]), [os.urandom(PAYLOAD)]) == 1
        assert honest.check_integrity().ok
    memory: Any = small.client().info("memory")
    assert memory["used_memory"] < 24 * MIB


def test_a_publish_that_finds_no_room_makes_some(small: Server) -> None:
    """A publish waits for nothing: what the full server refused is dropped, and the background makes room."""
    for number in range(11):
        fill(small, f"n{number}", 20, server_max_bytes=1 << 40)
    admin = small.client()
    admin.config_set("maxmemory", "22mb")
    with PrefixCacheOptimizer(config(small, "mine", touch_interval_s=0.02, strict=False)) as cache:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            cache.cache_prefix(list(range(64)))
            if cache.get_metrics()["relief_bytes"]:
                break
            time.sleep(0.02)
        assert cache.get_metrics()["relief_bytes"] > 0
        assert cache.cache_prefix(list(range(64)))
    with PrefixCacheOptimizer(config(small, "mine", worker_id="v")) as other:
        assert other.find_longest_cache_hit(list(range(64))).matched_chunks == 4


def test_pins_hold_nothing_beyond_a_share(small: Server) -> None:
    """A namespace that pins all it has gives up what it has over its share all the same."""
    with PrefixCacheOptimizer(config(small, "pinned")) as cache:
        for _ in range(15):
            chain = Chain([os.urandom(16) for _ in range(10)])
            assert cache.store(chain, [os.urandom(PAYLOAD)] * 10) == 10
            cache.pin(chain)
    counts = Counter[str]()
    settings = PrefixCacheConfig(server_max_bytes=10 * MIB)
    done = relieve(client_of(small), settings, soon(), counts=counts)
    assert done.freed >= 4 * MIB
    assert counts["relief_evicted_chunks"] >= 40
    memory: Any = small.client().info("memory")
    assert memory["used_memory"] < 13 * MIB


def test_one_process_at_a_time_makes_room(small: Server) -> None:
    """While one has the turn others leave it to that one, and the turn is given back."""
    fill(small, "a", 100)
    admin = small.client()
    settings = PrefixCacheConfig(server_max_bytes=5 * MIB)
    admin.set(RELIEVING, "1", px=60_000)
    assert relieve(client_of(small), settings, soon(), counts=Counter()).freed == 0
    admin.delete(RELIEVING)
    assert relieve(client_of(small), settings, soon(), counts=Counter()).freed > 0
    assert not admin.exists(RELIEVING)


def test_a_server_without_a_limit_is_left_alone(any_server: Backend) -> None:
    """Without maxmemory and without a budget nothing is ever taken."""
    if not any_server.is_real:
        pytest.skip("fakeredis has no INFO")
    cache = any_server.open("w1")
    cache.cache_prefix(list(range(40)))
    assert not cache._state.relief.relieve(soon(), is_full=True)
    assert cache.get_metrics()["relief_refused"] == 0


def test_unused_namespaces_are_removed(small: Server) -> None:
    """A namespace that nobody used for as long as its maker said is removed with every key; others stay."""
    fill(small, "unused", 5, namespace_ttl_s=3600)
    fill(small, "kept", 5, namespace_ttl_s=0)
    fill(small, "fresh", 5, namespace_ttl_s=3600)
    admin = small.client()
    leave(admin, "unused", 2)
    leave(admin, "kept", 200)
    assert remove_unused(client_of(small), soon(), Counter()) == 1
    left = {name.decode() for name in admin.scan_iter(match="dp*", count=1000)}
    assert not [name for name in left if "unused" in name]
    assert {name for name, _ in names(small)} == {"kept", "fresh"}


def names(server: Server) -> list[tuple[str, int]]:
    """The registry."""
    enrolled, _ = read_enrolled(client_of(server), soon())
    return [(each.standing.name, each.standing.bytes) for each in enrolled]


def test_a_forged_registry_removes_nothing(small: Server) -> None:
    """Whoever writes another's last use into the registry does not have it removed: its shard says otherwise."""
    fill(small, "mine", 5, namespace_ttl_s=3600)
    admin = small.client()
    admin.zadd(REGISTRY, {"mine": 1})
    admin.zadd(REGISTRY, {"nowhere": 1, "\x1b[31m": 5})
    assert remove_unused(client_of(small), soon(), Counter()) == 0
    assert admin.exists(Keys("mine").meta)


def test_a_namespace_that_comes_to_use_again_is_not_removed(small: Server) -> None:
    """What is used between the look and the removal stays, whatever was seen before."""
    fill(small, "busy", 5)
    assert not remove_namespace(client_of(small), "busy", int(1000 * (time.time() - 3600)), soon())
    assert small.client().exists(Keys("busy").descriptor)


def test_a_process_goes_on_after_its_namespace_was_removed(small: Server) -> None:
    """Who still uses a namespace that was removed makes it anew with the next publish."""
    with PrefixCacheOptimizer(config(small, "a", strict=False)) as cache:
        cache.cache_prefix(list(range(64)), range(4))
        assert remove_namespace(client_of(small), "a", None, soon())
        assert not small.client().keys("dp*{a*")
        cache.cache_prefix(list(range(64)), range(4))
        assert cache.check_integrity().ok
        with PrefixCacheOptimizer(config(small, "a", worker_id="v")) as other:
            assert other.find_longest_cache_hit(list(range(64))).matched_chunks == 4


def test_a_purge_leaves_nothing(small: Server) -> None:
    """Tree, payloads, workers, streams, secret, descriptor, a damaged tree's orphans: no key of it stays, others do."""
    fill(small, "gone", 5, worker_lease_s=30.0)
    fill(small, "gone-2", 5)
    admin = small.client()
    admin.hset(Keys("gone").node("ab" * 16), mapping={"r": b"x" * 16, "p": "cd" * 16})
    admin.set(Keys("gone").payload("ab" * 16), "stray")
    admin.hset(Keys("gone").stream("w/0"), "q", "1")
    done = purge(client_of(small), "gone", soon())
    assert (done.nodes, done.chunks) == (1, 5)
    left = [name.decode() for name in admin.scan_iter(match="dp*", count=1000)]
    assert not [name for name in left if "gone" in name and "gone-2" not in name]
    assert admin.exists(Keys("gone-2").descriptor)
    assert names(small)[0][0] == "gone-2"
    assert purge(client_of(small), "gone", soon()).keys == 0


def test_a_purge_removes_what_another_version_left(small: Server) -> None:
    """A namespace of another schema, which no script of this version touches, is removed by its keys."""
    fill(small, "older", 5)
    admin = small.client()
    admin.hset(Keys("older").meta, "schema", "4")
    admin.hset(Keys("older").descriptor, "schema", "4")
    with pytest.raises(NamespaceError, match="distprefix purge older"):
        fill(small, "older", 5)
    assert purge(client_of(small), "older", soon()).keys > 5
    assert not [name for name in admin.scan_iter(match="dp*", count=1000) if b"older" in name]
    assert fill(small, "older", 5) == 5


def test_cold_payloads_elsewhere_are_purged(small: Server, own_server: Server) -> None:
    """On the server of the cold tier a purge leaves nothing of the namespace either."""
    with PrefixCacheOptimizer(config(small, "a", cold_url=own_server.url, cold_codec="raw")) as cache:
        chain = Chain([os.urandom(16) for _ in range(4)])
        cache.store(chain, [os.urandom(1000)] * 4)
        assert cache.demote(0.0) == 4
    assert own_server.client().dbsize() == 4
    purge(client_of(small), "a", soon())
    assert purge_cold(client_of(own_server), "a", soon()) == 4
    assert own_server.client().dbsize() == 0
