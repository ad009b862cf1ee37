"""The command line as a user runs it: output, JSON, exit codes."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from distprefix.redis.inspect import read_stats
from tests.commands import run_cli
from tests.servers import Backend


@pytest.fixture
def published(real_server: Backend) -> tuple[Backend, str]:
    """A namespace with two prompts that share 8 of 12 chunks; and the first one's hash."""
    cache = real_server.open("w1")
    tokens = list(range(48))
    name = cache.cache_prefix(tokens, metadata={"model": "tiny"})
    real_server.open("w2").cache_prefix([*tokens[:32], *range(100, 116)])
    reader = real_server.open("w1")
    reader.cache_prefix(tokens)
    reader.find_longest_cache_hit(tokens)
    reader.flush()
    return real_server, name


def _json(*arguments: str, stdin: str = "") -> Any:
    result = run_cli(*arguments, "--json", stdin=stdin)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def _where(backend: Backend) -> tuple[str, ...]:
    return ("--url", backend.url or "", "--namespace", backend.namespace)


def _epochs(backend: Backend) -> dict[str, int]:
    """The epoch of each member, as Redis has it."""
    found: Any = backend.admin.hgetall(backend.keys.epochs)
    return {member.decode(): int(epoch) for member, epoch in found.items()}


def test_stats_counts_what_is_there(published: tuple[Backend, str]) -> None:
    """Stats tells nodes, chunks, workers and settings, as a table and as JSON."""
    backend, _ = published
    found = _json("stats", *_where(backend))
    assert (found["nodes"], found["chunks"], found["leaves"], found["roots"]) == (3, 16, 2, 1)
    assert found["workers"] == _epochs(backend)
    assert found["descriptor"]["chunk_size"] == "4"
    text = run_cli("stats", *_where(backend)).stdout
    assert "Valkey 9" in text
    assert "\x1b" not in text


def test_tree_shows_nodes_within_limits(published: tuple[Backend, str]) -> None:
    """Tree shows runs, holders and hits down to a depth, and says how many it left out."""
    backend, _ = published
    found = _json("tree", *_where(backend))
    (root,) = found["children"]
    assert (root["depth"], root["chunks"], len(root["children"])) == (0, 8, 2)
    epochs = _epochs(backend)
    assert root["holders"] == {f"{member}@gpu": {"epoch": epochs[member], "chunks": 8} for member in ("w1/0", "w2/0")}
    cut = _json("tree", *_where(backend), "--depth", "2", "--breadth", "1")
    assert cut["children"][0]["not_shown"] == 1
    text = run_cli("tree", *_where(backend), "--breadth", "1").stdout
    assert "w1/0@gpu" in text
    assert "w2/0@gpu" in text
    assert "1 more" in text


def test_node_is_found_by_any_of_its_chunks(published: tuple[Backend, str]) -> None:
    """Node finds a radix node by its head, its last chunk, and one in the middle."""
    backend, name = published
    leaf = _json("node", name, *_where(backend))
    assert leaf["last"] == name
    assert leaf["metadata"] == {"model": "tiny"}
    assert leaf["hits"] == 1
    assert _json("node", leaf["head"][:12], *_where(backend)) == leaf
    assert _json("node", leaf["head"].upper(), *_where(backend)) == leaf
    assert _json("node", leaf["parent"], *_where(backend))["children"].count(leaf["head"]) == 1
    run: Any = backend.admin.hget(backend.keys.node(leaf["head"]), "r")
    assert _json("node", run[16:32].hex(), *_where(backend)) == leaf
    assert "first 4 of 4 chunks" in run_cli("node", name, *_where(backend)).stdout


def test_lookup_tells_who_holds_a_prompt(published: tuple[Backend, str], tmp_path: Path) -> None:
    """Lookup reads tokens from a file or standard input and tells matched tokens by holder, without taking an epoch."""
    backend, name = published
    path = tmp_path / "tokens.json"
    path.write_text(json.dumps([*range(48), 9]))
    found = _json("lookup", str(path), *_where(backend))
    assert found["matched_tokens"] == 48
    assert found["prefix_hash"] == name
    assert found["holders"] == {"w1/0@gpu": 48, "w2/0@gpu": 32}
    again = _json("lookup", "-", *_where(backend), stdin=" ".join(str(token) for token in range(35)))
    assert again["matched_tokens"] == 32
    assert _json("stats", *_where(backend))["workers"] == _epochs(backend)
    assert "32 of 35 tokens" in run_cli("lookup", "-", *_where(backend), stdin=str(list(range(35)))).stdout


