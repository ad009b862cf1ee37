"""`distprefix namespaces` as a user runs it, and what the other commands say when they find nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.identity import Identity, parts_of_text
from distprefix.redis.inspect import namespaces
from distprefix.redis.keys import Keys
from distprefix.redis.namespaces import NamespaceSummary, summarize_namespaces
from tests.cli.test_cli import run_cli
from tests.servers import Backend, Server, deployed, find_server, users_acl

_IDENTITY = Identity("vllm 0.32", "org/Llama-8B", "main", "bfloat16", "32 layers; 8 heads", 4, "tp 0/1", "sha256")
_SETTINGS: dict[str, Any] = {
    "engine": _IDENTITY.engine,
    "model": _IDENTITY.model,
    "weights": _IDENTITY.weights,
    "dtype": _IDENTITY.dtype,
    "layout": _IDENTITY.layout,
}


@pytest.fixture
def server() -> Iterator[Server]:
    """A server without any namespace."""
    server = Server(find_server("valkey-9.1")).start()
    yield server
    server.stop()


@pytest.fixture
def admin(server: Server) -> Iterator[redis.Redis]:
    """A client that may do anything there."""
    with server.client() as client:
        yield client


def _open(url: str, namespace: str, **settings: Any) -> PrefixCacheOptimizer:
    defaults: dict[str, Any] = {
        "worker_id": "w1",
        "chunk_size": 4,
        "feed_interval_s": 0,
        "touch_interval_s": 0,
        "lookup_timeout_s": 20.0,
        "publish_timeout_s": 20.0,
        "payload_timeout_s": 20.0,
    }
    chosen: dict[str, Any] = {**defaults, "url": url, "namespace": namespace, **settings}
    return PrefixCacheOptimizer(PrefixCacheConfig(**chosen))


def _listed(url: str, *, code: int = 0) -> list[dict[str, Any]]:
    result = run_cli("namespaces", "--url", url, "--json")
    assert result.returncode == code, result.stderr
    return json.loads(result.stdout)


def _accessed_ms(admin: Any, node: bytes) -> int:
    return int(admin.hget(node, "a"))


def _by_name(admin: redis.Redis) -> dict[str, NamespaceSummary]:
    return {each.name: each for each in summarize_namespaces(admin)}


def test_namespaces_are_listed(server: Server, admin: redis.Redis) -> None:
    """Name, model, dtype, block size, chunks, bytes by tier, live and known workers, last use; as a table and JSON."""
    prompt = list(range(32))
    with _open(server.url, "kv-llama", **_SETTINGS, worker_lease_s=600) as leased:
        with _open(server.url, "kv-llama", **_SETTINGS, worker_id="w2", cold_codec="raw") as cache:
            cache.cache_prefix(prompt)
            cache.store(prompt[:16], [bytes(1000)] * 4)
            assert cache.demote(0.0) == 4
            cache.store(prompt[:16], [bytes(1000)] * 4)
            cache.promote(prompt[:16])
        leased.cache_prefix(prompt)
        with _open(server.url, "mine", fingerprint="my model, fp8") as empty:
            assert empty.config.namespace == "mine"
        llama, mine = _listed(server.url)
        text = run_cli("namespaces", "--url", server.url).stdout
    assert (llama["name"], llama["model"], llama["dtype"], llama["chunk_size"]) == (
        *("kv-llama", "org/Llama-8B", "bfloat16", 4),
    )
    meta: Any = admin.hgetall(Keys("kv-llama").meta)
    assert (llama["chunks"], llama["bytes"]) == (8, int(meta[b"bytes"]))
    assert (llama["warm_bytes"], llama["cold_bytes"]) == (int(meta[b"warm"]), int(meta[b"cold"]))
    assert llama["warm_bytes"] + llama["cold_bytes"] >= 4000
    assert (llama["live_workers"], llama["known_workers"]) == (1, 2)
    nodes: Any = admin.scan_iter(match=Keys("kv-llama").node("*"))
    assert llama["last_used_ms"] >= max(_accessed_ms(admin, node) for node in nodes)
    assert (mine["model"], mine["dtype"], mine["chunks"]) == ("my model, fp8", None, 0)
    assert mine["last_used_ms"] >= int(admin.hget(Keys("mine").meta, "used") or 0) > 0  # pyright: ignore[reportArgumentType]
    assert all(word in text for word in ("kv-llama", "org/Llama-8B", "bfloat16", "1 of 2", " ago", "my model"))
    assert "\x1b" not in text


def test_last_use_is_that_of_the_nodes_not_their_scores(server: Server, admin: redis.Redis) -> None:
    """Pins and policies move leaves in the order of eviction; the last use stays that of the nodes."""
    with _open(server.url, "n") as cache:
        cache.cache_prefix(list(range(32)))
        keys = Keys("n")
        used = _by_name(admin)["n"].last_used_ms
        cache.pin(list(range(32)))
        leaves: Any = admin.zrange(keys.leaves, 0, -1)
        admin.zadd(keys.leaves, dict.fromkeys(leaves, 9e15))
        assert _by_name(admin)["n"].last_used_ms == used


def test_ended_leases_do_not_count(server: Server, admin: redis.Redis) -> None:
    """A rank whose lease has ended is known, and not live."""
    with _open(server.url, "n", worker_lease_s=600):
        assert (_by_name(admin)["n"].live_workers, _by_name(admin)["n"].known_workers) == (1, 1)
        admin.zadd(Keys("n").workers, {"w1/0": 1000})
        assert (_by_name(admin)["n"].live_workers, _by_name(admin)["n"].known_workers) == (0, 1)


def test_keys_of_others_are_passed_over(server: Server, admin: redis.Redis) -> None:
    """Damaged descriptors, other types and names that no namespace has neither raise nor show."""
    with _open(server.url, "good") as cache:
        cache.cache_prefix(list(range(16)))
    admin.set("dp:ns:text", "x")
    admin.hset("dp:ns:empty", "a", "b")
    admin.hset("dp:ns:size", mapping={"schema": "1", "chunk_size": "four"})
    admin.hset("dp:ns:no name\x1b[2J", mapping={"schema": "1", "chunk_size": "4"})
    admin.hset(b"dp:ns:\xff", mapping={"schema": "1", "chunk_size": "4"})
    admin.hset("dp:ns:bytes", mapping={"schema": b"\xff", "chunk_size": "4", "identity": b"\xff"})
    for key in (Keys("bytes").meta, Keys("bytes").epochs, Keys("bytes").workers, Keys("bytes").leaves):
        admin.rpush(key, "x")
    assert [each["name"] for each in _listed(server.url)] == ["bytes", "good"]
    assert "good" in run_cli("namespaces", "--url", server.url).stdout
    for command in (("stats",), ("tree",), ("top",), ("workers",), ("node", "0" * 32), ("maintain", "--repair")):
        result = run_cli(*command, "--url", server.url, "--namespace", "size")
        assert (result.returncode, "good" in result.stderr) == (1, True), (command, result.stderr)
        assert "dp:ns:size describes no namespace" in result.stderr
    for name in ("empty", "text"):
        assert run_cli("stats", "--url", server.url, "--namespace", name).returncode == 1


def test_a_server_without_namespaces_says_so(server: Server) -> None:
    """Exit code 1, an empty list as JSON, and a hint where the server is a private one."""
    assert _listed(server.url, code=1) == []
    result = run_cli("namespaces", "--url", server.url)
    assert (result.returncode, result.stdout) == (1, "")
    assert "this server has no namespaces" in result.stderr
    assert "name yours with --url" in run_cli("namespaces").stderr


@pytest.mark.parametrize("user", ["operator", "inspector"])
def test_limited_users_may_list(tmp_path: Path, user: str) -> None:
    """Operators and inspectors see the same list; a worker lists no keys of the server, and is told so."""
    with deployed(tmp_path, find_server("valkey-9.1")) as port:
        with _open(f"redis://distprefix:distprefix@127.0.0.1:{port}", "n", worker_lease_s=600) as cache:
            cache.cache_prefix(list(range(16)))
            (found,) = _listed(f"redis://{user}:{user}@127.0.0.1:{port}")
            refused = run_cli("namespaces", "--url", f"redis://distprefix:distprefix@127.0.0.1:{port}")
            assert (refused.returncode, "permission" in refused.stderr) == (3, True)
        assert (found["name"], found["chunks"], found["live_workers"]) == ("n", 4, 1)
        assert found["last_used_ms"] > 0


def test_commands_that_are_refused_show_as_nothing(tmp_path: Path) -> None:
    """With a user that may only read descriptors, what cannot be read is 0 and nothing raises."""
    acl = tmp_path / "users.acl"
    acl.write_text(
        users_acl() + "user few on nopass ~dp:* -@all +ping +hello +scan +time +hmget\nuser all on nopass ~* &* +@all\n"
    )
    server = Server(find_server("valkey-9.1"), "--aclfile", str(acl))
    server.log_in_as("all", "x")
    server.start()
    try:
        with _open(f"unix://all:x@{server.socket}", "n") as cache:
            cache.cache_prefix(list(range(16)))
        (found,) = _listed(f"unix://few:x@{server.socket}")
        assert (found["chunks"], found["known_workers"], found["last_used_ms"] > 0) == (4, 0, True)
    finally:
        server.stop()


def test_calls_for_a_namespace_are_bounded(server: Server, admin: redis.Redis) -> None:
    """However many leaves the tree has, a namespace costs no more than 134 commands besides the SCAN and the TIME."""
    with _open(server.url, "n", max_cached_sequences=10_000) as cache:
        for i in range(200):
            cache.cache_prefix([i] * 16)

    def commands() -> int:
        stats: Any = admin.info("stats")
        return stats["total_commands_processed"]

    before = commands()
    (found,) = summarize_namespaces(admin)
    scanned = -(-int(admin.dbsize()) // 1000) + 1
    assert found.chunks == 800
    assert commands() - before <= scanned + 1 + 6 + 64 + 2  # TIME, two pipelines, DBSIZE and INFO


def test_finding_nothing_names_the_namespaces(real_server: Backend) -> None:
    """A command that finds nothing in its namespace says on standard error which others there are."""
    real_server.open("w1").cache_prefix(list(range(16)))
    url, empty = real_server.url or "", f"{real_server.namespace}-empty"
    with _open(url, empty):
        real_server.admin.delete(Keys(empty).epochs)
        names = {name for name in namespaces(real_server.admin) if name.startswith(real_server.namespace)}
        assert names == {real_server.namespace, empty}
        cases: list[tuple[int, tuple[str, ...], str]] = [
            (1, ("lookup", "-"), "nothing of this prompt"),
            (0, ("tree",), "an empty tree"),
            (0, ("stats",), "an empty tree"),
            (0, ("top",), "an empty tree"),
            (0, ("workers",), "no workers"),
            (1, ("workers", "--drop", "w9"), "no worker 'w9'"),
            (1, ("node", "0" * 32), "no node"),
        ]
        for code, command, reason in cases:
            result = run_cli(*command, "--url", url, "--namespace", empty, stdin="1 2 3 4")
            assert (result.returncode, reason in result.stderr) == (code, True), (command, result.stderr)
            assert "namespaces of this server: " in result.stderr
        for command in (("lookup", "-"), ("node", "0" * 32), ("maintain", "--repair")):
            missing = run_cli(*command, "--url", url, "--namespace", "absent", stdin="1 2 3 4")
            assert (missing.returncode, "there is no namespace 'absent'" in missing.stderr) == (1, True), command
            assert "there are: " in missing.stderr
        found = run_cli("stats", "--url", url, "--namespace", real_server.namespace)
        assert (found.returncode, found.stderr) == (0, "")


def test_many_namespaces_are_not_all_named(server: Server, admin: redis.Redis) -> None:
    """Eight are named; of more the message says how many and which command lists them."""
    for i in range(8):
        admin.hset(f"dp:ns:n{i}", mapping={"schema": "1", "chunk_size": "4"})
    few = run_cli("stats", "--url", server.url, "--namespace", "x").stderr
    assert few.strip() == "error: there is no namespace 'x'; there are: " + ", ".join(f"n{i}" for i in range(8))
    admin.hset("dp:ns:n8", mapping={"schema": "1", "chunk_size": "4"})
    many = run_cli("stats", "--url", server.url, "--namespace", "x").stderr
    assert many.strip().endswith("n7 and 1 more, see `distprefix namespaces`")
    assert "n8" not in many


def test_identities_are_read_as_they_are_written() -> None:
    """Every part of an identity that is known comes back, with separators in it too; other text has no parts."""
    parts = parts_of_text(_IDENTITY.text)
    assert (parts["engine"], parts["model"], parts["dtype"]) == ("vllm 0.32", "org/Llama-8B", "bfloat16")
    assert (parts["layout"], parts["chunk_size"]) == ("32 layers; 8 heads", "4")
    assert not set(parts) & {"salt", "request_salt", "lora"}
    for text in ("", "my model", "model=a; dtype=b", "[]", '{"model": 5}', "\xff"):
        assert parts_of_text(text) == {}
