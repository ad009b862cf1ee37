"""What fails is what is off: reads, writes and payloads of each server apart, said by health, on again by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.redis import client as control
from distprefix.redis import data as data_path
from tests.contract.test_find import prompt
from tests.faults import Relay, refuse_writes, signals, silent, wait_until
from tests.payloads import ALWAYS, data, loaded
from tests.servers import Server, find_server

PAYLOAD_S = 0.5
MARGIN_S = 0.4
"""For the scheduler of a busy machine: less than a second deadline would take."""
KNOWN = prompt(6)
RIGHT = data(KNOWN)


def settings(server: Server | Relay, **changes: Any) -> PrefixCacheConfig:
    """Short deadlines, nothing in the background, and a breaker that lets nothing through once it is open."""
    defaults: dict[str, Any] = {
        "url": server.url,
        "worker_id": "w1",
        "chunk_size": 4,
        "lookup_timeout_s": 2.0,
        "publish_timeout_s": 0.3,
        "payload_timeout_s": PAYLOAD_S,
        "l1_ttl_s": 0,
        "touch_interval_s": 0,
        "feed_interval_s": 0,
        "breaker_reset_s": 0.1,
    }
    return PrefixCacheConfig(**{**defaults, **changes})


def is_published(cache: PrefixCacheOptimizer, tokens: list[int]) -> bool:
    """Whether Redis took a publish."""
    before = cache.get_metrics()["publishes_dropped"]
    cache.cache_prefix(tokens)
    return cache.get_metrics()["publishes_dropped"] == before


def is_answered(cache: PrefixCacheOptimizer, chunks: int = 6) -> bool:
    """Whether Redis answered a look-up of what is known, and with all of it."""
    before = cache.get_metrics()["redis_failures"]
    found = cache.find_longest_cache_hit(KNOWN)
    is_well = cache.get_metrics()["redis_failures"] == before
    return is_well and (found.redis_calls, found.matched_chunks) == (1, chunks)


def is_stored(cache: PrefixCacheOptimizer, tokens: list[int]) -> bool:
    """Whether all payloads of a prompt are stored."""
    return cache.store(tokens, data(tokens)) == len(tokens) // 4


def seconds_of(action: Callable[[], object]) -> float:
    """What an action takes."""
    began = time.monotonic()
    action()
    return time.monotonic() - began


def is_ok(cache: PrefixCacheOptimizer) -> bool:
    """Whether everything works, as health says and as the metrics do."""
    closed = set(cache.get_metrics()["breakers"].values()) == {"closed"}
    assert bool(cache.health()) == cache.health().ok
    return cache.health().ok and closed


def off(cache: PrefixCacheOptimizer) -> tuple[str, ...]:
    """What is off, as health says and as the metrics do."""
    breakers = cache.get_metrics()["breakers"]
    assert cache.health().off == tuple(name for name, state in breakers.items() if state != "closed")
    return cache.health().off


@pytest.fixture
def cold_server() -> Iterator[Server]:
    """A second server that keeps its data when it is killed."""
    options = ("--appendonly", "yes", "--appendfsync", "always")
    server = Server(find_server("valkey-9.1"), *options, tcp=True).start()
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("how", "cause", "payload_cause"),
    [("misconf", "misconf", "misconf"), ("noreplicas", "noreplicas", "noreplicas"), ("pause", "timeout", "timeout")],
)
def test_only_writes_are_off(own_server: Server, how: str, cause: str, payload_cause: str) -> None:
    """A server that refuses or pauses writes answers look-ups and loads; writes are dropped and counted by cause."""
    with PrefixCacheOptimizer(settings(own_server)) as cache:
        assert is_stored(cache, KNOWN)
        cache.cache_prefix(KNOWN)
        assert is_ok(cache)
        with refuse_writes(own_server, how):
            for _ in range(6):
                assert not is_published(cache, [7] * 8)
                assert cache.store([8] * 8, data([8] * 8)) == 0
                assert is_answered(cache)
                assert cache.find_stored(KNOWN) == 6
                assert loaded(cache, KNOWN) == RIGHT
            metrics = cache.get_metrics()
            assert off(cache) == ("write", "warm_write")
            assert metrics["publishes_dropped"] == 6
            assert metrics["stores_failed"] == 6
            assert metrics["redis_failures"][cause] >= 3
            assert metrics["payload_failures_warm"][payload_cause] >= 1
        wait_until(lambda: is_published(cache, [7] * 8) and is_stored(cache, [8] * 8))
        assert is_ok(cache)


def test_a_report_of_evidence_keeps_the_deadline(own_server: Server) -> None:
    """A load that finds a payload gone ends with its deadline, where the tree does not take the report of it."""
    with PrefixCacheOptimizer(settings(own_server, publish_timeout_s=20.0)) as cache, own_server.client() as admin:
        assert is_stored(cache, KNOWN)
        admin.delete(*admin.keys("*:kv:*"))  # pyright: ignore[reportGeneralTypeIssues]
        with refuse_writes(own_server, "pause"):
            assert seconds_of(lambda: cache.load(KNOWN)) < PAYLOAD_S + MARGIN_S
            assert cache.get_metrics()["trims_failed"] == 1
        assert loaded(cache, KNOWN) == []
        assert cache.get_metrics()["payloads_trimmed"] == 6


def test_only_walks_are_off(own_server: Server) -> None:
    """Where scripts that read are refused, look-ups are off and publishes go on."""
    with PrefixCacheOptimizer(settings(own_server)) as cache, own_server.client() as admin:
        admin.execute_command("ACL", "SETUSER", "default", "-evalsha_ro")
        for _ in range(4):
            cache.find_longest_cache_hit(KNOWN)
            assert is_published(cache, KNOWN)
        assert off(cache) == ("walk",)
        assert cache.get_metrics()["redis_failures"]["permission"] == 3
        admin.execute_command("ACL", "SETUSER", "default", "+evalsha_ro")
        wait_until(lambda: is_answered(cache))
        assert is_ok(cache)


def test_only_reads_of_payloads_are_off(own_server: Server) -> None:
    """A warm server that is silent to reads costs one load its deadline; all else goes on meanwhile."""
    with (
        Relay(own_server.port) as relay,
        PrefixCacheOptimizer(settings(relay, breaker_reset_s=3600)) as cache,
    ):
        assert is_stored(cache, KNOWN)
        relay.forgets_after = b"\r\n$3\r\nGET\r\n"
        assert seconds_of(lambda: cache.load(KNOWN)) < PAYLOAD_S + MARGIN_S
        assert off(cache) == ("warm_read",)
        for number in range(4):
            assert loaded(cache, KNOWN) == []
            assert is_stored(cache, [9, number] * 4)
            assert is_published(cache, KNOWN)
            assert cache.find_stored(KNOWN) == 6
            assert is_answered(cache)
        assert off(cache) == ("warm_read",)
        assert cache.get_metrics()["payload_failures_warm"] == {"silent": 1, "timeout": 1, "off": 4}


def _away(server: Server, how: str) -> AbstractContextManager[object]:
    """A server is frozen, or its port takes connections and never answers, or its port drops them."""
    if how == "frozen":
        server.freeze()
        return nullcontext()
    server.kill()
    return silent(server.port, accepts=how == "accepts")


def _bring_back(server: Server, how: str) -> None:
    if how == "frozen":
        server.thaw()
    else:
        server.start()


@pytest.mark.parametrize("in_background", [True, False])
@pytest.mark.parametrize("how", ["frozen", "accepts", "drops"])
def test_a_cold_server_is_silent(own_server: Server, cold_server: Server, how: str, in_background: bool) -> None:
    """The first load pays its deadline at most, the next ones end at once; warm goes on; a probe turns it on again."""
    interval_s = 0.05 if in_background else 0
    warm = [5] * 20
    with PrefixCacheOptimizer(settings(own_server, cold_url=cold_server.url, feed_interval_s=interval_s)) as cache:
        assert is_stored(cache, KNOWN)
        wait_until(lambda: cache.demote(ALWAYS) > 0)
        assert is_stored(cache, warm)
        with _away(cold_server, how):
            assert seconds_of(lambda: cache.load(KNOWN)) < PAYLOAD_S + MARGIN_S
            assert "cold_read" in off(cache)
            for _ in range(5):
                assert loaded(cache, KNOWN) == []
                assert loaded(cache, warm) == data(warm)
                assert is_stored(cache, warm)
                assert is_published(cache, KNOWN)
            assert set(off(cache)) <= {"cold_read", "cold_write"}
            failures = cache.get_metrics()["payload_failures_cold"]
            assert failures["off"] >= 1
            if in_background:
                assert not cache._tiers.payloads.cold.pool.probes_itself  # pyright: ignore[reportOptionalMemberAccess]
        _bring_back(cold_server, how)
        if in_background:
            wait_until(lambda: is_ok(cache))  # without a call of ours
        wait_until(lambda: loaded(cache, KNOWN) == RIGHT)
        wait_until(lambda: cache.demote(ALWAYS) >= 0 and is_ok(cache))


@pytest.mark.parametrize("how", ["accepts", "drops"])
def test_a_cold_server_is_silent_when_a_cache_opens(own_server: Server, how: str) -> None:
    """A cache opens without its cold server, and all that needs none works."""
    with (
        silent(accepts=how == "accepts") as port,
        PrefixCacheOptimizer(settings(own_server, cold_url=f"redis://127.0.0.1:{port}")) as cache,
    ):
        assert is_stored(cache, KNOWN)
        assert loaded(cache, KNOWN) == RIGHT
        assert is_published(cache, KNOWN)


def _forget_idle(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    """A balancer forgot every connection, and all of them rested long."""
    relay.forget()
    monkeypatch.setattr(control, "_FRESH_S", 0.0)
    monkeypatch.setattr(control, "_STALE_S", 0.0)
    monkeypatch.setattr(data_path, "_STALE_S", 0.0)


def in_threads(work: Callable[[], object], count: int = 4) -> None:
    """Do something in several threads at once, so that as many connections are kept."""
    barrier = threading.Barrier(count)

    def begin() -> None:
        barrier.wait()
        work()

    threads = [threading.Thread(target=begin) for _ in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("kind", ["load", "store", "look-up", "publish"])
def test_forgotten_connections_cost_one_probe(own_server: Server, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """After a pause in which a balancer forgot all connections, the first call loses a short probe and is done."""
    with Relay(own_server.port) as relay, PrefixCacheOptimizer(settings(relay, publish_timeout_s=2.0)) as cache:
        calls: dict[str, Callable[[], bool]] = {
            "load": lambda: loaded(cache, KNOWN) == RIGHT,
            "store": lambda: is_stored(cache, [threading.get_ident() % 10**6] * 8),
            "look-up": lambda: cache.find_longest_cache_hit(KNOWN).matched_chunks == 6,
            "publish": lambda: is_published(cache, KNOWN),
        }
        call = calls[kind]
        assert is_stored(cache, KNOWN)
        in_threads(call)
        before = cache.get_metrics()
        _forget_idle(relay, monkeypatch)
        if kind == "store":
            cache.clear()  # by connections of its own, and there is something to store
            assert is_stored(cache, KNOWN)
        assert [call() for _ in range(6)] == [True] * 6
        metrics = cache.get_metrics()
        silent_data = metrics["payload_failures_warm"].get("silent", 0)
        silent_control = metrics["redis_failures"].get("silent connection", 0)
        assert silent_data == (kind in ("load", "store"))
        assert silent_control <= 2  # of the connections for look-ups and of those for publishes
        assert before["redis_failures"] == {}
        assert set(metrics["redis_failures"]) <= {"silent connection"}
        assert is_ok(cache)


def test_a_timeout_ends_idle_connections(own_server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that waits in vain costs one deadline, however many connections rested beside it."""
    changes: dict[str, Any] = {"breaker_failures": 10_000, "lookup_timeout_s": 0.5}  # a longer failure opens it at once
    with Relay(own_server.port) as relay, PrefixCacheOptimizer(settings(relay, **changes)) as cache:
        cache.cache_prefix(KNOWN)
        monkeypatch.setattr(control, "_STALE_S", 3600.0)  # no probe
        in_threads(lambda: cache.find_longest_cache_hit(KNOWN))
        relay.forget()
        cache.find_longest_cache_hit(KNOWN)
        for _ in range(6):
            assert is_answered(cache)
        assert cache.get_metrics()["redis_failures"] == {"timeout": 1}