def test_exit_codes_tell_what_went_wrong(published: tuple[Backend, str], tmp_path: Path) -> None:
    """1 is nothing found, 2 wrong input, 3 a Redis that does not answer; the reason goes to standard error."""
    backend, _ = published
    where = _where(backend)
    nowhere = ("--url", f"unix://{tmp_path}/nothing.sock")
    cases: list[tuple[int, str, tuple[str, ...], str]] = [
        (1, "", ("lookup", "-", *where), "7 7 7 7"),
        (1, "no namespace", ("stats", "--url", backend.url or "", "--namespace", "absent"), ""),
        (1, "no node", ("node", "0" * 32, *where), ""),
        (2, "32 hex digits", ("node", "xyz", *where), ""),
        (2, "token 1", ("lookup", "-", *where), "1 two"),
        (2, "no tokens", ("lookup", "-", *where), ""),
        (2, "cannot be read", ("lookup", str(tmp_path / "absent"), *where), ""),
        (2, "must begin with|url is", ("stats", "--url", "http://x"), ""),
        (2, "no requests", ("replay", "-"), ""),
        (2, r"foo\[/x\]", ("stats", "--url", "foo[/x]"), ""),
        (2, "lookup_timeout_s", ("stats", "--url", f"{backend.url}?socket_timeout=5"), ""),
        (2, "database 99", ("tree", "--url", f"{backend.url}?db=99"), ""),
        (1, "name yours with --url", ("stats",), ""),
        (1, "there are: ", ("tree", "--url", backend.url or "", "--namespace", "absent"), ""),
        (2, "one request in flight", ("replay", "-", "--in-order", "--concurrency", "2"), ""),
        (3, "does not answer", ("stats", *nowhere), ""),
        (3, "does not answer", ("tree", *nowhere), ""),
    ]
    for code, reason, arguments, stdin in cases:
        result = run_cli(*arguments, stdin=stdin)
        assert result.returncode == code, (arguments, result.stderr)
        assert re.search(reason, result.stderr), (arguments, result.stderr)
        assert "Traceback" not in result.stderr


def test_lookup_needs_the_salt(real_server: Backend) -> None:
    """A salted namespace is looked up with its salt only."""
    real_server.open("w1", salt="secret").cache_prefix(list(range(8)))
    assert "salt" in run_cli("lookup", "-", *_where(real_server), stdin="0 1 2 3").stderr
    found = _json("lookup", "-", *_where(real_server), "--salt", "secret", stdin="0 1 2 3")
    assert found["matched_tokens"] == 4


def test_top_shows_the_fleet(real_server: Backend) -> None:
    """Top tells what a namespace holds and how its workers do, once or as often as asked."""
    cache = real_server.open("w1", touch_interval_s=0.02, l2_max_chunks=100)
    cache.cache_prefix(list(range(48)))
    cache.find_longest_cache_hit(list(range(48)))
    deadline = time.monotonic() + 10
    while not read_stats(real_server.admin, real_server.keys)["live"].get("w1/0@gpu", {}).get("hits"):
        assert time.monotonic() < deadline, "the worker never told of itself"
        time.sleep(0.02)
    found = _json("top", *_where(real_server))
    assert (found["chunks"], found["live"]["w1/0@gpu"]["hits"]) == (12, 1)
    text = run_cli("top", *_where(real_server), "--count", "2", "--interval", "0.1").stdout
    assert text.count("12 chunks") == 2
    assert "w1/0@gpu" in text
    assert "fleet" in run_cli("stats", *_where(real_server)).stdout
    cache.close()
    assert "no worker has reported" in run_cli("top", *_where(real_server)).stdout


def test_maintain_evicts_and_repairs(published: tuple[Backend, str]) -> None:
    """Maintain brings a namespace within a budget, corrects counts that are off, and asks for either."""
    backend, _ = published
    backend.admin.hincrby(backend.keys.meta, "chunks", 3)
    found = _json("maintain", *_where(backend), "--repair")
    assert (found["chunks"], found["right"]) == (16, True)
    assert found["problems"] == ["meta counts 19 chunks, there are 16"]
    assert _json("maintain", *_where(backend), "--repair")["problems"] == []
    assert _json("maintain", *_where(backend), "--max-chunks", "5")["evicted_chunks"] == 11
    assert _json("stats", *_where(backend))["chunks"] == 5
    assert _json("maintain", *_where(backend), "--max-leaves", "0", "--batch", "1")["evicted_chunks"] == 5
    result = run_cli("maintain", *_where(backend))
    assert (result.returncode, "--max-chunks" in result.stderr) == (2, True)
    assert run_cli("maintain", *_where(backend)[:2], "--namespace", "none", "--repair").returncode == 1


def test_demo_shows_that_sharing_saves(real_server: Backend) -> None:
    """The demo's nodes compute less when they share, and it leaves nothing behind on a server that it was given."""
    found = _json("demo", "--sessions", "4", "--turns", "3", "--nodes", "2", "--url", real_server.url or "")
    assert found["sharing"]["computed"] < found["each node alone"]["computed"]
    small = found["sharing, little room"]
    assert small["evicted"] > 0 == found["sharing"]["evicted"]
    assert small["warm"] > 0
    assert found["sharing"]["wrong"] == 0 < found["sharing"]["loaded"]
    assert found["sharing"]["loaded"] == found["sharing"]["others"] // 16
    assert found["tiers"]["demoted_bytes"] > found["tiers"]["payload_bytes_loaded_cold"] > 0
    assert found["sharing"]["others"] > 0 == found["each node alone"]["others"]
    assert list(real_server.admin.scan_iter(match="dp:*demo*")) == []


def test_embedded_server_is_the_default() -> None:
    """Without a url the demo runs on a server of its own and ends with a table."""
    result = run_cli("demo", "--sessions", "2", "--turns", "2", "--nodes", "2")
    assert result.returncode == 0, result.stderr
    assert "each node alone" in result.stdout
    assert "times fewer tokens" in result.stdout


def test_version_and_help() -> None:
    """Help names every command; the version is the package's."""
    text = run_cli("--help").stdout
    assert all(name in text for name in ("demo", "replay", "stats", "tree", "node", "lookup", "top", "maintain"))
    assert run_cli("--version").stdout.startswith("distprefix 0.")
