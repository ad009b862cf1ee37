"""Random histories of several workers against a model: holder -> the set of prefixes it has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from distprefix import PrefixCacheOptimizer
from tests.lengths import short_or_long
from tests.servers import Backend

Prefix = tuple[int, ...]
Step = tuple[str, str, Prefix, int]
WORKERS = ("w1", "w2", "w3")
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["publish", "publish", "publish", "look up", "remove", "restart"]),
        st.sampled_from(WORKERS),
        st.lists(st.integers(0, 1), min_size=1, max_size=12).map(tuple),
        st.integers(1, 12),
    ),
    max_size=25,
)


class Model:
    """What each worker has: its prefixes, and a block id for each of them that never changes."""

    def __init__(self) -> None:
        self.has: dict[str, set[Prefix]] = {worker: set() for worker in WORKERS}
        self.blocks: dict[tuple[str, Prefix], int] = {}

    def block(self, worker: str, prefix: Prefix) -> int:
        """The block that a worker keeps the last chunk of a prefix in."""
        return self.blocks.setdefault((worker, prefix), len(self.blocks))

    def ids(self, worker: str, chunks: Prefix) -> list[int]:
        """Blocks of a prompt's chunks."""
        return [self.block(worker, chunks[:i]) for i in range(1, len(chunks) + 1)]

    def publish(self, worker: str, chunks: Prefix) -> None:
        """A worker has a prompt and all its prefixes."""
        self.has[worker] |= {chunks[:i] for i in range(1, len(chunks) + 1)}

    def remove(self, worker: str, prefix: Prefix) -> bool:
        """A worker loses a prefix and all that extends it; whether it had it."""
        had = prefix in self.has[worker]
        self.has[worker] = {other for other in self.has[worker] if other[: len(prefix)] != prefix}
        return had

    def held(self, worker: str, chunks: Prefix) -> int:
        """The longest prefix of a prompt that a worker has."""
        return max((i for i in range(1, len(chunks) + 1) if chunks[:i] in self.has[worker]), default=0)


def tokens(chunks: Prefix) -> list[int]:
    """Two tokens a chunk."""
    return [token for chunk in chunks for token in (chunk, 100 + chunk)]


def check(cache: PrefixCacheOptimizer, model: Model, chunks: Prefix) -> None:
    """A fresh look-up tells exactly the holders of the model and their blocks."""
    wanted = {f"{worker}/0@gpu": held for worker in WORKERS if (held := model.held(worker, chunks))}
    result = cache.find_longest_cache_hit(tokens(chunks))
    assert dict(result.holders) == wanted
    assert result.matched_chunks == max(wanted.values(), default=0)
    for worker in WORKERS:
        found = cache.find_longest_cache_hit(tokens(chunks), blocks_of=f"{worker}/0@gpu").block_ids
        assert list(found) == model.ids(worker, chunks)[: model.held(worker, chunks)]


def play(backend: Backend, open_cache: Callable[[str], PrefixCacheOptimizer], steps: list[Step]) -> None:
    """Do the steps on the caches and on the model, then compare everything."""
    model, caches = Model(), {worker: open_cache(worker) for worker in WORKERS}
    caches["w1"].clear()
    try:
        for action, worker, chunks, length in steps:
            cache = caches[worker]
            if action == "publish":
                cache.cache_prefix(tokens(chunks), model.ids(worker, chunks))
                model.publish(worker, chunks)
            elif action == "look up":
                for reader in caches.values():
                    reader._state.link.refresh()
                check(cache, model, chunks)
                assert (
                    cache.get_computed_blocks(tokens(chunks)) == model.ids(worker, chunks)[: model.held(worker, chunks)]
                )
            elif action == "remove":
                prefix = chunks[:length]
                block = model.block(worker, prefix)
                assert cache.remove_skipped_blocks([block]) == model.remove(worker, prefix)
            else:
                cache.close()
                caches[worker] = open_cache(worker)
                model.has[worker] = set()
        caches["w1"]._state.link.refresh()
        for _, _, chunks, _ in steps:
            check(caches["w1"], model, chunks)
        report = caches["w1"].check_integrity()
        assert report.problems == []
        everything: set[Prefix] = set().union(*model.has.values())
        assert report.chunks >= len(everything)
        if not any(action == "restart" for action, *_ in steps):
            assert report.chunks == len(everything)
    finally:
        for cache in caches.values():
            cache.close()


@short_or_long("examples", 10, 60)
def test_workers_see_what_the_model_says(any_server: Backend, examples: int) -> None:
    """When L1 always asks Redis, results are exactly the model's: holders, lengths, block ids, and final counts."""
    options: dict[str, Any] = {"chunk_size": 2, "max_run": 3, "l1_ttl_s": 0}

    def new(worker: str) -> PrefixCacheOptimizer:
        return PrefixCacheOptimizer(any_server.config(worker, **options), client=any_server.client)

    @settings(max_examples=examples)
    @given(steps=STEPS)
    def check_histories(steps: list[Any]) -> None:
        play(any_server, new, steps)

    check_histories()


@short_or_long("examples", 40, 300)
def test_many_histories_on_one_server(real_server: Backend, examples: int) -> None:
    """The same with more histories on the fastest server, and with runs as long as they like."""
    options: dict[str, Any] = {"chunk_size": 2, "max_run": 256, "l1_ttl_s": 0}

    def new(worker: str) -> PrefixCacheOptimizer:
        return PrefixCacheOptimizer(real_server.config(worker, **options))

    @settings(max_examples=examples)
    @given(steps=STEPS)
    def check_histories(steps: list[Any]) -> None:
        play(real_server, new, steps)

    check_histories()
