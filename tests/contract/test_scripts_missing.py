"""Workers that may not load scripts: what they do on a server that lacks them, and that they recover by themselves."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import redis

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import ScriptsMissingError
from distprefix.redis.provision import load_scripts
from distprefix.redis.rights import Role, User, hash_password
from distprefix.redis.scripts import SCRIPTS, load_script
from tests.commands import run_cli
from tests.contract.test_find import prompt
from tests.faults import wait_until
from tests.servers import Server, find_server

TEN = prompt(10)


@pytest.fixture(scope="module", params=["redis-7.0", "redis-8.2", "valkey-9.1"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with a worker for every namespace, whose password is ``worker``."""
    started = Server(find_server(request.param), tcp=True).start()
    with started.client() as client:
        user = User("worker", Role.WORKER, ("*",), hash_password("worker"))
        client.execute_command("ACL", "SETUSER", user.name, *user.rules)
    yield started
    started.stop()


@pytest.fixture
def admin(server: Server) -> Iterator[redis.Redis]:
    """May load scripts. The server has all of them when a test begins."""
    with server.client() as client:
        client.flushall()
        load_scripts(client)
        yield client


def _open(server: Server, namespace: str, **settings: object) -> PrefixCacheOptimizer:
    url = f"redis://worker:worker@127.0.0.1:{server.port}"
    defaults = {
        "chunk_size": 4,
        "touch_interval_s": 0,
        "feed_interval_s": 0,
        "breaker_reset_s": 0.05,
        "l1_max_bytes": 0,
    }
    times = {"l1_max_bytes": 0, "lookup_timeout_s": 5.0, "publish_timeout_s": 5.0}
    given: dict[str, object] = {"url": url, "namespace": namespace, "worker_id": "w", **defaults, **times, **settings}
    return PrefixCacheOptimizer(PrefixCacheConfig.from_mapping(given))


def _failures(cache: PrefixCacheOptimizer) -> dict[str, int]:
    return cache.get_metrics()["redis_failures"]


def test_lookups_are_misses_until_the_scripts_are_there(
    server: Server, admin: redis.Redis, namespace: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Without scripts look-ups miss and publishes are dropped, counted and logged once; then all goes on by itself."""
    with _open(server, namespace) as cache:
        cache.cache_prefix(TEN)
        assert cache.find_longest_cache_hit(TEN).matched_chunks == 10
        assert _failures(cache) == {}
        admin.script_flush()
        with caplog.at_level(logging.WARNING, "distprefix"):
            for _ in range(3):
                assert cache.find_longest_cache_hit(TEN).matched_chunks == 0
                cache.cache_prefix(prompt(20))
        lines = [record.getMessage() for record in caplog.records if "distprefix provision" in record.getMessage()]
        assert len(lines) == 1
        assert _failures(cache)["no script"] == 6
        assert set(cache.health().off) >= {"walk", "write"}
        assert cache.get_metrics()["publishes_dropped"] == 3
        assert load_scripts(admin) > 0
        wait_until(lambda: cache.find_longest_cache_hit(TEN).matched_chunks == 10)
        wait_until(lambda: bool(cache.cache_prefix(prompt(20))) and not cache.health().off)
        assert cache.find_longest_cache_hit(prompt(20)).matched_chunks == 20


def test_strict_callers_are_told_what_to_run(server: Server, admin: redis.Redis, namespace: str) -> None:
    """With strict=True the error names the command; it is raised as long as scripts are missing, and no longer."""
    with _open(server, namespace, strict=True, breaker_failures=1000) as cache:
        cache.cache_prefix(TEN)
        admin.script_flush()
        for _ in range(2):
            with pytest.raises(ScriptsMissingError, match="distprefix provision"):
                cache.find_longest_cache_hit(TEN)
        load_scripts(admin)
        assert cache.find_longest_cache_hit(TEN).matched_chunks == 10


def test_opening_says_what_to_run(server: Server, admin: redis.Redis, namespace: str) -> None:
    """A cache does not open on a server that lacks the scripts, and neither does a command work; both say why."""
    admin.script_flush()
    with pytest.raises(ScriptsMissingError, match="distprefix provision"):
        _open(server, namespace)
    load_scripts(admin)
    _open(server, namespace).close()
    admin.script_flush()
    done = run_cli("workers", "--url", f"redis://worker:worker@127.0.0.1:{server.port}", "--namespace", namespace)
    assert done.returncode == 3
    assert "error: The server does not know our scripts" in done.stderr
    assert "does not answer" not in done.stderr


def test_one_missing_script_stops_only_what_needs_it(server: Server, admin: redis.Redis, namespace: str) -> None:
    """After an upgrade of the package alone, calls whose scripts did not change go on."""
    with _open(server, namespace) as cache:
        cache.cache_prefix(TEN)
        admin.script_flush()
        for name in SCRIPTS:
            if name != "insert":
                admin.script_load(load_script(name).body)
        cache.cache_prefix(prompt(20))
        assert cache.find_longest_cache_hit(TEN).matched_chunks == 10
        assert cache.find_longest_cache_hit(prompt(20)).matched_chunks == 10
        assert _failures(cache)["no script"] == 1


def test_a_user_that_may_load_needs_no_provisioning(server: Server, admin: redis.Redis, namespace: str) -> None:
    """Who has the right loads what is missing, on the way, without a failure."""
    with _open(server, namespace, url=f"redis://127.0.0.1:{server.port}", strict=True) as cache:
        cache.cache_prefix(TEN)
        admin.script_flush()
        assert cache.find_longest_cache_hit(TEN).matched_chunks == 10
        assert _failures(cache) == {}
