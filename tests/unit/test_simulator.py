"""The eviction benchmark: its caches against plain ones, its policies against what no policy may do."""

from __future__ import annotations

import importlib
import itertools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprefix.replay.trace import Request

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # a script's folder, no package
simulator: Any = importlib.import_module("simulator")
policies: Any = importlib.import_module("policies")

Chain = tuple[int, ...]
CHAINS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=1, max_size=40)
CAPACITIES = st.integers(1, 12)
POLICIES = sorted(policies.POLICIES)


def workload(chains: Iterable[Chain]) -> Any:
    """The chains as a trace: an id is a chunk's only below the chunks before it."""
    return simulator.Workload.read(
        [Request(10.0 * at, tuple((i, 1) for i in chain), len(chain), 0, "") for at, chain in enumerate(chains)]
    )


def simulate(name: str, chains: Iterable[Chain], capacity: int, after: Callable[[Any], None] | None = None) -> int:
    """Hits of a policy."""
    return simulator.simulate(workload(chains), capacity, policies.POLICIES[name], after)


def prefixes(chain: Chain) -> list[Chain]:
    """Every chunk of a chain, told by all that leads to it."""
    return [chain[:i] for i in range(1, len(chain) + 1)]


def hits(cached: Iterable[Chain], chain: Chain) -> int:
    """Leading chunks that are there."""
    return sum(1 for _ in itertools.takewhile(set(cached).__contains__, prefixes(chain)))


def leaves(cached: Iterable[Chain]) -> list[Chain]:
    """Chunks that no other is below."""
    return sorted(set(cached) - {chunk[:-1] for chunk in cached})


def plain_lru(chains: Iterable[Chain], capacity: int) -> int:
    """Chunk by chunk, with nothing but a dictionary of last uses."""
    used: dict[Chain, int] = {}
    found = 0
    for now, chain in enumerate(chains):
        found += hits(used, chain)
        used.update(dict.fromkeys(prefixes(chain), now))
        while len(used) > capacity:
            del used[min(leaves(used), key=lambda chunk: used[chunk])]
    return found


def best(chains: list[Chain], capacity: int) -> int:
    """The most that any choice of victims finds: all are tried."""
    reached: dict[frozenset[Chain], int] = {frozenset(): 0}
    for chain in chains:
        after: dict[frozenset[Chain], int] = {}
        for cached, found in reached.items():
            for left in shrunk(cached.union(prefixes(chain)), capacity):
                after[left] = max(after.get(left, 0), found + hits(cached, chain))
        reached = after
    return max(reached.values())


def shrunk(cached: frozenset[Chain], capacity: int) -> set[frozenset[Chain]]:
    """Every cache that evicting leaves one by one can leave."""
    caches = {cached}
    for _ in range(len(cached) - capacity):
        caches = {cache - {leaf} for cache in caches for leaf in leaves(cache)}
    return caches


@given(CHAINS)
def test_runs_have_every_chunk_of_every_request(chains: list[Chain]) -> None:
    """The tree of runs has the trace's unique chunks, and each path is as long as its request."""
    tree = workload(chains)
    assert tree.unique_chunks == len({chunk for chain in chains for chunk in prefixes(chain)})
    assert [sum(tree.lengths[run] for run in path) for path in tree.paths] == [len(chain) for chain in chains]


@given(CHAINS, CAPACITIES)
def test_lru_is_that_of_single_chunks(chains: list[Chain], capacity: int) -> None:
    """LRU on runs finds exactly what LRU on chunks does."""
    assert simulate("lru", chains, capacity) == plain_lru(chains, capacity)


@given(CHAINS, CAPACITIES)
def test_nothing_finds_more_than_belady(chains: list[Chain], capacity: int) -> None:
    """Whoever knows the future finds at least as much as every other policy."""
    found = {name: simulate(name, chains, capacity) for name in POLICIES}
    assert max(found.values()) == found["belady"]


@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3).map(tuple), min_size=1, max_size=7), CAPACITIES)
def test_belady_is_the_optimum(chains: list[Chain], capacity: int) -> None:
    """No choice of victims, of all there are, finds more."""
    assert simulate("belady", chains, capacity) == best(chains, capacity)


@pytest.mark.parametrize("name", POLICIES)
@given(CHAINS, CAPACITIES)
def test_the_cache_is_whole_and_within_capacity(name: str, chains: list[Chain], capacity: int) -> None:
    """After every request no chunk is there without its parent, and no more chunks than allowed."""
    tree = workload(chains)

    def check(cache: Any) -> None:
        assert cache.size == sum(cache.held) <= capacity
        for run, parent in enumerate(tree.parents):
            assert not cache.held[run] or parent < 0 or cache.held[parent] == tree.lengths[parent]

    simulate(name, chains, capacity, check)


@pytest.mark.parametrize("name", POLICIES)
@given(CHAINS)
def test_all_is_found_where_all_fits(name: str, chains: list[Chain]) -> None:
    """With room for every chunk, all but their first uses are hits."""
    tree = workload(chains)
    assert simulate(name, chains, tree.unique_chunks) == tree.chunks - tree.unique_chunks


@pytest.mark.parametrize("name", ["arc", "s3fifo"])
@given(CHAINS, CAPACITIES)
def test_queues_count_what_the_cache_has(name: str, chains: list[Chain], capacity: int) -> None:
    """Both queues together are as large as the cache."""
    made: list[Any] = []

    def make(cache: Any) -> Any:
        made.append(policies.POLICIES[name](cache))
        return made[0]

    def check(cache: Any) -> None:
        assert sum(made[0]._sizes) == cache.size
        assert min(made[0]._sizes) >= 0

    simulator.simulate(workload(chains), capacity, make, check)


def test_only_leaves_can_be_evicted() -> None:
    """A cache refuses to lose a run that has children."""
    cache = simulator.Cache(workload([(1,), (1, 2)]), 9)
    cache.insert(0)
    cache.insert(1)
    with pytest.raises(ValueError, match="1 children"):
        cache.evict(0, 1)


def test_hits_outweigh_size() -> None:
    """Of leaves used at the same time the long one that nobody found goes first, and hits take that back."""
    score = policies.cost_score
    assert score(0.0, 0, 0, 256) < score(0.0, 0, 0, 16) < score(0.0, 3, 0, 256) < score(0.0, 100, 0, 256)


def test_a_trace_without_time_counts_requests() -> None:
    """Where all timestamps are equal a request is a millisecond."""
    requests = [Request(5.0, ((1, 2),), 2, 0, ""), Request(5.0, ((1, 1),), 1, 0, "")]
    assert simulator.Workload.read(requests).clock == [0.0, 1.0]
