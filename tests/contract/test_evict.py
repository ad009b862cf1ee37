"""The shared tree within its budget: leaf first, tail first, by its policy; leased and hot prefixes stay."""

from __future__ import annotations

import time
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer, operations
from distprefix.errors import NamespaceError
from distprefix.redis.repair import repair
from tests.contract.test_find import prompt
from tests.servers import Backend

EXACT: dict[str, Any] = {"high_watermark": 1.0, "low_watermark": 1.0, "hot_threshold": 1_000_000, "l1_ttl_s": 0}


def found(cache: PrefixCacheOptimizer, *prompts: list[int]) -> list[int]:
    """Chunks found of each prompt, without changing the order of eviction."""
    hits = [cache.find_longest_cache_hit(each).matched_chunks for each in prompts]
    cache._state.outbox.touches.take()
    return hits


def publish_at(backend: Backend, cache: PrefixCacheOptimizer, tokens: list[int], now_ms: int) -> None:
    """Publish, and date what was used by it as if the server's clock had been there."""
    view = cache._state.read(tokens)
    hashes = cache._state.hashes(view, cache._state.l1.find(view, 0.0))
    operation = operations.publish(
        hashes, 0, cache.config.holder, cache._state.link.epoch, max_run=cache.config.max_run
    )
    admin: Any = backend.admin
    for one in cache._state.link.publish(operation).views:
        head = hashes[16 * one.start : 16 * one.start + 16].hex()
        accessed = int(admin.hget(backend.keys.node(head), "a"))
        if accessed > 1_000_000_000_000:  # dated by the server, not by this test before
            admin.hset(backend.keys.node(head), "a", now_ms)
            score = admin.zscore(backend.keys.leaves, head)
            if score is not None:
                admin.zadd(backend.keys.leaves, {head: score - accessed + now_ms})


def test_the_tail_used_longest_ago_goes_first(any_server: Backend) -> None:
    """Over its budget the tree loses just as many chunks as it must, from the tail of the oldest leaf."""
    cache = any_server.open("w1", l2_max_chunks=12, **EXACT)
    for i in range(2):
        publish_at(any_server, cache, [i] * 20, 1000 + i)
    cache.cache_prefix([2] * 20)
    assert found(cache, [0] * 20, [1] * 20, [2] * 20) == [2, 5, 5]
    cache.cache_prefix([3] * 20)
    assert found(cache, [0] * 20, [1] * 20, [2] * 20, [3] * 20) == [0, 2, 5, 5]
    report = cache.check_integrity()
    assert (report.problems, report.chunks) == ([], 12)
    assert cache.get_metrics()["evicted_chunks"] == 8


def test_a_parent_inherits_the_newer_time(any_server: Backend) -> None:
    """A parent that becomes a leaf is as young as its youngest child was, though only that was touched."""
    cache = any_server.open("w1", l2_max_chunks=9, **EXACT)
    publish_at(any_server, cache, prompt(3), 1000)
    publish_at(any_server, cache, prompt(3, tail=1), 1001)
    publish_at(any_server, cache, [9] * 12, 1500)
    publish_at(any_server, cache, prompt(5), 2000)
    cache.cache_prefix([8] * 12)
    assert found(cache, [9] * 12, prompt(5), prompt(3, tail=1)) == [1, 5, 1]
    assert cache.check_integrity().ok


def test_bytes_and_sequences_are_budgets_too(any_server: Backend) -> None:
    """A bound on bytes or on leaves is kept like one on chunks."""
    cache = any_server.open("w1", max_cached_sequences=3, **EXACT)
    for i in range(6):
        cache.cache_prefix([i] * 40)
    assert sum(found(cache, *([i] * 40 for i in range(6)))) == 30
    any_server.open("w2", l2_max_bytes=2000, **EXACT).maintain()
    report = cache.check_integrity()
    assert report.ok
    assert 1 <= report.nodes <= 2
    assert report.bytes <= 2000


