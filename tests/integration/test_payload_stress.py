"""Two nodes, one of which evicts and moves payloads as fast as it can while the other uses them: no byte is wrong."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import DistPrefixError
from distprefix.redis.integrity import check_payloads
from tests.contract.test_tree import heads
from tests.lengths import short_or_long
from tests.payloads import MIB, data, names
from tests.servers import Backend, Server, find_server

__all__ = ["everything_ends_well"]

BUDGET = 40
ROOT = str(Path(__file__).parents[2])
NEVER = 1e6
_WORK = """
import json, sys
role, settings, seconds = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])
sys.path.insert(0, sys.argv[4])
from tests.integration.test_payload_stress import work
print(json.dumps(work(role, settings, seconds)))
"""
_FAILURES = (
    *("stores_failed", "loads_failed", "promotions_failed", "evictions_failed", "background_errors"),
    *("payloads_damaged", "payloads_unreadable", "payloads_unavailable"),
)


def prompts() -> list[list[int]]:
    """Prompts that share their beginnings, twice what the budget allows; the last one's payloads have two parts."""
    drawn, made = random.Random(3), list[list[int]]()
    for family in range(4):
        trunk = [1000 * family + i for i in range(4 * drawn.randrange(1, 8))]
        for branch in range(4):
            made.append([*trunk, *(10**6 * (branch + 1) + i for i in range(4 * drawn.randrange(1, 6)))])
    return [*made, [7] * 8]


def payloads() -> list[list[bytes]]:
    """The payloads of each prompt, one a chunk: nothing but the chunk decides what they are."""
    *small, big = prompts()
    return [*(data(tokens, 3000) for tokens in small), data(big, 9 * MIB)]


def work(role: str, settings: dict[str, Any], seconds: float) -> dict[str, Any]:
    """What one node does until its time is over. Returns how often, and what was wrong."""
    drawn, counts, wrong = random.Random(role), Counter[str](), list[str]()
    everything = list(zip(prompts(), payloads(), strict=True))
    until = time.monotonic() + seconds
    with PrefixCacheOptimizer(PrefixCacheConfig(**settings, worker_id=role)) as cache:
        while time.monotonic() < until:
            few = 1 if drawn.random() < 0.03 else 0  # of the big ones
            tokens, right = everything[-1] if few else drawn.choice(everything[:-1])
            do = _move if role == "mover" else _use
            try:
                do(cache, drawn, tokens, right, counts, wrong)
            except DistPrefixError as error:
                wrong.append(repr(error))
        metrics = cache.get_metrics()
    counts.update({name: metrics[name] for name in ("demoted_chunks", "promoted_chunks", "evicted_chunks")})
    return {"wrong": wrong[:20], "counts": counts, "failures": {name: metrics[name] for name in _FAILURES}}


def _move(cache: PrefixCacheOptimizer, drawn: random.Random, tokens: list[int], right: list[bytes], *told: Any) -> None:
    """Make cold, make warm, evict, and look at what comes of it."""
    action = drawn.random()
    if action < 0.5:
        cache.demote(idle_s=0)
    elif action < 0.7:
        cache.promote(tokens)
    elif action < 0.8:
        cache.maintain()
    else:
        _load(cache, tokens, right, 0, *told)


def _use(
    cache: PrefixCacheOptimizer,
    drawn: random.Random,
    tokens: list[int],
    right: list[bytes],
    counts: Counter[str],
    wrong: list[str],
) -> None:
    """Look up, lease and load, or store."""
    if drawn.random() < 0.5:
        most = drawn.randrange(1, len(right) + 1)
        cache.store(tokens, right[:most])
        counts["stores"] += 1
        return
    hit = cache.find_longest_cache_hit(tokens)
    counts["hits"] += hit.hit
    if hit.hit:
        with hit.lease(20) as lease:
            least = lease.chunks if lease.active else 0
            counts["leases"] += lease.active
            _load(cache, tokens, right, least, counts, wrong)


