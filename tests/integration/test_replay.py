"""Replays: exact hit rates, on made-up traces and on real ones where they are."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from distprefix.errors import TraceError
from distprefix.replay.trace import ideal_hits, read_trace
from tests.commands import run_cli
from tests.servers import Server

_TRACES = Path(os.environ.get("PREFIX_TRACES") or Path(__file__).parents[3] / "shared" / "traces")
_KEYS = [
    "requests",
    "chunks",
    "unique_chunks",
    "hit_chunks",
    "hit_rate",
    "ideal_hit_rate",
    "l1_hit_chunks",
    "shared_hit_chunks",
    "redis_calls_per_lookup",
    "lookup_p50_us",
    "lookup_p99_us",
    "publish_p50_us",
    "publish_p99_us",
    "redis_bytes_per_chunk",
    "nodes",
    "wall_s",
]


_PAYLOAD_KEYS = [
    *("payload_bytes", "loaded_chunks", "wrong_payloads", "load_tokens_per_s", "store_gb_per_s"),
    *("load_warm_gb_per_s", "load_cold_gb_per_s", "demote_gb_per_s", "cold_ratio"),
]


def _write(folder: Path) -> str:
    rows: list[dict[str, Any]] = []
    for i in range(60):
        session, turn = i % 6, i // 6
        ids = [0, 1, 2, *range(1000 * session + 10, 1000 * session + 13 + 4 * turn)]
        rows.append({"timestamp": i, "input_length": 8 * len(ids), "hash_ids": ids, "session_id": session})
    path = folder / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def _replay(*arguments: str) -> dict[str, Any]:
    result = run_cli("replay", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_sharing_reaches_the_ideal_and_alone_does_not(tmp_path: Path) -> None:
    """In order, nodes that share hit what an unlimited cache would; each alone hits less; the keys are as promised."""
    trace = _write(tmp_path)
    shared = _replay(trace, "--block-size", "8", "--nodes", "3", "--in-order")
    alone = _replay(trace, "--block-size", "8", "--nodes", "3", "--in-order", "--no-share", "--route", "random")
    assert list(shared) == _KEYS
    assert shared["hit_rate"] == shared["ideal_hit_rate"] > alone["hit_rate"] > 0
    assert shared["redis_calls_per_lookup"] <= 1
    assert shared["l1_hit_chunks"] + shared["shared_hit_chunks"] == shared["hit_chunks"]


def test_tokens_and_concurrency_find_the_same(tmp_path: Path) -> None:
    """Driven by tokens a replay hits the same; with requests side by side it never hits more than the ideal."""
    trace = _write(tmp_path)
    tokens = _replay(trace, "--block-size", "8", "--nodes", "2", "--in-order", "--as-tokens", "--route", "session")
    assert tokens["hit_rate"] == tokens["ideal_hit_rate"]
    beside = _replay(trace, "--block-size", "8", "--nodes", "2", "--concurrency", "2", "--limit", "30")
    assert beside["requests"] == 30
    assert 0 < beside["hit_rate"] <= beside["ideal_hit_rate"]


@pytest.mark.parametrize("policy", ["lru", "cost"])
def test_a_capacity_evicts(tmp_path: Path, policy: str) -> None:
    """With a capacity the tree evicts by the policy, hits less, and says how much went."""
    trace = _write(tmp_path)
    arguments = (trace, "--block-size", "8", "--nodes", "2", "--in-order", "--policy", policy)
    figures = _replay(*arguments, "--capacity", "20%")
    assert list(figures) == [*_KEYS, "evicted_chunks"]
    assert 0 < figures["hit_rate"] < figures["ideal_hit_rate"]
    assert figures["unique_chunks"] > figures["evicted_chunks"] - figures["chunks"] > -figures["chunks"]
    assert _replay(*arguments, "--capacity", "1000000")["hit_rate"] == figures["ideal_hit_rate"]


def test_a_restart_is_warm_when_prewarmed(tmp_path: Path) -> None:
    """A node restarted in the middle answers more from its own process when it pre-warmed."""
    arguments = (_write(tmp_path), "--block-size", "8", "--nodes", "2", "--in-order", "--restart-at", "50%")
    cold, warm = _replay(*arguments), _replay(*arguments, "--prewarm")
    assert list(cold) == [*_KEYS, "restart_l1_share"]
    assert warm["restart_l1_share"] > cold["restart_l1_share"]


@pytest.mark.parametrize("elsewhere", [False, True])
def test_payloads_go_through_both_tiers(tmp_path: Path, second: Server, elsewhere: bool) -> None:
    """With payloads every byte comes back right, from the warm and the cold tier, and the report says how fast."""
    arguments = [_write(tmp_path), "--block-size", "8", "--nodes", "2", "--in-order", "--route", "random"]
    arguments += ["--payload-bytes", "20000"]
    if elsewhere:
        arguments += ["--cold-url", second.url]
    figures = _replay(*arguments)
    assert list(figures) == [*_KEYS, *_PAYLOAD_KEYS]
    assert figures["hit_rate"] == figures["ideal_hit_rate"]
    assert figures["wrong_payloads"] == 0 < figures["loaded_chunks"] < figures["hit_chunks"]
    assert figures["cold_ratio"] > 1.1
    assert all(figures[key] > 0 for key in _PAYLOAD_KEYS if key != "wrong_payloads")
    assert list(second.client().scan_iter(match="dp:*replay*")) == []
    assert (
        _replay(*arguments[: -2 if elsewhere else None], "--demote-at", "1000", "--as-tokens").get("cold_ratio") is None
    )


@pytest.mark.parametrize(
    ("option", "value"), [("--capacity", "some"), ("--capacity", "101%"), ("--restart-at", "-1"), ("--policy", "mru")]
)
def test_wrong_shares_and_policies_are_refused(tmp_path: Path, option: str, value: str) -> None:
    """What is no number, no share and no policy is named, with what is allowed."""
    result = run_cli("replay", _write(tmp_path), option, value)
    assert result.returncode == 2
    assert f"{option} is {value!r}" in result.stderr


@pytest.mark.parametrize(
    ("name", "block_size", "limit", "bytes_per_chunk"),
    [
        ("mooncake_conversation_b512", 512, 1500, 75),
        ("sharegpt_b16", 16, 1500, 45),
        ("taubench_airline_b16", 16, 600, 75),
        ("ragpulse_b16", 16, 800, 75),
        ("claude_code_weka_sharedroot_b64", 64, 400, 60),
    ],
)
def test_real_traces_reach_the_ideal(name: str, block_size: int, limit: int, bytes_per_chunk: float) -> None:
    """The first part of a real trace on four nodes hits exactly what an unlimited cache would, in few bytes a chunk."""
    trace = _TRACES / f"{name}.given.jsonl.gz"
    if not trace.exists():
        pytest.skip("the real traces are not here: set PREFIX_TRACES to their folder")
    arguments = ("--block-size", str(block_size), "--nodes", "4", "--in-order", "--limit", str(limit))
    figures = _replay(str(trace), *arguments)
    assert figures["hit_rate"] == figures["ideal_hit_rate"]
    assert figures["redis_bytes_per_chunk"] <= bytes_per_chunk


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no requests"),
        ("hello", "line 1: no JSON"),
        ('{"hash_ids": [1]}\n[1, 2]', "line 2: a request is a JSON object"),
        ('{"timestamp": 1}', "line 1: no hash_ids"),
        ('{"hash_ids": [1, "x"]}', "line 1: block ids are whole numbers"),
        ('{"hash_ids": 7}', "line 1: block ids are whole numbers"),
        ('{"hash_runs": [[1, 0]]}', "line 1: block ids are whole numbers"),
        ('{"hash_ids": [1], "timestamp": "now"}', "line 1: timestamp"),
        ('{"hash_runs": [[1, 99999999999]]}', "line 1: 99999999999 blocks"),
    ],
)
def test_bad_traces_are_refused_with_the_place(tmp_path: Path, text: str, reason: str) -> None:
    """What is no trace is refused with the file, the line and the reason."""
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError, match=reason) as caught:
        read_trace(str(path))
    assert "bad.jsonl" in str(caught.value)


def test_binary_file_is_no_trace(tmp_path: Path) -> None:
    """A damaged gzip file and a binary file are refused, not half read."""
    for content in (b"\x1f\x8b\x08broken", b"\xff\xfe\x00\x01"):
        path = tmp_path / "bad.gz"
        path.write_bytes(content)
        with pytest.raises(TraceError, match=r"bad\.gz"):
            read_trace(str(path))
    with pytest.raises(TraceError, match="absent"):
        read_trace(str(tmp_path / "absent"))


def test_ideal_counts_leading_known_chunks(tmp_path: Path) -> None:
    """The ideal is what lies before the first chunk that nobody asked for earlier."""
    path = tmp_path / "trace"
    path.write_text('{"hash_runs": [[0, 3]]}\n{"hash_ids": [0, 1, 9]}\n{"hash_ids": [0, 1, 9, 8]}\n{"hash_ids": []}')
    assert ideal_hits(read_trace(str(path))) == ([0, 2, 3, 0], 5)
