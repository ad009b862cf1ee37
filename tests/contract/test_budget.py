"""Script calls that stop for their budget and resume: the same tree and the same answers as one call would give."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import pytest

from distprefix import Chain, PrefixCacheOptimizer, operations
from distprefix.errors import NoParentError
from distprefix.events.changes import Change
from distprefix.events.journal import Fate
from distprefix.operations import Call
from distprefix.redis.journal import RedisJournal
from distprefix.redis.roster import WorkerInfo
from distprefix.tiers import operations as payload_operations
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.servers import Backend
from tests.workers import calls_of

DEEP = 900
"""Nodes of one chunk: as many as take many calls."""
EXACT: dict[str, Any] = {"high_watermark": 1.0, "low_watermark": 1.0, "hot_threshold": 1_000_000, "l1_ttl_s": 0}


def chain_of(chunks: int, name: int = 0) -> bytes:
    """A chain of so many different chunks."""
    return random.Random(name).randbytes(16 * chunks)


def stepwise(
    cache: PrefixCacheOptimizer, operation: Generator[Call, Any, Any], between: Callable[[int], object] = lambda _: None
) -> tuple[Any, list[int]]:
    """Run an operation; between its calls something else happens. What it returns, and the chunks that calls carry."""
    sent: list[int] = []
    reply: Any = None
    client, meta = cache._state.link.admin, cache._state.link.keys.meta
    while True:
        try:
            call = operation.send(reply)
        except StopIteration as done:
            return done.value, sent
        between(len(sent))
        sent.append(max(len(arg) // 16 for arg in call.args if isinstance(arg, bytes)))
        reply = client.call(call.script, meta, call.args, time.monotonic() + 60)[0]


def publish(cache: PrefixCacheOptimizer, chain: bytes, holder: str = "", metadata: bytes = b"") -> Any:
    """An operation that publishes a chain from the root."""
    link, config = cache._state.link, cache.config
    return operations.publish(
        chain, 0, holder or config.holder, link.epoch, max_run=config.max_run, blocks=chain[::4], metadata=metadata
    )


@contextmanager
def commands_of(backend: Backend, scripts: int) -> Generator[None]:
    """What runs here are so many script calls, each of few commands."""
    admin: Any = backend.admin
    if not backend.is_real:
        yield
        return
    admin.config_resetstat()
    yield
    stats = admin.info("commandstats")
    calls = sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "evalsha_ro"))
    inside = sum(
        stats.get(f"cmdstat_{name}", {}).get("calls", 0)
        for name in ("hget", "hmget", "hgetall", "hset", "hlen", "strlen", "persist", "exists", "zadd")
    )
    assert calls >= scripts
    assert inside / calls < 700


def test_a_deep_chain_is_published_and_found_in_several_calls(any_server: Backend) -> None:
    """Nodes of one chunk take many calls, each of few commands and of few bytes, and are all there as published."""
    cache, reader = any_server.open("w1", max_run=1), any_server.open("w2", max_run=1)
    chain = chain_of(DEEP)
    with commands_of(any_server, DEEP // 100):
        published, sent = stepwise(cache, publish(cache, chain, metadata=b"end"))
    assert len(sent) > DEEP // 100
    assert max(sent[2:]) <= 300, "a call carries what it may get through, not a window of 4,096 chunks"
    assert published.chunks_made == DEEP
    with commands_of(any_server, DEEP // 200):
        views, sent = stepwise(reader, operations.walk(chain, 0, "w1/0@gpu"))
    assert len(sent) > DEEP // 200
    assert max(sent[2:]) <= 300
    assert [view.start for view in views] == list(range(DEEP))
    assert b"".join(view.blocks for view in views) == chain[::4]
    assert [view.metadata for view in views] == [b""] * (DEEP - 1) + [b"end"]
    assert [view._replace(blocks=b"") for view in published.views] == [view._replace(blocks=b"") for view in views]
    again, _ = stepwise(reader, publish(reader, chain))
    assert (again.nodes_made, again.chunks_made) == (0, 0)
    assert all(set(view.holders) == {"w1/0@gpu", "w2/0@gpu"} for view in again.views)
    report = cache.check_integrity()
    assert (report.problems, report.nodes) == ([], DEEP)


def test_a_usual_prompt_is_one_call(real_server: Backend) -> None:
    """Up to 512 chunks, look-up, publish, lease, find_stored and store take one script call each."""
    cache = real_server.open("w1")
    chain = chain_of(512)
    for operation in (
        publish(cache, chain),
        operations.walk(chain, 0),
        operations.lease(chain, "one", 1000),
        payload_operations.where([chain]),
        payload_operations.store(chain, 0, max_run=256),
    ):
        assert len(stepwise(cache, operation)[1]) == 1


@pytest.mark.parametrize("max_run", [1, 3])
def test_a_look_up_between_splits_and_trims_is_never_too_long(any_server: Backend, max_run: int) -> None:
    """Others branch off, take back and evict between the calls: what is told was there, and what stays is told."""
    cache, other = any_server.open("w1", max_run=max_run), any_server.open("w2", max_run=max_run)
    chain = chain_of(600)
    stepwise(cache, publish(cache, chain))

    def interfere(call: int) -> None:
        at = 100 + 40 * call
        stepwise(other, publish(other, chain[: 16 * at] + chain_of(5, call + 1), "w2/0@gpu"))
        if call == 2:
            stepwise(cache, operations.trim(chain[: 16 * 550], "w1/0@gpu", cache._state.link.epoch))

    views, _ = stepwise(cache, operations.walk(chain, 0), interfere)
    told = sum(view.matched for view in views)
    assert 549 <= told <= 600
    assert all(views[i].start + views[i].matched == views[i + 1].start for i in range(len(views) - 1))
    assert cache.check_integrity().problems == []


@pytest.mark.parametrize("max_run", [1, 4])
def test_a_publish_between_other_writers_is_whole(any_server: Backend, max_run: int) -> None:
    """Others split, publish and evict between the calls of a publish: it is whole, or says that its parent is gone."""
    cache, other = any_server.open("w1", max_run=max_run, **EXACT), any_server.open("w2", max_run=max_run, **EXACT)
    chain = chain_of(700 if max_run == 1 else 1200)

    def interfere(call: int) -> None:
        at = 30 * call + 7
        stepwise(other, publish(other, chain[: 16 * at] + chain_of(9, call + 1), "w2/0@gpu"))
        if call == 6:
            any_server.open("w3", l2_max_chunks=100, max_run=max_run, **EXACT).maintain()

    try:
        stepwise(cache, publish(cache, chain), interfere)
    except NoParentError:
        stepwise(cache, publish(cache, chain))
    views, _ = stepwise(other, operations.walk(chain, 0))
    assert sum(view.matched for view in views) == len(chain) // 16
    assert all(view.holders["w1/0@gpu"][1] >= view.start + view.matched for view in views)
    assert cache.check_integrity().problems == []


def test_a_publish_that_is_cut_short_leaves_whole_prefixes(any_server: Backend) -> None:
    """When the publisher dies between two calls, what is there is sound, and publishing again completes it."""
    cache = any_server.open("w1", max_run=1)
    chain = chain_of(400)
    operation, reply = publish(cache, chain, metadata=b"m"), None
    for _ in range(3):
        call = operation.send(reply)
        reply = cache._state.link.admin.call(call.script, any_server.keys.meta, call.args, time.monotonic() + 60)[0]
    report = cache.check_integrity()
    assert report.problems == []
    assert 0 < report.chunks < 400
    stepwise(cache, publish(cache, chain, metadata=b"m"))
    views, _ = stepwise(cache, operations.walk(chain, 0))
    assert [view.metadata for view in views] == [b""] * 399 + [b"m"]


def test_a_deep_chain_is_leased_in_several_calls(any_server: Backend) -> None:
    """A lease protects the deepest node that is there, whatever the number of calls that it takes to find it."""
    cache = any_server.open("w1", max_run=1, **EXACT)
    chain = chain_of(DEEP)
    stepwise(cache, publish(cache, chain))
    (there, ends), sent = stepwise(cache, operations.lease(chain + chain_of(50, 1), "mine", 60_000))
    assert there == DEEP
    assert len(sent) > 2
    assert ends > 60_000
    any_server.open("w2", l2_max_chunks=1, max_run=1, **EXACT).maintain()
    assert cache.check_integrity().chunks == DEEP
    (there, _), _ = stepwise(cache, operations.lease(chain, "mine", 0))
    assert there == DEEP
    any_server.open("w2", l2_max_chunks=5, max_run=1, **EXACT).maintain()
    assert cache.check_integrity().chunks == 5


def test_a_lease_follows_what_is_evicted_meanwhile(any_server: Backend) -> None:
    """When the rest of the path is removed between two calls, the lease is of what is left."""
    cache = any_server.open("w1", max_run=1, **EXACT)
    chain = chain_of(DEEP)
    stepwise(cache, publish(cache, chain))

    def interfere(call: int) -> None:
        if call == 1:
            any_server.open("w2", l2_max_chunks=650, max_run=1, **EXACT).maintain()

    (there, _), _ = stepwise(cache, operations.lease(chain, "mine", 60_000), interfere)
    assert there == 650
    any_server.open("w2", l2_max_chunks=1, max_run=1, **EXACT).maintain()
    assert cache.check_integrity().chunks == 650


def test_deep_chains_of_payloads(real_server: Backend) -> None:
    """Payloads of nodes of one chunk are stored, found and moved as those of long runs, in several calls."""
    cache = real_server.open("w1", max_run=1, cold_timeout_s=0.001)
    chains = [chain_of(DEEP, name) for name in range(2)]
    with commands_of(real_server, 10):
        stored = [cache.store(Chain.packed(chain), [b"x"] * DEEP) for chain in chains]
    assert stored == [DEEP, DEEP]
    places, sent = stepwise(cache, payload_operations.where([*chains, chains[0][:160], chain_of(3, 9)]))
    assert [each.chunks for each in places] == [DEEP, DEEP, 10, 0]
    assert len(sent) > 4
    assert [each.starts for each in places] == [tuple(range(DEEP)), tuple(range(DEEP)), tuple(range(10)), ()]
    time.sleep(0.005)
    assert cache.demote() >= 2
    assert cache.check_integrity().problems == []
    cold = stepwise(cache, payload_operations.where(chains))[0]
    assert [each.chunks for each in cold] == [DEEP, DEEP]
    assert any(cold[0].cold)


def test_a_long_way_up_is_gone_in_several_calls(real_server: Backend) -> None:
    """What is idle is found above a long tail that has no payloads, and a hot leaf is pre-warmed with all above it."""
    cache = real_server.open("w1", max_run=1, cold_timeout_s=0.001, prewarm_threshold=1)
    chain = chain_of(DEEP)
    assert cache.store(Chain.packed(chain[:160]), [b"x"] * 10) == 10
    stepwise(cache, publish(cache, chain))
    time.sleep(0.005)
    rank, above, found, calls = 0, "", list[Any](), 0
    while rank >= 0:
        (rank, above, more), _ = stepwise(cache, payload_operations.idle(1, rank, 50, above))
        found += more
        calls += 1
    assert [each.run for each in found] == [chain[144:160]]
    assert calls > 2
    stepwise(cache, operations.touch([(chain[-16:], 5, 0)], 1))
    fresh = real_server.open("w2", max_run=1)
    warmed = fresh.prewarm(time_s=60)
    assert (warmed.complete, warmed.chunks) == (True, DEEP)
    hit = fresh.find_longest_cache_hit(Chain.packed(chain))
    assert (hit.matched_chunks, hit.redis_calls) == (DEEP, 0)


def test_eviction_finds_free_leaves_behind_leased_ones(any_server: Backend) -> None:
    """A thousand leased leaves stand first: the bound is reached all the same, and no leased leaf goes."""
    cache = any_server.open("w1", **EXACT)
    leased = [chain_of(4, name) for name in range(1000)]
    free = [chain_of(4, name) for name in range(2000, 2300)]
    for chain in leased:
        stepwise(cache, publish(cache, chain))
        stepwise(cache, operations.lease(chain, "mine", 600_000))
    for chain in free:
        stepwise(cache, publish(cache, chain))
    late = 1000 * int(time.time()) + 7_200_000
    any_server.admin.zadd(any_server.keys.leaves, {chain[:16].hex(): late + i for i, chain in enumerate(free)})
    other = any_server.open("w2", l2_max_chunks=4000 + 4 * 100, **EXACT)
    with commands_of(any_server, 10):
        evicted = other.maintain()
    report = cache.check_integrity()
    assert (report.problems, report.chunks) == ([], 4400)
    assert evicted.chunks == 4 * 200
    assert other.maintain().chunks == 0
    for chain in leased:
        assert sum(view.matched for view in stepwise(cache, operations.walk(chain, 0))[0]) == 4
    assert [bool(stepwise(cache, operations.walk(chain, 0))[0]) for chain in free] == [False] * 200 + [True] * 100


def test_parents_that_become_leaves_before_leased_ones_are_evicted(any_server: Backend) -> None:
    """A parent that stands before the leased leaves when its last child is gone is found as well."""
    cache = any_server.open("w1", max_run=2, **EXACT)
    for name in range(300):
        chain = chain_of(2, name)
        stepwise(cache, publish(cache, chain))
        stepwise(cache, operations.lease(chain, "mine", 600_000))
    free = chain_of(8, 999)
    stepwise(cache, publish(cache, free))
    any_server.admin.zadd(any_server.keys.leaves, {free[96:112].hex(): 1000 * int(time.time()) + 7_200_000})
    any_server.open("w2", l2_max_chunks=600, max_run=2, **EXACT).maintain()
    report = cache.check_integrity()
    assert (report.problems, report.chunks) == ([], 600)


@pytest.mark.usefixtures("small_parts")
def test_payloads_of_many_parts_are_evicted_in_several_calls(real_server: Backend) -> None:
    """A leaf whose payloads have thousands of values is cut piece by piece, and no value is left behind."""
    cache = real_server.open("w1", **EXACT)
    chain = Chain.packed(chain_of(100))
    assert cache.store(chain, [b"x" * 20_000] * 100) == 100
    other = real_server.open("w2", l2_max_chunks=1, **EXACT)
    with commands_of(real_server, 5):
        assert other.maintain().chunks == 99
    assert cache.check_integrity().problems == []
    values = list(real_server.admin.scan_iter(match=f"{real_server.keys.base}kv:*", count=1000))
    assert len(values) == 40, "the parts of one payload"


def test_an_ingest_goes_on_where_a_call_stopped(any_server: Backend) -> None:
    """An engine's chain of short nodes is written in parts; the position comes with the last one alone."""
    cache = any_server.open("w1", max_run=1)
    link = cache._state.link
    journal = RedisJournal(link.admin, link.keys, "e/0", "engine", WorkerInfo(), lease_s=0, max_run=1)
    journal.lead()
    epoch, chain, pos, calls = journal.renew(), chain_of(300), 0, 0
    while True:
        rest = chain[16 * pos :]
        keys = b"".join(i.to_bytes(8, "little") for i in range(1 + pos, 301))
        (outcome,) = journal.commit(epoch, [Change("gpu", True, pos, rest, keys, ())], None, b"")
        calls += 1
        if outcome.fate is Fate.DONE:
            break
        assert outcome.fate is Fate.PART
        assert outcome.heads[-1] < outcome.chunks < 300 - pos
        pos += outcome.heads[-1]
    assert calls > 3
    held = [part for part in journal.covered(epoch) if part.medium == "gpu"]
    assert b"".join(part.chunks for part in sorted(held, key=lambda part: part.depth)) == chain
    assert sorted(part.labels for part in held) == sorted(i.to_bytes(8, "little") for i in range(1, 301))
    assert cache.check_integrity().problems == []