def test_leased_prefixes_stay_until_the_lease_ends(any_server: Backend) -> None:
    """A lease protects the whole path, through a split too, and what is not leased goes in its place."""
    cache, other = any_server.open("w1", l2_max_chunks=10, **EXACT), any_server.open("w2", l2_max_chunks=1, **EXACT)
    cache.cache_prefix(prompt(8))
    lease = cache.find_longest_cache_hit(prompt(6)).lease(60)
    assert (lease.active, lease.chunks) == (True, 6)
    cache.cache_prefix(prompt(8, tail=4))
    other.maintain()
    assert found(cache, prompt(6))[0] == 6
    lease.release()
    assert not lease.active
    other.maintain()
    assert found(cache, prompt(8)) == [1]
    assert cache.check_integrity().ok


def test_a_lease_ends_by_itself(any_server: Backend) -> None:
    """When its time is over a lease protects nothing any more."""
    cache = any_server.open("w1", **EXACT)
    cache.cache_prefix(prompt(4))
    lease = cache.find_longest_cache_hit(prompt(4)).lease(0.001)
    any_server.open("w2", l2_max_chunks=1, **EXACT).maintain()
    assert cache.check_integrity().chunks in (1, 4)  # the clocks of some servers stand still within a millisecond
    while cache.check_integrity().chunks != 1:
        any_server.open("w3", l2_max_chunks=1, **EXACT).maintain()
    assert not lease.active
    lease.release()


def test_a_lease_of_what_is_gone_is_not_active(any_server: Backend) -> None:
    """A lease taken after the prefix went says so and raises nothing."""
    cache = any_server.open("w1", l1_ttl_s=600)
    cache.cache_prefix(prompt(4))
    hit = cache.find_longest_cache_hit(prompt(4))
    any_server.open("w2").clear()
    lease = hit.lease(5)
    assert (lease.active, lease.chunks) == (False, 0)
    assert cache.get_metrics()["leases_failed"] == 1


def test_hot_prefixes_go_last(any_server: Backend) -> None:
    """A node with enough hits outlives what was used after it."""
    cache = any_server.open("w1", l2_max_chunks=10, **{**EXACT, "hot_threshold": 2})
    publish_at(any_server, cache, [1] * 20, 1000)
    for _ in range(2):
        cache.find_longest_cache_hit([1] * 20)
    cache.flush()
    for i in range(2, 5):
        time.sleep(0.002)  # leaves of the same millisecond have no order
        cache.cache_prefix([i] * 20)
    assert found(cache, [1] * 20, [2] * 20, [3] * 20, [4] * 20) == [5, 0, 0, 5]


def test_one_policy_a_namespace(any_server: Backend) -> None:
    """Who wants another order of eviction than the namespace has is refused."""
    any_server.open("w1", policy="cost")
    with pytest.raises(NamespaceError, match="policy is 'cost' there and 'lru' here"):
        any_server.open("w2")


def test_the_cost_policy_keeps_what_is_deep_and_hit(any_server: Backend) -> None:
    """Under `cost` a prefix with hits outlives one that was published a little later."""
    cache = any_server.open("w1", l2_max_chunks=10, policy="cost", **EXACT)
    cache.cache_prefix([1] * 20)
    for _ in range(3):
        cache.find_longest_cache_hit([1] * 20)
    cache.flush()
    cache.cache_prefix([2] * 20)
    cache.cache_prefix([3] * 20)
    assert found(cache, [1] * 20, [2] * 20, [3] * 20)[0] == 5


