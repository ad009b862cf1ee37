"""A worker's own blocks through the whole cache: removed, moved, recycled, kept whatever Redis and L1 lose."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from distprefix import Holder, PrefixCacheOptimizer, lookup, outbox
from tests.contract.test_find import prompt
from tests.contract.test_tree import sound
from tests.servers import Backend, Server


def test_removed_blocks_shorten_what_is_found(any_server: Backend) -> None:
    """Taking blocks back ends the worker's coverage there, for itself and for others, and drops what nobody holds."""
    one, two = any_server.open("w1"), any_server.open("w2")
    one.cache_prefix(prompt(10), range(10))
    two.cache_prefix(prompt(6), range(50, 56))
    assert one.remove_skipped_blocks([8, 3, 77]) == 2
    assert one.get_computed_blocks(prompt(10)) == [0, 1, 2]
    assert any_server.open("w3").find_longest_cache_hit(prompt(10)).holders == (
        Holder("w2/0@gpu", 6),
        Holder("w1/0@gpu", 3),
    )
    sound(one, 1, 6)
    assert two.remove_skipped_blocks(range(50, 56)) == 6
    assert one.remove_skipped_blocks([0]) == 1
    assert not any_server.open("w4").find_longest_cache_hit(prompt(10)).hit
    sound(one, 0, 0)


def test_coverage_behind_a_lost_block_goes(any_server: Backend) -> None:
    """Coverage is closed under prefix: a lost block takes all branches behind it, and what nobody covers is removed."""
    one, two = any_server.open("w1", max_run=4), any_server.open("w2", max_run=4)
    one.cache_prefix(prompt(12), range(12))
    one.cache_prefix(prompt(12, tail=6), [*range(6), *range(20, 26)])
    two.cache_prefix(prompt(6))
    sound(one, 6, 18)
    assert one.remove_skipped_blocks([1]) == 1
    sound(one, 2, 6)
    assert one.find_longest_cache_hit(prompt(12)).matched_chunks == 6  # L1 sees a gap, and Redis is asked
    one.cache_prefix(prompt(3), range(3))
    assert any_server.open("w3", max_run=4).find_longest_cache_hit(prompt(12)).holders == (
        Holder("w2/0@gpu", 6),
        Holder("w1/0@gpu", 3),
    )


def test_removal_leaves_siblings_alone(any_server: Backend) -> None:
    """Blocks behind a fork go without touching the other branches."""
    cache = any_server.open()
    cache.cache_prefix(prompt(9), range(9))
    cache.cache_prefix(prompt(9, tail=5), [*range(5), *range(20, 24)])
    assert cache.remove_skipped_blocks([5]) == 1
    reader = any_server.open("w2")
    assert reader.find_longest_cache_hit(prompt(9)).matched_chunks == 5
    assert reader.find_longest_cache_hit(prompt(9, tail=5)).matched_chunks == 9
    sound(cache, 2, 9)


def test_blocks_of_a_prefix_can_move(any_server: Backend) -> None:
    """update_prefix_state gives a published prefix other blocks, and is False for what it does not know."""
    cache = any_server.open()
    name = cache.cache_prefix(prompt(5), range(5))
    assert cache.update_prefix_state(name, range(90, 95))
    assert cache.get_computed_blocks(prompt(5)) == list(range(90, 95))
    result = any_server.open("w2").find_longest_cache_hit(prompt(5), blocks_of="w1/0@gpu")
    assert result.block_ids == tuple(range(90, 95))
    assert cache.remove_skipped_blocks(range(5)) == 0
    assert not cache.update_prefix_state("00" * 16, range(5))


def test_tokens_and_their_chain_name_the_same_blocks(any_server: Backend) -> None:
    """Blocks published with tokens are found, moved and removed by the chain of the same chunks, and the other way."""
    cache = any_server.open("w1")
    chain = cache.chain_of(prompt(4))
    cache.cache_prefix(prompt(4), [1, 2, 3, 4])
    assert cache.get_computed_blocks(chain) == [1, 2, 3, 4]
    cache.cache_prefix(chain, [1, 2, 7, 8])
    assert cache.get_computed_blocks(prompt(4)) == [1, 2, 7, 8]
    assert cache.remove_skipped_blocks([3, 7]) == 1
    assert cache.find_longest_cache_hit(prompt(4)).matched_chunks == 2
    assert cache.find_longest_cache_hit(chain).block_ids == (1, 2)


def test_own_blocks_survive_a_small_l1_and_a_flush(any_server: Backend) -> None:
    """What L1 evicts and Redis loses changes nothing about which blocks this worker has."""
    cache = any_server.open("w1", l1_max_bytes=0)
    cache.cache_prefix(prompt(5), [1, 2, 3, 4, 5])
    assert cache.get_metrics()["l1_chunks"] == 0
    assert cache.get_computed_blocks(prompt(5)) == [1, 2, 3, 4, 5]
    any_server.admin.delete(*any_server.dump())
    assert cache.get_computed_blocks(prompt(5)) == [1, 2, 3, 4, 5]
    cache.cache_prefix(prompt(5), [1, 2, 3, 4, 5])
    reader = any_server.open("w2")
    assert reader.find_longest_cache_hit(prompt(5), blocks_of="w1/0@gpu").block_ids == (1, 2, 3, 4, 5)


