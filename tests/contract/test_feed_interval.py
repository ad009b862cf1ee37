"""What L1 trusts when the log was read long ago, as docs/configuration.md says of `feed_interval_s`."""

from __future__ import annotations

import time

import pytest

from distprefix import PrefixCacheOptimizer
from tests.contract.test_find import prompt
from tests.servers import Backend


def _age(cache: PrefixCacheOptimizer, log_s: float, told_s: float) -> None:
    """Let the log have been read, and L1 been told all it knows, so long ago."""
    now = time.monotonic()
    with cache._state.lock:
        cache._state.feed.read_at = now - log_s
        for node in cache._state.l1.iter_nodes():
            assert node.value is not None
            node.value = node.value._replace(at=now - told_s)


@pytest.mark.parametrize("interval_s", [0.1, 0.5, 2.0, 20.0])
def test_l1_is_trusted_for_two_intervals(real_server: Backend, interval_s: float) -> None:
    """L1 answers alone until the log was not read for two intervals, at least a second; then it has to be young."""
    cache = real_server.open("a", feed_interval_s=interval_s, l1_ttl_s=600.0)
    assert cache._background is not None
    cache._background.stop()
    cache.cache_prefix(prompt(4))
    bound_s = max(1.0, 2 * interval_s)
    for log_s, told_s, calls in (
        (0.8 * bound_s, 300.0, 0),
        (1.1 * bound_s, 300.0, 1),
        (1.1 * bound_s, 0.5, 0),
        (1.1 * bound_s, 1.2, 1),
    ):
        _age(cache, log_s, told_s)
        found = cache.find_longest_cache_hit(prompt(4))
        assert (found.matched_chunks, found.redis_calls) == (4, calls), (log_s, told_s)


def test_a_removal_counts_after_one_interval(real_server: Backend) -> None:
    """With an interval above a second, what another worker removed is found until the log is read, and not longer."""
    cache, other = real_server.open("a", feed_interval_s=1.5), real_server.open("b")
    other.cache_prefix(prompt(4), range(4))
    deadline = time.monotonic() + 20
    while not cache._state.feed.is_current(time.monotonic()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert cache.find_longest_cache_hit(prompt(4)).matched_chunks == 4
    other.remove_skipped_blocks([2])
    removed = time.monotonic()
    while cache.find_longest_cache_hit(prompt(4)).matched_chunks > 2:
        assert time.monotonic() < removed + 20
        time.sleep(0.01)
    assert time.monotonic() - removed < 3.0