def test_claims_tell_who_computes(any_server: Backend) -> None:
    """The second who misses a chunk learns who computes it and since when; publishing it ends the claim."""
    one, two = any_server.open("w1", l1_ttl_s=0), any_server.open("w2", l1_ttl_s=0)
    one.cache_prefix(prompt(2))
    mine = one.find_longest_cache_hit(prompt(5)).claim(30)
    theirs = two.find_longest_cache_hit(prompt(5)).claim(30)
    assert (mine.mine, theirs.mine, theirs.worker) == (True, False, "w1")
    assert theirs.since > 1e9
    assert theirs.wait(0.05).matched_chunks == 2
    one.cache_prefix(prompt(5))
    assert theirs.wait(5).matched_chunks == 5
    again = two.find_longest_cache_hit(prompt(9)).claim(30)
    assert again.mine
    again.release()
    assert one.find_longest_cache_hit(prompt(9)).claim(30).mine


def test_prewarming_brings_the_hottest_paths(any_server: Backend) -> None:
    """A fresh process that pre-warms answers hot prompts, given as tokens, without asking Redis."""
    cache = any_server.open("w1", max_run=4, prewarm_threshold=2)
    for i in range(4):
        cache.cache_prefix(prompt(9, tail=i))
    for _ in range(3):
        cache.find_longest_cache_hit(prompt(9, tail=2))
    cache.flush()
    fresh = any_server.open("w2", max_run=4)
    seen: list[Any] = []
    warmed = fresh.prewarm(progress=seen.append)
    assert (warmed.complete, warmed.chunks, len(seen)) == (True, 9, 1)
    first = fresh.find_longest_cache_hit(prompt(9, tail=2))
    assert (first.matched_chunks, first.redis_calls) == (9, 0)
    assert fresh.prewarm(max_bytes=0).chunks == 0
    assert any_server.open("w3", max_run=4, prewarm_on_start=True).get_metrics()["l1_chunks"] == 9


def test_what_follows_is_guessed(any_server: Backend) -> None:
    """After a hit the child used last is brought in, so that a prompt that goes on there needs no Redis call."""
    cache = any_server.open("w1", max_run=4)
    reader = any_server.open("w2", max_run=4, speculate=True)
    cache.cache_prefix(prompt(4))
    publish_at(any_server, cache, prompt(10, tail=4), 2_000_000_000_000)
    cache.cache_prefix(prompt(10, tail=3))
    assert reader.find_longest_cache_hit(prompt(4)).matched_chunks == 4
    reader._work()
    assert reader.get_metrics()["speculated_chunks"] == 6
    hit = reader.find_longest_cache_hit(prompt(10, tail=4))
    assert (hit.matched_chunks, hit.redis_calls) == (10, 0)


def test_pinned_prompts_stay(any_server: Backend) -> None:
    """A pinned prompt outlives any eviction, however it is split, until it is unpinned."""
    cache = any_server.open("w1", l2_max_chunks=1, **EXACT)
    writer = any_server.open("w2", **EXACT)
    writer.cache_prefix(prompt(6))
    assert cache.pin(prompt(5)) == 5
    writer.cache_prefix(prompt(9, tail=3))
    cache.maintain()
    assert found(writer, prompt(6))[0] >= 5
    assert cache.unpin(prompt(6)) >= 5
    cache.maintain()
    assert (cache.check_integrity().problems, cache.check_integrity().chunks) == ([], 1)
    assert cache.pin([77] * 20) == 0


def test_leased_leaves_do_not_stop_eviction(any_server: Backend) -> None:
    """A leased leaf that is hot besides stands in nobody's way."""
    cache = any_server.open("w1", **{**EXACT, "hot_threshold": 1})
    cache.cache_prefix([1] * 20)
    hit = cache.find_longest_cache_hit([1] * 20)
    cache.flush()
    with hit.lease(1):
        for i in range(2, 5):
            cache.cache_prefix([i] * 20)
            cache.find_longest_cache_hit([i] * 20)
        cache.flush()
        any_server.open("w2", l2_max_chunks=5, **{**EXACT, "hot_threshold": 1}).maintain()
        assert found(cache, *([i] * 20 for i in range(1, 5))) == [5, 0, 0, 0]


