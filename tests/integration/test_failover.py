"""Failovers behind one name, with real servers: old connections end, and all kinds of calls find the new primary."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import UnavailableError
from distprefix.redis import client as control
from tests.contract.test_find import prompt
from tests.faults import Relay, wait_until
from tests.payloads import data, loaded
from tests.servers import Server, find_server

KNOWN = prompt(6)
RIGHT = data(KNOWN)
LEASE_S = 10.0


class Pair:
    """A primary and its replica, and a name that leads to the primary."""

    def __init__(self) -> None:
        binary = find_server("valkey-9.1")
        at_once = ("--repl-diskless-sync-delay", "0")
        self.first = Server(binary, *at_once, tcp=True).start()
        self.second = Server(binary, *at_once, tcp=True).start()
        self.follow(self.second, self.first)
        self.name = Relay(self.first.port)
        self._opened: list[PrefixCacheOptimizer] = []

    def follow(self, server: Server, primary: Server) -> None:
        """Make a server a replica, and wait until it has a copy."""
        with server.client() as admin:
            admin.replicaof("127.0.0.1", str(primary.port))
            wait_until(lambda: _replication(admin)["master_link_status"] == "up")

    def open(self, worker_id: str, **changes: Any) -> PrefixCacheOptimizer:
        """A worker that knows the name only."""
        defaults: dict[str, Any] = {
            "url": self.name.url,
            "worker_id": worker_id,
            "chunk_size": 4,
            "lookup_timeout_s": 2.0,
            "publish_timeout_s": 2.0,
            "payload_timeout_s": 2.0,
            "l1_ttl_s": 0,
            "breaker_reset_s": 0.1,
        }
        cache = PrefixCacheOptimizer(PrefixCacheConfig(**{**defaults, **changes}))
        self._opened.append(cache)
        return cache

    def fail_over(self, *, stale: bool = True) -> None:
        """The replica takes over, the name leads to it, and the old primary follows it with its connections open."""
        with self.first.client() as first, self.second.client() as second:
            wait_until(lambda: _replication(first)["master_repl_offset"] == _replication(second)["slave_repl_offset"])
            second.replicaof("NO", "ONE")
            self.name.target = self.second.port
            if stale:
                self.follow(self.first, self.second)
            else:
                first.config_set("replica-serve-stale-data", "no")
                first.replicaof("127.0.0.1", "1")  # no primary there

    def close(self) -> None:
        """End all of it."""
        for cache in self._opened:
            cache.close()
        self.name.close()
        self.first.stop()
        self.second.stop()


def _replication(admin: Any) -> dict[str, Any]:
    return admin.info("replication")


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two servers behind one name."""
    made = Pair()
    yield made
    made.close()


def is_published(cache: PrefixCacheOptimizer, tokens: list[int]) -> bool:
    """Whether Redis took a publish."""
    before = cache.get_metrics()["publishes_dropped"]
    cache.cache_prefix(tokens)
    return cache.get_metrics()["publishes_dropped"] == before


@pytest.mark.parametrize("stale", [True, False])
def test_all_find_the_new_primary(pair: Pair, stale: bool) -> None:
    """Publishes, stores, loads, look-ups, heartbeats and a reader that only reads are on the new primary soon."""
    worker = pair.open("worker", worker_lease_s=LEASE_S)
    reader = pair.open("reader")
    assert worker.store(KNOWN, RIGHT) == 6
    worker.cache_prefix(KNOWN)
    assert reader.find_longest_cache_hit(KNOWN).matched_chunks == 6
    assert loaded(reader, KNOWN) == RIGHT
    pair.fail_over(stale=stale)
    with pair.open("fresh", url=pair.second.url) as fresh:
        fresh.cache_prefix([7] * 8)
        assert fresh.store([8] * 8, data([8] * 8)) == 2
        wait_until(lambda: reader.find_longest_cache_hit([7] * 8).matched_chunks == 2)
        wait_until(lambda: loaded(reader, [8] * 8) == data([8] * 8))
        assert loaded(reader, KNOWN) == RIGHT
        wait_until(lambda: is_published(worker, [9] * 8))
        wait_until(lambda: worker.store([10] * 8, data([10] * 8)) == 2)
        assert fresh.find_longest_cache_hit([9] * 8).matched_chunks == 2
        assert loaded(fresh, [10] * 8) == data([10] * 8)
        fresh.catch_up()
        leases = {member.name: member.lease_left_s for member in fresh.workers()}
        before = leases["worker/0"]
        assert before is not None
        wait_until(lambda: any(_renewed(member, before) for member in fresh.workers()))
    wait_until(lambda: worker.health().ok and reader.health().ok)
    assert worker.health().roles == {"tree": "master"}
    # What it has found so far it may have read from the old primary, which is a replica of the new one.
    wait_until(lambda: sum(reader.get_metrics()["reconnects"].values()) >= 1)
    assert worker.check_integrity().problems == []