def _load(
    cache: PrefixCacheOptimizer,
    tokens: list[int],
    right: list[bytes],
    least: int,
    counts: Counter[str],
    wrong: list[str],
) -> None:
    """Load, and compare every byte; what is leased must come."""
    found = cache.load(tokens).payloads
    counts["loaded"] += len(found)
    if [bytes(payload) for payload in found] != right[: len(found)]:
        wrong.append(f"other bytes in {len(found)} chunks of the prompt with {len(right)}")
    if len(found) < least:
        wrong.append(f"{len(found)} chunks of {least} that were leased")


def everything_ends_well(backend: Backend, cache: PrefixCacheOptimizer, cold: redis.Redis | None = None) -> None:
    """Nothing is left to be done; counts are exact; what the tree names stays, and all else has a TTL."""
    cache.demote(NEVER)
    assert names(backend.admin, backend, "trash") == set()
    assert names(backend.admin, backend, "unsettled") == set()
    assert cache.check_integrity().problems == []
    assert check_payloads(backend.admin, backend.keys, cold) == []
    for name in names(backend.admin, backend, "moving:"):
        assert backend.admin.pttl(backend.keys.base + name) != -1


@pytest.fixture
def second() -> Iterator[Server]:
    """A server for cold payloads."""
    server = Server(find_server("valkey-9.1")).start()
    yield server
    server.stop()


@pytest.mark.timeout(300)
@short_or_long("seconds", 3, 40)
@pytest.mark.parametrize("tier", ["here", "elsewhere"])
def test_under_pressure_no_byte_is_wrong(real_server: Backend, second: Server, tier: str, seconds: int) -> None:
    """A node that stores and loads what another one evicts and moves: no error, right bytes, leases kept, no leak."""
    settings: dict[str, Any] = {
        **{"url": real_server.url, "namespace": real_server.namespace, "strict": True, "max_run": 6, "chunk_size": 4},
        **{"lookup_timeout_s": 20, "publish_timeout_s": 20, "payload_timeout_s": 20},
        **{"l2_max_chunks": BUDGET, "high_watermark": 1.0, "low_watermark": 0.5, "l1_ttl_s": 5},
        **{"feed_interval_s": 0.02, "touch_interval_s": 0.05, "cold_timeout_s": 0.0, "demote_interval_s": 0.1},
        **({"cold_url": second.url} if tier == "elsewhere" else {}),
    }
    if tier == "elsewhere":
        seconds = max(3, seconds // 3)
    nodes = [
        subprocess.Popen(
            [sys.executable, "-c", _WORK, role, json.dumps(settings), str(seconds), ROOT],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for role in ("mover", "user")
    ]
    outputs = [node.communicate(timeout=60 + 2 * seconds)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0]
    mover, user = map(json.loads, outputs)
    assert (mover["wrong"], user["wrong"]) == ([], [])
    assert [any(each["failures"].values()) for each in (mover, user)] == [False] * 2, (mover, user)
    counts = Counter(mover["counts"]) + Counter(user["counts"])
    wanted = ("stores", "hits", "leases", "loaded", "demoted_chunks", "promoted_chunks", "evicted_chunks")
    assert min(counts[name] for name in wanted) > 0, counts
    settings |= {"demote_interval_s": 0, "touch_interval_s": 0, "feed_interval_s": 0}
    cold = second.client() if tier == "elsewhere" else None
    with PrefixCacheOptimizer(PrefixCacheConfig(**settings, worker_id="reader")) as reader:
        reader.maintain()
        everything_ends_well(real_server, reader, cold)
        assert 0 < reader.check_integrity().chunks <= BUDGET
        for tokens, right in zip(prompts(), payloads(), strict=True):
            found = reader.load(tokens).payloads
            assert [bytes(payload) for payload in found] == right[: len(found)]
            assert len(found) == reader.find_longest_cache_hit(tokens).matched_chunks
            assert len(heads(tokens)) == len(right)