def test_candidates_are_those_of_the_cluster(any_server: Backend) -> None:
    """What any process hit often is a candidate for all, most hits first."""
    cache = any_server.open("w1", prewarm_threshold=2)
    for i, hits in enumerate((1, 3, 2)):
        cache.cache_prefix([i] * 20)
        for _ in range(hits):
            cache.find_longest_cache_hit([i] * 20)
    cache.flush()
    entries = any_server.open("w2").get_prewarm_candidates()
    assert [entry.access_count for entry in entries] == [3]
    entries = any_server.open("w3", prewarm_threshold=2).get_prewarm_candidates()
    assert [(entry.access_count, entry.num_tokens) for entry in entries] == [(3, 20), (2, 20)]
    entries[0].touch()


def test_leased_leaves_in_front_end_no_eviction_and_loop_nowhere(any_server: Backend) -> None:
    """However many leased leaves stand first, a batch ends, and takes what stands behind them."""
    cache = any_server.open("w1", eviction_batch_size=2, **EXACT)
    far = int(time.time() * 1000) + 3_600_000
    leases: list[Any] = []
    for i in range(3):
        publish_at(any_server, cache, [i] * 20, far + i)
        leases.append(cache.find_longest_cache_hit([i] * 20).lease(60))
    publish_at(any_server, cache, [3] * 20, far + 9)
    small = any_server.open("w2", eviction_batch_size=2, l2_max_chunks=15, **EXACT)
    evicted = small.maintain()
    assert (evicted.chunks, evicted.more) == (5, False)
    assert small._state.link.publishes.calls < 10
    assert any_server.open("w3", l2_max_chunks=1, **EXACT).maintain().chunks == 0
    assert all(lease.active for lease in leases)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_lost_nodes_bring_nothing_back(any_server: Backend, lost: int) -> None:
    """When a failover took a node, what lay behind it never counts again, and the tree can be put right."""
    cache = any_server.open("w1", max_run=3, **EXACT)
    cache.cache_prefix(prompt(9), range(9))
    heads = sorted((name for name in any_server.dump() if ":n:" in name), key=lambda name: _depth(any_server, name))
    any_server.admin.delete(heads[lost])
    cache.remove_skipped_blocks([3 * lost + 1])
    cache.cache_prefix(prompt(3 * lost + 3), range(20, 23 + 3 * lost))
    reader = any_server.open("w2", max_run=3, **EXACT)
    assert reader.find_longest_cache_hit(prompt(9), blocks_of="w1/0@gpu").block_ids == tuple(range(20, 23 + 3 * lost))
    link = cache._state.link
    first, right = repair(link.admin, link.keys, 3, time.monotonic() + 60)
    assert right
    assert cache.check_integrity().problems == []
    del first


def test_a_lost_leaf_does_not_stop_eviction(any_server: Backend) -> None:
    """A leaf whose node a failover took is skipped, and what stands behind it goes; repair puts the counts right."""
    cache = any_server.open("w1", **EXACT)
    publish_at(any_server, cache, [1] * 20, 1000)
    (lost,) = [name for name in any_server.dump() if ":n:" in name]
    cache.cache_prefix([2] * 20)
    any_server.admin.delete(lost)
    any_server.open("w2", l2_max_chunks=5, **EXACT).maintain()
    assert found(cache, [2] * 20) == [0]
    link = cache._state.link
    report, right = repair(link.admin, link.keys, 256, time.monotonic() + 60)
    assert (report.ok, right, cache.check_integrity().problems) == (False, True, [])


def _depth(backend: Backend, name: str) -> int:
    admin: Any = backend.admin
    return int(admin.hget(name, "d"))


@pytest.mark.parametrize("change", ["split", "trim"])
def test_metadata_does_not_move_to_a_shorter_prompt(any_server: Backend, change: str) -> None:
    """When the log says that a node became shorter, what was kept with its end is forgotten."""
    cache, reader = any_server.open("w1"), any_server.open("w2")
    reader.catch_up()
    cache.cache_prefix(prompt(9), range(9), metadata={"who": "long"})
    entry = reader.find_longest_cache_hit(prompt(9)).entry
    assert entry is not None
    assert entry.metadata == {"who": "long"}
    if change == "split":
        cache.cache_prefix(prompt(9, tail=5))
    else:
        cache.remove_skipped_blocks([5])
    reader.catch_up()
    shorter = reader.find_longest_cache_hit(prompt(5)).entry
    assert shorter is not None
    assert shorter.metadata is None


