"""Several processes at once: the tree that they leave is exactly the model's."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import xxhash

from distprefix import Chain, PrefixCacheConfig, PrefixCacheOptimizer
from tests.servers import Backend, Server

_PUBLISH = """
import json, random, sys
from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
settings, seed, max_run = json.loads(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
sys.path.insert(0, sys.argv[4])
from tests.integration.test_processes import prompts
wrong = 0
with PrefixCacheOptimizer(PrefixCacheConfig(**settings, worker_id=f"p{seed}", max_run=max_run)) as cache:
    for prompt in prompts(seed):
        before = cache.find_longest_cache_hit(prompt).matched_chunks
        cache.cache_prefix(prompt)
        after = cache.find_longest_cache_hit(prompt).matched_chunks
        wrong += after != len(prompt) or before > len(prompt)
sys.exit(wrong)
"""


def prompts(seed: int) -> list[Chain]:
    """Overlapping prompts: all processes draw from the same small set of branches."""
    shared, own = random.Random(1), random.Random(seed)
    branches = [[shared.randbytes(16) for _ in range(shared.randrange(1, 40))] for _ in range(12)]
    made: list[Chain] = []
    for _ in range(120):
        chain = [bytes(16)]
        for branch in [branches[0], *own.choices(branches, k=own.randrange(4))]:
            # A chunk hash covers what lies before it: the same branch elsewhere has other hashes.
            for chunk in branch:
                chain.append(xxhash.xxh3_128_digest(chain[-1] + chunk))
        made.append(Chain(chain[: own.randrange(1, len(chain) + 1)]))
    return made


def test_concurrent_publishers_leave_the_models_tree(real_server: Backend) -> None:
    """Four processes publish overlapping prompts at once: every prefix is there, nothing else, nothing is broken."""
    settings: dict[str, Any] = {
        "url": real_server.url,
        "namespace": real_server.namespace,
        "strict": True,
    }
    settings |= {"lookup_timeout_s": 20, "publish_timeout_s": 20}
    root = str(Path(__file__).parents[2])
    processes = [
        subprocess.Popen([sys.executable, "-c", _PUBLISH, json.dumps(settings), str(seed), "8", root], cwd=root)
        for seed in range(4)
    ]
    assert [process.wait(timeout=60) for process in processes] == [0, 0, 0, 0]
    model = {prompt.data[: 16 * k] for seed in range(4) for prompt in prompts(seed) for k in range(1, len(prompt) + 1)}
    with PrefixCacheOptimizer(PrefixCacheConfig(**settings, worker_id="reader", max_run=8)) as reader:
        report = reader.check_integrity()
        assert report.problems == []
        assert report.chunks == len(model)
        for seed in range(4):
            for prompt in prompts(seed):
                hit = reader.find_longest_cache_hit(prompt)
                assert hit.matched_chunks == len(prompt)
                assert (f"p{seed}/0@gpu", len(prompt)) in hit.holders


def test_threads_that_publish_after_a_flush_attach_once(own_server: Server) -> None:
    """When the namespace is flushed under eight publishing threads, one new epoch is taken and nothing is lost."""
    config = PrefixCacheConfig(url=own_server.url, worker_id="w", touch_interval_s=0, publish_timeout_s=20, strict=True)
    made = [list(range(1000 * i, 1000 * i + 32)) for i in range(8)]
    with PrefixCacheOptimizer(config) as cache, PrefixCacheOptimizer(replace(config, worker_id="reader")) as reader:
        with own_server.client() as admin:
            admin.flushall()
            epoch = cache.get_metrics()["epoch"]
        with ThreadPoolExecutor(8) as threads:
            list(threads.map(cache.cache_prefix, made))
        assert cache.get_metrics()["epoch"] > epoch
        assert cache.get_metrics()["history_lost"] == {"gone": 1}
        assert [reader.find_longest_cache_hit(prompt).matched_tokens for prompt in made] == [32] * 8


def test_hits_are_counted_once(real_server: Backend) -> None:
    """An entry counts each hit once, whether Redis has heard of it or not."""
    tokens = list(range(16))
    real_server.open("w1").cache_prefix(tokens)
    cache = real_server.open("w2", l1_ttl_s=0)
    counts: list[int] = []
    for _ in range(4):
        entry = cache.find_longest_cache_hit(tokens).entry
        assert entry is not None
        counts.append(entry.access_count)
        cache.flush()
    assert counts == [1, 2, 3, 4]


def test_a_publish_with_retractions_waiting_keeps_its_deadline(own_server: Server) -> None:
    """With Redis frozen, taking back many prefixes and publishing end with one deadline each; later all is sent."""
    config = PrefixCacheConfig(
        url=own_server.url,
        worker_id="w",
        chunk_size=4,
        touch_interval_s=0,
        publish_timeout_s=0.3,
        breaker_failures=1000,
    )
    with PrefixCacheOptimizer(config) as cache:
        for i in range(10):
            cache.cache_prefix(list(range(100 * i, 100 * i + 8)), [2 * i, 2 * i + 1])
        own_server.freeze()
        began = time.monotonic()
        assert cache.remove_skipped_blocks(range(20)) == 20
        cache.cache_prefix(list(range(8)), [50, 51])
        took = time.monotonic() - began
        own_server.thaw()
        assert took < 2  # two deadlines, not eleven
        assert cache.get_metrics()["publishes_dropped"] == 1
        cache.flush()
        assert cache.get_metrics()["retractions_waiting"] == 0
        report = cache.check_integrity()
        assert (report.problems, report.chunks) == ([], 0)
