"""A node that is its own ancestor: no legitimate call makes one, and one that is forged traps nobody."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from typing import Any

import pytest

from distprefix import Chain, PrefixCacheOptimizer, damage, operations
from distprefix.errors import DamagedNodeError
from distprefix.redis.client import Client, run
from distprefix.redis.journal import census
from distprefix.redis.repair import repair
from distprefix.tiers import operations as payload_operations
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads, sound
from tests.payloads import data
from tests.servers import Backend, Server

_SOON_S = 20.0


def hashes(count: int) -> list[bytes]:
    """So many chunk hashes, all different."""
    return [os.urandom(16) for _ in range(count)]


def publish(cache: PrefixCacheOptimizer, chain: list[bytes], max_run: int = 4) -> None:
    """Publish a chain as nobody checked it."""
    epoch = cache._state.link.epoch
    cache._state.link.publish(operations.publish(b"".join(chain), 0, "w1/0@gpu", epoch, max_run=max_run))


def damaged(cache: PrefixCacheOptimizer) -> int:
    """What the cache passed over so far."""
    return cache.get_metrics()["tree_damaged"]


REPEATS: dict[str, Callable[[list[bytes]], list[list[bytes]]]] = {
    "the last chunk of a new node is that of its parent": lambda a: [a[:4], [*a[:4], *a[4:7], a[3]]],
    "a leaf grows to the chunk that it ended with": lambda a: [a[:2], [*a[:2], a[2], a[1]]],
    "a new node ends as the upper half of a split": lambda a: [a[:4], [*a[:2], *a[5:8], a[1]]],
    "a run ends as its own upper half": lambda a: [[*a[:2], a[2], a[1]], [*a[:2], a[5]]],
    "a later new node begins as the lower half of a split": lambda a: [a[:4], [*a[:2], *a[5:9], a[2]]],
    "a new node begins in the middle of what precedes it": lambda a: [[*a[:4], a[2], *a[5:8]], [*a[:2], a[9]]],
    "a new node ends in the middle of what precedes it": lambda a: [[*a[:4], *a[5:8], a[1], a[9]], [*a[:2], a[8]]],
    "a node at another depth has that head": lambda a: [a[:4], [*a[4:8], a[0], a[9]]],
    "the parent of the parent": lambda a: [a[:12], [*a[:12], *a[12:15], a[3]]],
}


@pytest.mark.parametrize("case", REPEATS)
def test_no_repeated_chunk_makes_a_circle(any_server: Backend, case: str) -> None:
    """Whoever calls the scripts with chains that repeat chunks: they are refused, or the tree stays a tree."""
    cache = any_server.open(prewarm_threshold=1, max_run=4)
    chains = REPEATS[case](hashes(16))
    publish(cache, chains[0])
    with pytest.raises(DamagedNodeError, match="twice"):
        publish(cache, chains[1])
    report = cache.check_integrity()
    assert report.problems == []
    assert damaged(cache) == 0, "the caller's chain is wrong, not the tree"
    cache.clear()
    sound(cache, 0, 0)


def test_calls_that_resume_see_a_chunk_of_an_earlier_call(real_server: Backend) -> None:
    """A chain of several windows whose last one repeats a chunk of the first is refused, with what came before kept."""
    cache = real_server.open()
    chain = hashes(operations.WINDOW + 600)
    chain[operations.WINDOW + 255] = chain[0]
    with pytest.raises(DamagedNodeError, match="twice"):
        publish(cache, chain, max_run=1)
    report = cache.check_integrity()
    assert report.problems == []
    assert 0 < report.chunks < len(chain)


def test_store_refuses_what_repeats_across_calls(real_server: Backend) -> None:
    """The script that says where payloads are refuses a repeated chunk as a publish does."""
    cache = real_server.open(max_run=4)
    chain = hashes(12)
    cache.store(Chain(chain[:4]), [b"x"] * 4)
    chain[7] = chain[3]
    for chunk in chain[4:7]:
        real_server.admin.set(real_server.keys.payload(chunk.hex()), b"x" * 50)
    with pytest.raises(DamagedNodeError, match="twice"):
        cache._state.link.publish(payload_operations.store(b"".join(chain), 0, max_run=4))
    assert cache.check_integrity().problems == []


# Forged ones


def tree(backend: Backend, **settings: Any) -> tuple[PrefixCacheOptimizer, list[str]]:
    """A root with two children of which one has two, all used; the heads, root first."""
    cache = backend.open(prewarm_threshold=1, strict=False, **settings)
    prompts = [prompt(20, tail=at) for at in (0, 12, 6)]
    for tokens in prompts:
        cache.cache_prefix(tokens, range(20))
    for tokens in prompts * 2:
        cache.find_longest_cache_hit(tokens)
    cache.flush()
    names = heads(prompts[0])
    found = [names[at] for at in (0, 6, 12)]
    assert all(backend.admin.exists(backend.keys.node(head)) for head in found)
    return cache, found


def close_circle(backend: Backend, top: str, below: str) -> None:
    """Hang `top` below its descendant, by all links that there are."""
    admin, keys = backend.admin, backend.keys
    run_of: Any = admin.hget(keys.node(below), "r")
    last = run_of[-16:].hex()
    admin.hset(keys.node(top), "p", last)
    admin.hset(keys.junction(last), mapping={"o": below, top: ""})


def calls_of(backend: Backend) -> int:
    """Commands that scripts and clients had the server run."""
    stats: Any = backend.admin.info("commandstats")
    return sum(each["calls"] for each in stats.values())


@pytest.mark.parametrize("top", [0, 1, 2])
@pytest.mark.parametrize("below", [0, 1, 2])
def test_nobody_walks_in_a_circle(own: Backend, top: int, below: int) -> None:
    """With a node below itself, each reader and each maintenance ends after some calls, and repair takes it out."""
    cache, found = tree(own)
    close_circle(own, found[top], found[below])
    before = calls_of(own)
    reader = own.open("w2", prewarm_threshold=1, strict=False)
    reader.prewarm(time_s=_SOON_S)
    reader.get_prewarm_candidates(10)
    reader._state.link.publish(payload_operations.idle(0, 0, 50))
    run(census(), Client(own.admin), own.keys.meta, time.monotonic() + _SOON_S)
    run(census(["w1/0@gpu"]), Client(own.admin), own.keys.meta, time.monotonic() + _SOON_S)
    reader.find_longest_cache_hit(prompt(20))
    reader.drop_worker("w1")
    reader.sweep()
    cache.remove_skipped_blocks([3])
    for head in found:
        run(operations.drop(head), Client(own.admin), own.keys.meta, time.monotonic() + _SOON_S)
    assert calls_of(own) - before < 5_000
    _, is_right = repair(Client(own.admin), own.keys, 256, time.monotonic() + _SOON_S)
    assert is_right
    assert reader.check_integrity().problems == []


@pytest.mark.parametrize("top", [0, 1, 2])
def test_repair_removes_a_circle(own: Backend, top: int) -> None:
    """Integrity names the nodes that lie below themselves; repair removes them and leaves the counts exact."""
    cache, found = tree(own)
    close_circle(own, found[top], found[2])
    assert any("lies below itself" in problem for problem in cache.check_integrity().problems)
    report, is_right = repair(Client(own.admin), own.keys, 256, time.monotonic() + _SOON_S)
    assert is_right
    assert found[2] in report.orphans
    assert cache.check_integrity().problems == []
    cache.cache_prefix(prompt(20), range(20))
    assert own.open("w3").find_longest_cache_hit(prompt(20)).matched_chunks == 20


def test_branches_that_join_again_are_read_once(own: Backend) -> None:
    """Nodes that end with one chunk share their children: such layers do not double what a census reads."""
    cache = own.open()
    keys, admin = own.keys, own.admin
    layers = 24
    lasts = [os.urandom(16) for _ in range(layers)]
    parent = ""
    for depth, last in enumerate(lasts):
        twins = [os.urandom(16) for _ in range(2)]
        fields: dict[str, Any] = {"p": parent, "d": 2 * depth, "a": 0, "n": 9, "c": 0, "h:w1/0@gpu": "1:2"}
        for head in twins:
            admin.hset(keys.node(head.hex()), mapping={**fields, "r": head + last})
            admin.hset(keys.junction(parent), head.hex(), "")
        admin.hset(keys.junction(last.hex()), "o", twins[0].hex())
        admin.hset(keys.holders if not parent else keys.junction(parent), "w1/0@gpu", 2)
        parent = last.hex()
    before = calls_of(own)
    assert len(run(census(), Client(admin), keys.meta, time.monotonic() + _SOON_S)) == 2 * layers
    run(census(["w1/0@gpu"]), Client(admin), keys.meta, time.monotonic() + _SOON_S)
    cache.drop_worker("w1")
    cache.sweep()
    cache.clear()
    assert calls_of(own) - before < 10_000
    _, is_right = repair(Client(admin), keys, 256, time.monotonic() + _SOON_S)
    assert is_right


def test_a_forged_depth_leaves_other_candidates(real_server: Backend) -> None:
    """Pre-warming passes over the path with a depth that does not fit, brings the others, counts, and never raises."""
    cache, found = tree(real_server)
    other = [70_000 + at for at in range(40)]
    cache.cache_prefix(other)
    cache.find_longest_cache_hit(other)
    cache.flush()
    real_server.admin.hset(real_server.keys.node(found[0]), "d", 3)
    reader = real_server.open("w2", prewarm_threshold=1, prewarm_on_start=True)
    assert reader.get_metrics()["prewarmed_chunks"] == 10
    assert damaged(reader) > 0
    assert reader.find_longest_cache_hit(other).redis_calls == 0


@pytest.mark.parametrize("field", ["h:w1/0@gpu", "h:x", "h:\udcff", "a", "n", "c"])
@pytest.mark.parametrize("value", [b"abc", b"1:-9", b"1:99999", b"9" * 5000, b""])
def test_a_forged_field_does_not_end_a_hit(real_server: Backend, field: str, value: bytes) -> None:
    """A look-up leaves out a holder, or a time, that cannot be, and finds all that others say."""
    real_server.open().cache_prefix(prompt(20))
    real_server.open("w2").cache_prefix(prompt(20))
    name = field.encode(errors="surrogateescape")
    real_server.admin.hset(real_server.keys.node(heads(prompt(20))[0]), name, value)
    reader = real_server.open("w3")
    hit = reader.find_longest_cache_hit(prompt(20))
    assert (hit.matched_chunks, damaged(reader)) == (20, 1)
    assert {holder.name for holder in hit.holders} == (
        {"w2/0@gpu"} if field.startswith("h:w1") else {"w1/0@gpu", "w2/0@gpu"}
    )


@pytest.mark.parametrize("what", ["h:w1/0@gpu", "l:x", "r", "p", "kind", "junction"])
def test_a_forged_leaf_does_not_stop_eviction(real_server: Backend, what: str) -> None:
    """Eviction gets past the leaf that goes first, whatever it has become."""
    cache = real_server.open()
    keys = real_server.keys
    admin: Any = real_server.admin
    for at in range(4):
        cache.cache_prefix([at] * 40)
    first: str = admin.zrange(keys.leaves, 0, 0)[0].decode()
    if what == "kind":
        admin.delete(keys.node(first))
        admin.set(keys.node(first), "x")
    elif what == "junction":
        admin.set(keys.junction(""), "x")
    else:
        admin.hset(keys.node(first), what, b"abc" if what != "r" else b"abc" * 7)
    bounds = operations.Bounds(0, None, None)
    evicted = cache._state.link.publish(operations.evict(bounds, 100))
    assert evicted.nodes >= 3
    assert admin.zcard(keys.leaves) == 0


@pytest.mark.parametrize("member", [b"zz", b"AB" * 16, b"ab", b"\xff", b"ab" * 8, b""])
def test_foreign_trash_stops_nothing(own: Backend, second: Server, member: bytes) -> None:
    """What no chunk is named by is taken out of the trash, and the rest of it is still dropped elsewhere."""
    second.client().flushall()
    cache = own.open(cold_url=second.url, strict=False, payload_timeout_s=5.0)
    cache.store(prompt(6), data(prompt(6), 100))
    cache.demote(idle_s=0)
    dead = own.keys.payload("cd" * 16, cold=True)
    second.client().set(dead, "x")
    own.admin.sadd(own.keys.trash, "cd" * 16, member)
    own.admin.hset(own.keys.unsettled, mapping={"x": b"a" * 17, "y": b"", "z": os.urandom(160_000)})
    assert cache.demote(idle_s=10**6) == 0
    assert second.client().ttl(dead) > 0
    assert own.admin.exists(own.keys.trash, own.keys.unsettled) == 0
    assert damaged(cache) == 4
    assert cache.find_stored(prompt(6)) == 6


@pytest.mark.parametrize("name", ["trash", "unsettled"])
def test_trash_of_another_type_stops_nothing(own: Backend, second: Server, name: str) -> None:
    """A key that is no list of what is to be done is removed, and payloads still become cold."""
    second.client().flushall()
    cache = own.open(cold_url=second.url, strict=False, payload_timeout_s=5.0)
    cache.store(prompt(6), data(prompt(6), 100))
    own.admin.set(getattr(own.keys, name), "x")
    assert cache.demote(idle_s=0) in (0, 6)
    cache.demote(idle_s=0)
    assert cache.find_stored(prompt(6)) == 6
    assert cache.get_metrics()["demoted_chunks"] == 6
    assert damaged(cache) == 1


def test_a_log_that_cannot_go_on_begins_anew(own: Backend) -> None:
    """With no number, or no id left, changes are still made and told, and readers of the log forget everything."""
    cache = own.open(feed_interval_s=3600)
    admin, keys = own.admin, own.keys
    for tail in (0, 7, 3):
        cache.cache_prefix(prompt(20, tail=tail))
    for spoil in (
        lambda: admin.hset(keys.meta, "log", "abc"),
        lambda: admin.xadd(keys.log, {"n": "1"}, id="18446744073709551615-18446744073709551615"),
    ):
        cache.catch_up()
        before = cache.get_metrics()["feed_gaps"]
        spoil()
        cache.cache_prefix(prompt(20, tail=7))
        cache.clear()
        cache.cache_prefix(prompt(20))
        cache.catch_up()
        assert cache.get_metrics()["feed_gaps"] > before
        assert cache.check_integrity().problems == []


def test_versions_that_nobody_gave_do_not_repeat_a_reading(own: Backend) -> None:
    """A roster whose changes lie in the future is read in a few calls, however many they are."""
    cache = own.open()
    own.admin.zadd(own.keys.changes, {f"x{at}/0": 1e300 for at in range(1200)})
    before = own.script_calls()
    cache.workers()
    assert own.script_calls() - before < 10


def test_a_claim_without_an_end_is_nobodys(real_server: Backend) -> None:
    """A claim that would never expire keeps nobody from computing."""
    cache = real_server.open()
    tokens = prompt(8)
    cache.cache_prefix(tokens[:16])
    real_server.admin.set(f"{real_server.keys.base}claim:{heads(tokens)[4]}", "1700000000000 foreign")
    assert cache.find_longest_cache_hit(tokens).claim(ttl_s=5)


def test_damage_is_said_once(
    real_server: Backend, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first damaged place in a process is logged with what to do; all of them are counted."""
    monkeypatch.setattr(damage, "_warned", False)
    real_server.open().cache_prefix(prompt(20))
    real_server.admin.hset(real_server.keys.node(heads(prompt(20))[0]), "h:x", "abc")
    with caplog.at_level(logging.WARNING, "distprefix"):
        for worker in ("w2", "w3"):
            assert damaged_after_look_up(real_server.open(worker)) == 1
    said = [record for record in caplog.records if "distprefix maintain --repair" in record.getMessage()]
    assert len(said) == 1


def damaged_after_look_up(cache: PrefixCacheOptimizer) -> int:
    """Damage that one look-up meets."""
    cache.find_longest_cache_hit(prompt(20))
    return damaged(cache)