def test_candidates_come_in_pages(any_server: Backend) -> None:
    """More candidates than one call tells are told by several, most hits first, and each once."""
    cache = any_server.open("w1", prewarm_threshold=1)
    chains = [chain_of(1, name) for name in range(450)]
    for chain in chains:
        stepwise(cache, publish(cache, chain))
    stepwise(cache, operations.touch([(chain, 1 + i, 0) for i, chain in enumerate(chains)], 1))
    found, sent = stepwise_hot(cache, 1000)
    assert [one.hits for one in found] == list(range(450, 0, -1))
    assert sent == 4
    assert len(cache.get_prewarm_candidates(300)) == 300
    assert any_server.open("w2").prewarm().chunks == 450


def stepwise_hot(cache: PrefixCacheOptimizer, limit: int) -> tuple[list[operations.Candidate], int]:
    """Candidates, and the calls that it took."""
    operation, reply, calls = operations.hot(limit), None, 0
    while True:
        try:
            call = operation.send(reply)
        except StopIteration as done:
            return done.value, calls
        calls += 1
        reply = cache._state.link.admin.call(call.script, cache._state.link.keys.meta, call.args, time.monotonic() + 9)[
            0
        ]


def test_orphans_are_removed_in_portions(any_server: Backend) -> None:
    """Where a node with hundreds of children was lost, publishing it again removes these some at a time."""
    cache = any_server.open("w1", max_run=4)
    parent = prompt(4)
    for tail in range(300):
        cache.cache_prefix([*parent, *([1000 + tail] * 4)])
    any_server.admin.delete(any_server.keys.node(heads(parent)[0]))
    other = any_server.open("w2", max_run=4)
    with calls_of(other) as sent:
        other.cache_prefix(prompt(8))
    assert 3 <= sent.count("insert") <= 20
    reader = any_server.open("r", max_run=4)
    assert dict(reader.find_longest_cache_hit(prompt(8)).holders) == {"w2/0@gpu": 8}
    assert not reader.find_longest_cache_hit([*parent, *([1000] * 4)]).matched_chunks > 4
    problems = reader.check_integrity().problems
    assert all("count" in problem for problem in problems), problems