def _renewed(member: Any, before: float) -> bool:
    return member.name == "worker/0" and (member.lease_left_s or 0.0) > before


@pytest.mark.parametrize("stale", [True, False])
def test_refused_calls_alone_find_the_new_primary(pair: Pair, stale: bool) -> None:
    """Without a background thread a refused publish, a refused store or a MASTERDOWN ends the old connections."""
    quiet: dict[str, Any] = {"feed_interval_s": 0, "touch_interval_s": 0}
    publishes, stores = pair.open("publishes", **quiet), pair.open("stores", **quiet)
    assert is_published(publishes, KNOWN)
    assert stores.store(KNOWN, RIGHT) == 6
    pair.fail_over(stale=stale)
    wait_until(lambda: is_published(publishes, [7] * 8))
    wait_until(lambda: stores.store([8] * 8, data([8] * 8)) == 2)
    assert loaded(publishes, [8] * 8) == data([8] * 8)
    assert stores.find_longest_cache_hit([7] * 8).matched_chunks == 2
    causes = publishes.get_metrics()["redis_failures"] | stores.get_metrics()["redis_failures"]
    assert causes["readonly" if stale else "masterdown"] >= 1


def test_another_server_ends_older_connections(pair: Pair) -> None:
    """A new connection that leads to another server ends those that lead to the one before."""
    cache = pair.open("w", feed_interval_s=0, touch_interval_s=0)
    cache.cache_prefix(KNOWN)
    assert cache.store(KNOWN, RIGHT) == 6
    assert cache.find_longest_cache_hit(KNOWN).matched_chunks == 6
    with pair.first.client() as first, pair.second.client() as second:
        wait_until(lambda: _replication(first)["master_repl_offset"] == _replication(second)["slave_repl_offset"])
        second.replicaof("NO", "ONE")
    pair.name.target = pair.second.port  # and the first server stays what it was
    with pair.open("fresh", url=pair.second.url) as fresh:
        fresh.cache_prefix([7] * 8)
        assert cache.find_longest_cache_hit([7] * 8).matched_chunks == 0
        cache._tiers.payloads.warm.pool._drop_idle()
        assert loaded(cache, KNOWN) == RIGHT  # over a new connection
        assert cache.get_metrics()["reconnects"] == {"another server": 1}
        assert cache.find_longest_cache_hit([7] * 8).matched_chunks == 2
        assert is_published(cache, [8] * 8)
        assert fresh.find_longest_cache_hit([8] * 8).matched_chunks == 2
        assert cache.store([9] * 8, data([9] * 8)) == 2
        assert loaded(fresh, [9] * 8) == data([9] * 8)


def test_a_replica_is_never_asked(pair: Pair) -> None:
    """Where the name leads to a replica only, no call is sent to it, however often one is tried; then all is well."""
    cache = pair.open("w", feed_interval_s=0, touch_interval_s=0, breaker_failures=10_000)
    assert is_published(cache, KNOWN)
    with pair.first.client() as first:
        first.replicaof("127.0.0.1", "1")
        assert not is_published(cache, [7] * 8)  # refused: READONLY
        for number in range(1, 6):
            assert cache.find_longest_cache_hit([7] * 8).matched_chunks == 2  # as this process knows
            assert not is_published(cache, [7] * 8)
            assert cache.store([7] * 8, data([7] * 8)) == 0
            assert cache.get_metrics()["redis_failures"] == {"readonly": 1, "replica": 3 * number}
        first.replicaof("NO", "ONE")
    assert is_published(cache, [7] * 8)
    assert cache.store([7] * 8, data([7] * 8)) == 2


