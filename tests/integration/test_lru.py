"""The LRU of the shared tree against one written independently, on real traces."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distprefix.replay.trace import read_trace
from tests.integration.test_replay import _TRACES, _replay
from tests.lengths import short_or_long

TRACES = (("mooncake_conversation_b512", 512), ("taubench_airline_b16", 16), ("sharegpt_b16", 16))
SHARES = (1, 5, 10)


def lru_hit_rate(chains: Iterable[Sequence[int]], capacity: int) -> float:
    """Leaf-first LRU one chunk at a time: of all chunks asked for, the share that a cache of so many chunks has.

    Ids stand for all that lies before them, so a chunk's parent is the id before it.
    """
    used: dict[int, int] = {}
    parent: dict[int, int | None] = {}
    children: dict[int, int] = {}
    leaves: list[tuple[int, int]] = []
    asked = hits = 0
    for now, chain in enumerate(chains):
        asked += len(chain)
        hits += next((i for i, chunk in enumerate(chain) if chunk not in used), len(chain))
        for i, chunk in enumerate(chain):
            if chunk not in used:
                parent[chunk] = chain[i - 1] if i else None
                if i:
                    children[chain[i - 1]] = children.get(chain[i - 1], 0) + 1
            used[chunk] = now
        if chain:
            heapq.heappush(leaves, (now, chain[-1]))
        while len(used) > capacity:
            when, chunk = heapq.heappop(leaves)
            if used.get(chunk) != when or children.get(chunk):
                continue
            del used[chunk]
            above = parent.pop(chunk)
            if above is not None:
                children[above] -= 1
                if not children[above]:
                    heapq.heappush(leaves, (used[above], above))
    return hits / asked


@pytest.mark.timeout(600)
@short_or_long("limit", 500, None)
@pytest.mark.parametrize(("name", "block_size"), TRACES)
def test_lru_is_the_reference_on_real_traces(name: str, block_size: int, limit: int | None) -> None:
    """On four nodes with trees of three sizes the hit rate is that of an exact leaf-first LRU, within 0.005."""
    found: list[Path] = sorted(_TRACES.glob(f"{name}*"))
    if not found:
        pytest.skip("the real traces are not here: set PREFIX_TRACES to their folder")
    requests = read_trace(str(found[0]), limit)
    chains = [[i for first, count in request.runs for i in range(first, first + count)] for request in requests]
    unique = len({chunk for chain in chains for chunk in chain})
    options = ["--block-size", str(block_size), "--nodes", "4", "--in-order", "--policy", "lru"]
    if limit:
        options += ["--limit", str(limit)]

    def measured(share: int) -> float:
        return _replay(str(found[0]), *options, "--capacity", f"{share}%")["hit_rate"]

    with ThreadPoolExecutor(2) as pool:  # one request is in flight at a time: each leaves a core to another one
        for share, rate in zip(SHARES, pool.map(measured, SHARES), strict=True):
            wanted = lru_hit_rate(chains, max(1, math.floor(unique * share / 100)))
            assert abs(rate - wanted) < 0.005, f"of {share} % measured {rate}, the reference has {wanted}"