def test_a_worker_that_recycles_blocks_takes_the_oldest_back(any_server: Backend) -> None:
    """Over the bound on own chunks the prompt published longest ago goes, here and in Redis."""
    cache = any_server.open("w1", max_own_chunks=8, l1_ttl_s=0)
    for i in range(4):
        cache.cache_prefix([i] * 16, [1, 2, 3, 4])
    assert [len(cache.get_computed_blocks([i] * 16)) for i in range(4)] == [0, 0, 4, 4]
    cache.flush()
    reader = any_server.open("w2")
    assert [reader.find_longest_cache_hit([i] * 16).matched_chunks for i in range(4)] == [0, 0, 4, 4]


def test_a_look_up_beside_a_publish_loses_no_block(real_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look-up that asked Redis before a publish and hears afterwards leaves the published blocks removable."""
    cache = real_server.open("w1", l1_ttl_s=0)
    asked, go_on = threading.Event(), threading.Event()
    ask = lookup._ask

    def slow(*args: Any) -> Any:
        answer = ask(*args)
        asked.set()
        go_on.wait(10)
        return answer

    monkeypatch.setattr(lookup, "_ask", slow)
    thread = threading.Thread(target=cache.find_longest_cache_hit, args=(prompt(4),))
    thread.start()
    asked.wait(10)
    name = cache.cache_prefix(prompt(4), [1, 2, 3, 4])
    go_on.set()
    thread.join()
    monkeypatch.undo()
    assert cache.update_prefix_state(name, [1, 2, 3, 5])
    assert cache.remove_skipped_blocks([2, 4]) == 1
    assert real_server.open("w2").find_longest_cache_hit(prompt(4)).matched_chunks == 1


@pytest.fixture
def failing(own_server: Server) -> Iterator[tuple[Backend, PrefixCacheOptimizer]]:
    """A cache with something published, on a server that the test may stop."""
    backend = Backend("own", own_server.client(), "t", url=own_server.url)
    cache = backend.open(
        "w1", strict=False, publish_timeout_s=0.2, lookup_timeout_s=0.2, breaker_failures=10_000, l1_ttl_s=0
    )
    cache.cache_prefix(prompt(4), [1, 2, 3, 4])
    yield backend, cache
    own_server.thaw()
    backend.close()


def test_blocks_that_moved_unheard_are_named_by_nobody(
    own_server: Server, failing: tuple[Backend, PrefixCacheOptimizer]
) -> None:
    """When Redis cannot be told where blocks went, it hears as soon as it answers that they are not where they were."""
    backend, cache = failing
    name = cache.cache_prefix(prompt(4), [1, 2, 3, 4])
    own_server.freeze()
    assert cache.update_prefix_state(name, [1, 2, 8, 9])
    own_server.thaw()
    cache.flush()
    reader = backend.open("w2")
    assert reader.find_longest_cache_hit(prompt(4), blocks_of="w1/0@gpu").block_ids == (1, 2)
    cache.cache_prefix(prompt(4), [1, 2, 8, 9])
    assert reader.find_longest_cache_hit(prompt(4), blocks_of="w1/0@gpu").block_ids == (1, 2, 8, 9)


def test_too_many_retractions_void_everything_at_once(
    own_server: Server, failing: tuple[Backend, PrefixCacheOptimizer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More than can be kept while Redis is away become a new epoch: nothing that was published before counts."""
    backend, cache = failing
    monkeypatch.setattr(outbox, "_MOST_RETRACTIONS", 3)
    for i in range(5):
        cache.cache_prefix([50 + i] * 4, [50 + i])
    epoch = cache.get_metrics()["epoch"]
    own_server.freeze()
    for i in range(5):
        assert cache.remove_skipped_blocks([50 + i]) == 1
    assert cache.get_metrics()["retractions_overrun"] == 1
    own_server.thaw()
    cache.flush()
    assert cache.get_metrics()["epoch"] > epoch
    reader = backend.open("w2", l1_ttl_s=0)
    assert not any(reader.find_longest_cache_hit([50 + i] * 4).hit for i in range(5))
    assert not reader.find_longest_cache_hit(prompt(4)).hit
    cache.cache_prefix(prompt(4), [1, 2, 3, 4])
    assert reader.find_longest_cache_hit(prompt(4)).matched_chunks == 4


def test_a_damaged_node_does_not_stop_publishing(failing: tuple[Backend, PrefixCacheOptimizer]) -> None:
    """A retraction that Redis refuses for good is counted, and what comes after it is published."""
    backend, cache = failing
    (head,) = [name for name in backend.dump() if ":n:" in name]
    backend.admin.hset(head, "r", b"\0" * 64)
    assert cache.remove_skipped_blocks([3]) == 1
    metrics = cache.get_metrics()
    assert (metrics["retractions_waiting"], metrics["retractions_refused"]) == (0, 1)
    cache.cache_prefix([9] * 8, [7, 8])
    assert backend.open("w2").find_longest_cache_hit([9] * 8).matched_chunks == 2


def test_blocks_are_told_again_after_a_flush(any_server: Backend) -> None:
    """When the background attached anew, block ids that Redis knew before are sent again."""
    cache = any_server.open("w1")
    cache.cache_prefix(prompt(6), range(6))
    any_server.admin.delete(*any_server.dump(), any_server.keys.log)
    cache.flush()
    cache.flush()
    cache.cache_prefix(prompt(6))
    cache.cache_prefix(prompt(6), range(6))
    assert any_server.open("w2").find_longest_cache_hit(prompt(6), blocks_of="w1/0@gpu").block_ids == tuple(range(6))