def test_a_replica_is_no_url(pair: Pair) -> None:
    """Opening a cache on a replica is an error that says so."""
    pair.name.target = pair.second.port
    with pytest.raises(UnavailableError, match="url leads to a read-only replica: it has to lead to the primary"):
        pair.open("w")


def test_a_replica_is_no_cold_url(pair: Pair) -> None:
    """A cold_url that leads to a replica stores and demotes nothing there, and the tree stays as it is."""
    tree = Server(find_server("valkey-9.1"), tcp=True).start()
    try:
        with PrefixCacheOptimizer(
            PrefixCacheConfig(url=tree.url, cold_url=pair.second.url, worker_id="w", chunk_size=4)
        ) as cache:
            assert cache.store(KNOWN, RIGHT) == 6
            with pytest.raises(UnavailableError, match="cold_url leads to a read-only replica"):
                cache.demote(-60.0)
            assert loaded(cache, KNOWN) == RIGHT
            assert cache.find_stored(KNOWN) == 6
    finally:
        tree.stop()


def test_a_server_that_loads(pair: Pair) -> None:
    """While a server loads its data calls end at once and are counted, nothing is trimmed; then all is as before."""
    cache = pair.open("w", feed_interval_s=0, touch_interval_s=0)
    cache.cache_prefix(KNOWN)
    assert cache.store(KNOWN, RIGHT) == 6
    with pair.first.client() as admin:
        for number in range(3000):
            admin.set(f"filler:{number}", "x" * 100)
        admin.save()
    pair.first.kill()
    pair.first._command += ["--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"]
    pair.first.start()
    while True:
        found = loaded(cache, KNOWN)
        cache.find_longest_cache_hit(KNOWN)
        with contextlib.suppress(Exception), pair.first.client() as admin:
            if not int(admin.info("persistence")["loading"]):
                break
        assert found in ([], RIGHT)
    assert cache.get_metrics()["redis_failures"]["loading"] >= 1
    wait_until(lambda: loaded(cache, KNOWN) == RIGHT)
    wait_until(lambda: is_published(cache, [7] * 8))
    assert cache.get_metrics()["payloads_trimmed"] == 0
    assert cache.find_stored(KNOWN) == 6
    assert cache.check_integrity().problems == []


@pytest.mark.parametrize("denied", ["-role -info", "-role", "-info"])
def test_a_server_that_does_not_say_what_it_is(own_server: Server, denied: str) -> None:
    """A user who may send neither ROLE nor INFO can do all else, and nothing of that counts as a failure for long."""
    with own_server.client() as admin:
        admin.execute_command("ACL", "SETUSER", "w", "on", ">pw", "~*", "&*", "+@all", *denied.split())
    url = f"redis://w:pw@127.0.0.1:{own_server.port}"
    config = PrefixCacheConfig(url=url, worker_id="w", chunk_size=4, feed_interval_s=0.05, publish_timeout_s=2.0)
    with PrefixCacheOptimizer(config) as cache:
        assert cache.store(KNOWN, RIGHT) == 6
        assert is_published(cache, KNOWN)
        assert loaded(cache, KNOWN) == RIGHT
        assert cache.find_longest_cache_hit(KNOWN).matched_chunks == 6
        cache._state.link.check_role()
        cache._state.link.check_role()
        assert cache.get_metrics()["redis_failures"].get("permission", 0) <= 1
        assert cache.health().ok
        role = cache.health().roles["tree"]
        assert role == ("" if denied == "-role -info" else "master")


def test_both_paths_keep_connections_alive(own_server: Server) -> None:
    """TCP keepalive and the user timeout are set on connections of both paths: a dead peer is noticed within 30 s."""
    with PrefixCacheOptimizer(PrefixCacheConfig(url=own_server.url, worker_id="w", chunk_size=4)) as cache:
        cache.store(KNOWN, RIGHT)
        cache.find_longest_cache_hit(KNOWN)
        link = cache._state.link
        sockets: list[socket.socket] = [wire._socket for wire in cache._tiers.payloads.warm.pool._idle]
        for client in (link.lookups, link.publishes):
            assert isinstance(client, control.Client)
            sockets += [connection._sock for connection, _ in client._idle]
        assert len(sockets) >= 3
        for each in sockets:
            assert each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 15
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 5
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 3
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 30_000
