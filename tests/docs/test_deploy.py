"""The files of deploy/ load on every kind of server, and the users in them can do what they must and no more."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from redis.backoff import NoBackoff
from redis.exceptions import NoPermissionError
from redis.retry import Retry

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.engines.vllm_plugin import CONNECTOR
from tests.servers import deployed, find_server

ROOT = Path(__file__).parents[2]
USERS = (ROOT / "deploy" / "users.acl").read_text(encoding="utf-8")
# What the Python side sends, next to what the scripts call.
CLIENT = {
    "evalsha",
    "evalsha_ro",
    "expire",
    "hello",
    "hgetall",
    "hincrby",
    "info",
    "ping",
    "role",
    "scan",
    "script|load",
    "smembers",
    "srandmember",
    "type",
    "zcard",
    "zrange",
}
REFUSED = (
    "FLUSHALL",
    "FLUSHDB",
    "CONFIG GET maxmemory",
    "CONFIG SET maxmemory 1",
    "ACL LIST",
    "SHUTDOWN NOSAVE",
    "KEYS *",
    "MONITOR",
    "CLIENT LIST",
    "SCRIPT FLUSH",
    "EVAL return 0",
    "SUBSCRIBE dp:x",
    "HGETALL other",
    "HSET other a b",
    "DEL other",
    "HGETALL dp2:x",
)


@pytest.fixture(scope="module", params=["redis-7.0", "redis-8.2", "valkey-9.1"])
def port(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Run a server in a copy of deploy/, as the first lines of redis.conf say."""
    with deployed(tmp_path_factory.mktemp("deploy"), find_server(request.param)) as number:
        yield number


def _client(port: int, user: str) -> redis.Redis:
    return redis.Redis(port=port, username=user, password=user)


def _commands(user: str) -> set[str]:
    line = next(line for line in USERS.splitlines() if line.startswith(f"user {user} "))
    assert " -@all " in line
    return set(re.findall(r" \+(\S+)", line))


def test_worker_may_send_exactly_what_the_code_sends() -> None:
    """The commands of the user `distprefix` are those of the scripts and of the client."""
    calls: set[str] = set()
    for path in (ROOT / "lua").rglob("*.lua"):
        calls |= {name.lower() for name in re.findall(r"redis\.p?call\('(\w+)'", path.read_text(encoding="utf-8"))}
    assert _commands("distprefix") == calls | CLIENT


def test_cache_works_as_the_limited_user(port: int) -> None:
    """Publish, branch, look up, take back, check and clear, all as `distprefix`, without a failure."""

    def config(worker: str) -> PrefixCacheConfig:
        return PrefixCacheConfig(
            url=f"redis://distprefix:distprefix@127.0.0.1:{port}",
            worker_id=worker,
            chunk_size=4,
            touch_interval_s=0,
            lookup_timeout_s=5,
            publish_timeout_s=5,
            strict=True,
        )

    trunk = list(range(400))
    with PrefixCacheOptimizer(config("a")) as first, PrefixCacheOptimizer(config("b")) as second:
        name = first.cache_prefix(trunk, block_ids=range(100), metadata={"kind": "trunk"})
        second.cache_prefix(trunk[:200] + list(range(1000, 1100)), block_ids=range(75))
        assert second.find_longest_cache_hit(trunk).matched_chunks == 100
        first.find_longest_cache_hit(trunk)
        assert first.update_prefix_state(name, range(100, 200))
        assert second.remove_skipped_blocks([60, 20]) == 2
        first.flush()
        second.flush()
        assert first.check_integrity().problems == []
        first.clear()
        assert first.check_integrity().nodes == 0
        assert first.get_metrics()["redis_failures"] == {}
        assert second.get_metrics()["redis_failures"] == {}


@pytest.mark.parametrize("user", ["distprefix", "inspector"])
@pytest.mark.parametrize("command", REFUSED)
def test_everything_else_is_refused(port: int, command: str, user: str) -> None:
    """Neither user may administer the server, publish and subscribe, or touch keys outside dp:*."""
    with _client(port, user) as client, pytest.raises(NoPermissionError):
        client.execute_command(*(command.split() if not command.startswith("EVAL") else ("EVAL", "return 0", 0)))


def test_script_may_not_touch_other_keys(port: int) -> None:
    """What holds for commands holds inside scripts."""
    with _client(port, "distprefix") as client:
        sha = client.script_load("return redis.call('HGETALL', KEYS[1])")
        assert client.evalsha(sha, 1, "dp:x") == []
        with pytest.raises(NoPermissionError):
            client.evalsha(sha, 1, "other")


@pytest.mark.parametrize("command", ["HSET dp:x a b", "DEL dp:x", "ZADD dp:x 1 a", "SCRIPT LOAD 0", "EVALSHA 0 0"])
def test_inspector_changes_nothing(port: int, command: str) -> None:
    """The user for people only reads."""
    with _client(port, "inspector") as client, pytest.raises(NoPermissionError):
        client.execute_command(*command.split())


def test_nobody_gets_in_without_a_name(port: int) -> None:
    """The default user is off."""
    with (
        redis.Redis(port=port, retry=Retry(NoBackoff(), 0)) as client,
        pytest.raises(redis.RedisError, match=r"[Aa]uthenticat"),
    ):
        client.ping()


def test_redis_evicts_nothing_and_writes_nothing(port: int) -> None:
    """The settings that the tree relies on are in force."""
    with _client(port, "inspector") as client:
        memory, persistence = client.info("memory"), client.info("persistence")
        assert memory["maxmemory_policy"] == "noeviction"
        assert memory["maxmemory"] == 2**30
        assert persistence["aof_enabled"] == 0


def test_engines_of_the_compose_file_are_told_what_the_plug_in_takes() -> None:
    """Its transfer configuration is JSON that names our connector, with settings that a cache has."""
    compose = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
    (told,) = re.findall(r"--kv-transfer-config '(\{.*?\})'", compose, re.DOTALL)
    config = json.loads(told)
    assert (config["kv_connector"], config["kv_role"]) == (CONNECTOR, "kv_both")
    settings = PrefixCacheConfig.from_mapping(config["kv_connector_extra_config"])
    assert settings.url == "redis://distprefix:distprefix@redis:6379"
    assert "+@all" not in USERS
    assert "user distprefix " in USERS
