"""Several processes at once: the tree that they leave is exactly the model's."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import xxhash

from distprefix import Chain, PrefixCacheConfig, PrefixCacheOptimizer
from tests.servers import Backend

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
        "max_prefix_length": 10**6,
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
