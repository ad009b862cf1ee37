"""A publish that does not fit its deadline: what was in time is published, the rest is counted and comes later."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from distprefix import PrefixCacheOptimizer, operations, publisher
from distprefix.errors import UnavailableError
from tests.servers import Backend

WINDOW = operations.WINDOW


def tokens(chunks: int) -> Any:
    """A prompt of so many chunks."""
    return np.arange(4 * chunks, dtype=np.uint32)


def told(backend: Backend, prompt: Any) -> int:
    """How much of a prompt others are told that "a" has."""
    reader = backend.open("reader")
    return dict(reader.find_longest_cache_hit(prompt).holders).get("a/0@gpu", 0)


def refuse_after(cache: PrefixCacheOptimizer, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the deadline pass after so many calls that insert."""
    client = cache._state.link.publishes
    call = client.call
    left = [calls]

    def limited(script: str, meta: str, args: tuple[Any, ...], deadline: float) -> Any:
        if script == "insert":
            left[0] -= 1
            if left[0] < 0:
                raise UnavailableError("the deadline passed")
        return call(script, meta, args, deadline)

    monkeypatch.setattr(client, "call", limited)


@pytest.mark.parametrize("windows", [1, 2])
def test_what_was_in_time_is_published(real_server: Backend, monkeypatch: pytest.MonkeyPatch, windows: int) -> None:
    """The leading windows count for all, also when strict; the rest is counted, and the next publish sends just it."""
    prompt = tokens(3 * WINDOW)
    cache = real_server.open("a")
    with monkeypatch.context() as patch:
        refuse_after(cache, windows, patch)
        name = cache.cache_prefix(prompt, range(3 * WINDOW), {"a": 1})
    metrics = cache.get_metrics()
    assert (metrics["publishes_cut"], metrics["publishes_dropped"]) == (1, 0)
    assert metrics["chunks_unpublished_by"] == {"hashing": 0, "redis": (3 - windows) * WINDOW}
    assert told(real_server, prompt) == windows * WINDOW
    assert cache.get_computed_blocks(prompt) == list(range(3 * WINDOW))
    before = metrics["redis_calls_publish"]
    assert cache.cache_prefix(prompt, range(3 * WINDOW), {"a": 1}) == name
    assert cache.get_metrics()["redis_calls_publish"] - before <= 4 - windows
    assert told(real_server, prompt) == 3 * WINDOW
    assert cache.get_metrics()["publishes_cut"] == 1
    assert cache.check_integrity().problems == []


def test_what_was_not_told_is_taken_back_as_well(real_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of the part that was left out, or told in the last call, are removed like others."""
    prompt = tokens(2 * WINDOW)
    cache = real_server.open("a")
    with monkeypatch.context() as patch:
        refuse_after(cache, 1, patch)
        cache.cache_prefix(prompt, range(2 * WINDOW))
    assert cache.remove_skipped_blocks([WINDOW + 7]) == 1
    assert len(cache.get_computed_blocks(prompt)) == WINDOW + 7
    assert cache.remove_skipped_blocks([100]) == 1
    cache.flush()
    assert told(real_server, prompt) == 100
    assert cache.check_integrity().problems == []


def test_moved_blocks_of_the_rest_are_named_by_nobody(real_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a publish with other blocks is cut, Redis does not go on to name the old ones."""
    prompt = tokens(2 * WINDOW)
    cache = real_server.open("a")
    cache.cache_prefix(prompt, range(2 * WINDOW))
    with monkeypatch.context() as patch:
        refuse_after(cache, 1, patch)
        cache.cache_prefix(prompt, [*range(WINDOW + 5), *range(100_000, 100_000 + WINDOW - 5)])
    cache.flush()
    reader = real_server.open("reader")
    found = reader.find_longest_cache_hit(prompt, blocks_of="a/0@gpu")
    own = cache.get_computed_blocks(prompt)
    assert len(own) == 2 * WINDOW
    assert list(found.block_ids) == own[: len(found.block_ids)]
    assert len(found.block_ids) >= WINDOW


def test_hashing_is_bounded(real_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that takes long to hash is hashed for a share of the deadline, and further by each publish."""
    prompt = tokens(4 * WINDOW)
    cache = real_server.open("a", publish_timeout_s=20.0)
    monkeypatch.setattr(publisher, "_HASHING_SHARE", 0.0)
    names: list[str] = []
    for i in range(1, 5):
        names.append(cache.cache_prefix(prompt, range(4 * WINDOW)))
        assert told(real_server, prompt) in (i * WINDOW, min(4, i + 1) * WINDOW)
        if told(real_server, prompt) == 4 * WINDOW:
            break
    metrics = cache.get_metrics()
    assert metrics["publishes_cut"] == len(names) - 1
    assert metrics["chunks_unpublished_by"]["hashing"] > 0
    assert len(set(names)) == len(names)
    assert cache.check_integrity().problems == []


def test_a_million_chunks_keep_the_deadline(real_server: Backend) -> None:
    """A publish of a million chunks ends near its deadline, and each further one brings the prompt on."""
    prompt = np.arange(1_000_000, dtype=np.uint32)
    config = {"chunk_size": 1, "publish_timeout_s": 1.0, "strict": False}
    cache = real_server.open("a", **config)
    reader = real_server.open("reader", chunk_size=1)
    reached = 0
    for _ in range(2):
        began = time.monotonic()
        cache.cache_prefix(prompt, range(1_000_000))
        assert time.monotonic() - began < 3.0
        now = dict(reader.find_longest_cache_hit(prompt).holders).get("a/0@gpu", 0)
        metrics = cache.get_metrics()
        assert now > reached or metrics["publishes_dropped"] or now == 1_000_000
        reached = now
    metrics = cache.get_metrics()
    assert metrics["publishes_cut"] + metrics["publishes_dropped"] == 2 or reached == 1_000_000
