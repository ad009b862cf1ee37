"""Several processes that publish, evict and look up as hard as they can: nothing wrong, no exception, a budget kept."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import xxhash

from distprefix import Chain, PrefixCacheConfig, PrefixCacheOptimizer
from tests.lengths import short_or_long
from tests.servers import Backend

PROCESSES = 4
LONGEST = 120
BUDGET = 600
ROOT = str(Path(__file__).parents[2])
_WORK = """
import json, sys
settings, seed, seconds = json.loads(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
sys.path.insert(0, sys.argv[4])
from tests.integration.test_budget import work
print(json.dumps(work(settings, seed, seconds)))
"""


def prompts() -> list[Chain]:
    """Prompts that share their beginnings, several times what the budget allows; the same in every process."""
    made, drawn = list[Chain](), random.Random(7)
    for _ in range(20):
        trunk = [drawn.randbytes(16) for _ in range(drawn.randrange(1, 60))]
        for _ in range(6):
            chain, whole = list[bytes](), b"root"
            for chunk in [*trunk, *(drawn.randbytes(16) for _ in range(drawn.randrange(1, LONGEST - len(trunk) + 1)))]:
                whole = xxhash.xxh3_128_digest(whole + chunk)
                chain.append(whole)
            made.append(Chain(chain))
    return made


def blocks(holder: str, prompt: Chain, chunks: int) -> list[int]:
    """The block ids that a worker publishes for a prompt's chunks: nothing but worker, place and content decide."""
    name = holder.encode()
    return [xxhash.xxh32_intdigest(name + prompt.data[16 * i : 16 * i + 16]) for i in range(chunks)]


def work(settings: dict[str, Any], seed: int, seconds: float) -> dict[str, Any]:
    """What one process does until its time is over. Returns what it published, what it was told, and what was wrong."""
    drawn, everything = random.Random(seed), prompts()
    published: dict[int, int] = {}
    told: dict[str, int] = {}
    wrong: list[str] = []
    counts = {"publishes": 0, "lookups": 0, "hits": 0, "asked": 0, "evictions": 0}
    config = PrefixCacheConfig(**settings, worker_id=f"p{seed}")
    until = time.monotonic() + seconds
    with PrefixCacheOptimizer(config) as cache:
        while time.monotonic() < until:
            which = drawn.randrange(len(everything))
            prompt, action = everything[which], drawn.random()
            if action < 0.4:
                length = drawn.randrange(1, len(prompt) + 1)
                cut = Chain([prompt.data[16 * i : 16 * i + 16] for i in range(length)])
                cache.cache_prefix(cut, blocks(config.holder, prompt, length))
                published[which] = max(published.get(which, 0), length)
                counts["publishes"] += 1
            elif action < 0.45:
                cache.maintain()
                counts["evictions"] += 1
            elif action < 0.85:
                result = cache.find_longest_cache_hit(prompt)
                counts["lookups"] += 1
                counts["hits"] += result.hit
                for holder, chunks in result.holders:
                    key = f"{holder} {which}"
                    told[key] = max(told.get(key, 0), chunks)
                if any(chunks > len(prompt) for _, chunks in result.holders):
                    wrong.append(f"{result} of {len(prompt)} chunks")
            else:
                holder = f"p{drawn.randrange(PROCESSES)}/0@gpu"
                result = cache.find_longest_cache_hit(prompt, blocks_of=holder)
                counts["asked"] += len(result.block_ids) > 0
                if list(result.block_ids) != blocks(holder, prompt, len(result.block_ids)):
                    wrong.append(f"block ids of {holder} for prompt {which}")
        metrics = cache.get_metrics()
    counts |= {name: metrics[name] for name in ("publishes_dropped", "evictions_failed", "feed_gaps", "feed_failures")}
    return {"published": published, "told": told, "wrong": wrong, "counts": counts}


def ever_published(results: list[dict[str, Any]]) -> dict[str, int]:
    """For each worker and prompt: how many of the prompt's leading chunks the worker ever published, in any prompt."""
    everything, had = prompts(), dict[str, int]()
    for seed, result in enumerate(results):
        chunks = {
            everything[int(which)].data[16 * i : 16 * i + 16]
            for which, length in result["published"].items()
            for i in range(length)
        }
        for which, prompt in enumerate(everything):
            leading = (prompt.data[16 * i : 16 * i + 16] in chunks for i in range(len(prompt)))
            had[f"p{seed}/0@gpu {which}"] = next((i for i, there in enumerate(leading) if not there), len(prompt))
    return had


@short_or_long("seconds", 3, 40)
def test_under_pressure_nothing_is_wrong_and_the_budget_holds(real_server: Backend, seconds: int) -> None:
    """Four processes at full speed: no exception, no holder or block id that never was, and a shard within bounds."""
    settings: dict[str, Any] = {
        **{"url": real_server.url, "namespace": real_server.namespace, "strict": True, "max_run": 16},
        **{"lookup_timeout_s": 20, "publish_timeout_s": 20},
        **{
            "l2_max_chunks": BUDGET,
            "high_watermark": 1.0,
            "low_watermark": 0.9,
            "l1_ttl_s": 5,
            "feed_interval_s": 0.02,
        },
        **{"touch_interval_s": 0.05, "hot_threshold": 5, "staleness_sample": 0.05},
    }
    command = [sys.executable, "-c", _WORK, json.dumps(settings)]
    processes = [
        subprocess.Popen([*command, str(seed), str(seconds), ROOT], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        for seed in range(PROCESSES)
    ]
    most, samples, admin = 0, 0, real_server.admin
    while any(process.poll() is None for process in processes) and samples < 1000 * seconds:
        held: Any = admin.hget(real_server.keys.meta, "chunks")
        most, samples = max(most, int(held or 0)), samples + 1
        time.sleep(0.002)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES
    results: list[dict[str, Any]] = [json.loads(output) for output in outputs]
    assert [result["wrong"] for result in results] == [[]] * PROCESSES
    had = ever_published(results)
    over = {
        key: (chunks, had[key]) for result in results for key, chunks in result["told"].items() if chunks > had[key]
    }
    assert over == {}
    assert BUDGET // 2 < most <= BUDGET + PROCESSES * LONGEST
    for result in results:
        counts = result["counts"]
        assert [counts[name] for name in ("publishes_dropped", "evictions_failed", "feed_gaps", "feed_failures")] == [
            0
        ] * 4
        assert min(counts[name] for name in ("publishes", "evictions", "hits", "asked")) > 0
    with PrefixCacheOptimizer(PrefixCacheConfig(**settings, worker_id="reader")) as reader:
        reader.maintain()
        report = reader.check_integrity()
        assert report.problems == []
        assert report.chunks <= BUDGET