def test_lost_coverage_is_revoked_beside_a_longer_holder(any_server: Backend) -> None:
    """When a leaf is cut to what another holder has, L1 does not keep the loser at that length."""
    one, two, reader = any_server.open("w1"), any_server.open("w2"), any_server.open("w3")
    one.cache_prefix(prompt(9), range(9))
    two.cache_prefix(prompt(6))
    reader.catch_up()
    assert len(reader.find_longest_cache_hit(prompt(9)).holders) == 2
    one.remove_skipped_blocks([3])
    reader.catch_up()
    assert dict(reader.find_longest_cache_hit(prompt(6)).holders) == {"w2/0@gpu": 6, "w1/0@gpu": 3}


def test_a_gap_in_l1_is_asked_for(any_server: Backend) -> None:
    """No log tells that somebody covers more of a node: where L1 knows chunks that nobody has, Redis is asked."""
    one, two, reader = any_server.open("w1"), any_server.open("w2"), any_server.open("w3")
    one.cache_prefix(prompt(8), range(8))
    two.cache_prefix(prompt(4))
    assert reader.find_longest_cache_hit(prompt(8)).matched_chunks == 8
    any_server.open("w1")  # a new epoch: what the old process had counts for nothing
    reader.flush()
    two.cache_prefix(prompt(8))
    assert reader.find_longest_cache_hit(prompt(8)).matched_chunks == 8


@pytest.mark.parametrize("change", ["evict", "split", "trim", "drop", "restore", "flush", "cut log"])
def test_l1_follows_the_log(any_server: Backend, change: str) -> None:
    """What other workers take out is revoked in L1 with the next poll; when the log has a gap, L1 forgets all."""
    cache = any_server.open("w1", max_run=8)
    cache.cache_prefix(prompt(6))
    cache.cache_prefix([9] * 20, range(5))
    reader = any_server.open("w2", max_run=8, l1_ttl_s=600)
    reader.catch_up()
    assert found(reader, prompt(6), [9] * 20) == [6, 5]
    admin: Any = any_server.admin
    if change == "evict":
        any_server.open("w3", max_run=8, l2_max_chunks=1, **{**EXACT, "l1_ttl_s": 600}).maintain()
    elif change == "split":
        cache.cache_prefix(prompt(6, tail=3))
        reader.catch_up()
        any_server.open("w3", max_run=8, l2_max_chunks=1, **{**EXACT, "l1_ttl_s": 600}).maintain()
    elif change == "trim":
        cache.remove_skipped_blocks([3])
    elif change == "drop":
        cache.clear()
    elif change == "restore":
        meta = admin.hgetall(any_server.keys.meta)
        admin.hset(any_server.keys.meta, "log", int(meta[b"log"]) + 7)
    elif change == "flush":
        admin.delete(*any_server.dump(), any_server.keys.log)
    else:
        for _ in range(3):
            cache.remove_skipped_blocks([4])
            cache.cache_prefix([9] * 20, range(5))
        admin.xtrim(any_server.keys.log, maxlen=1, approximate=False)
    reader.catch_up()
    gaps, chunks = reader._state.feed.gaps, reader.get_metrics()["l1_chunks"]
    if change in ("restore", "flush", "cut log"):
        assert (gaps, chunks) == (1, 0)
    else:
        assert gaps == 0
        again = found(reader, prompt(6), [9] * 20)
        assert again == {"evict": again, "split": again, "trim": [6, 3], "drop": [0, 0]}[change]
        assert sum(again) == any_server.open("w4", max_run=8).check_integrity().chunks