@pytest.mark.parametrize("in_main_thread", [True, False])
@pytest.mark.parametrize("kind", ["load", "store", "look-up", "publish"])
def test_signals_do_not_stretch_deadlines(own_server: Server, kind: str, in_main_thread: bool) -> None:
    """With a signal every 10 ms a call on a frozen server ends with its deadline."""
    changes: dict[str, Any] = {"payload_timeout_s": 0.5, "lookup_timeout_s": 0.5, "publish_timeout_s": 0.5}
    with PrefixCacheOptimizer(settings(own_server, **changes)) as cache:
        assert is_stored(cache, KNOWN)
        cache.cache_prefix(KNOWN)
        calls: dict[str, Callable[[], object]] = {
            "load": lambda: cache.load(KNOWN),
            "store": lambda: cache.store([8] * 8, data([8] * 8)),
            "look-up": lambda: cache.find_longest_cache_hit(KNOWN),
            "publish": lambda: cache.cache_prefix([8] * 8),
        }
        own_server.freeze()
        took: list[float] = []
        ready = threading.Event()

        def work() -> None:
            ready.wait()
            took.append(seconds_of(calls[kind]))

        if in_main_thread:
            ready.set()
            with signals(threading.get_ident()):
                work()
        else:
            worker = threading.Thread(target=work)
            worker.start()
            assert worker.ident is not None
            with signals(worker.ident):
                ready.set()
                worker.join()
        assert took[0] < 0.5 + MARGIN_S
        own_server.thaw()
