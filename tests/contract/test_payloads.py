"""Payloads in a warm and a cold tier: the bytes come back as they went in, or the hit is a clean, shorter one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import pytest
import redis

from distprefix import Chain, operations
from distprefix.chunking import HASH_BYTES
from distprefix.errors import InvalidInputError
from distprefix.tiers.envelope import HEADER_BYTES
from distprefix.tiers.store import PART_BYTES, Want
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.payloads import (
    ALWAYS,
    KEYS,
    MIB,
    TIERS,
    cut,
    data,
    delete,
    demote,
    flip,
    loaded,
    meta,
    metric,
    names,
    put,
    sound,
    where,
)
from tests.servers import Backend, Server

# Round trips


@pytest.mark.parametrize("tier", TIERS)
def test_round_trip(real_server: Backend, second: Server, tier: str) -> None:
    """What was stored comes back from every tier, to another worker as well, and the counts are those of the bytes."""
    tokens = prompt(5)
    cache, server = put(real_server, tier, tokens, second)
    assert loaded(cache, tokens) == data(tokens)
    assert loaded(real_server.open("w2", **where(tier, second)), [*tokens, 1, 2, 3, 4, 5]) == data(tokens)
    sound(real_server, cache, server)
    warm, cold = meta(real_server, "warm"), meta(real_server, "cold")
    if tier == "warm":
        assert (warm, cold) == (5 * (1000 + HEADER_BYTES), 0)
        assert loaded(cache, prompt(5, tail=2)) == data(tokens)[:2]
    else:
        assert warm == 0
        assert 5 * 500 < cold < warm + 5 * 1000
        assert names(real_server.admin, real_server, "kv:") == set()
    assert names(real_server.admin, real_server, "cold:") == (
        {f"cold:{h}" for h in heads(tokens)} if tier == "here" else set()
    )


@pytest.mark.parametrize("tier", TIERS)
def test_sizes_around_the_border_of_a_part(real_server: Backend, second: Server, tier: str) -> None:
    """Payloads of a part, a byte less and more, of several parts, and of one byte come back, and their parts go."""
    sizes = (PART_BYTES - HEADER_BYTES - 1, PART_BYTES - HEADER_BYTES, PART_BYTES - HEADER_BYTES + 1, 1)
    sizes = (*sizes, 2 * PART_BYTES - HEADER_BYTES, 20 * MIB)
    noise = Random(1).randbytes(20 * MIB)
    payloads = [memoryview(noise)[:size] for size in sizes]
    cache = real_server.open(cold_codec="raw", **where(tier, second))
    assert cache.store(prompt(6), payloads) == 6
    parts = {name for name in names(real_server.admin, real_server, "kv:") if name.count(":") == 3}
    assert len(parts) == 1 + 1 + 2
    if tier != "warm":
        assert demote(real_server, cache) == 6
    found = cache.load(prompt(6))
    assert [a == b for a, b in zip(found.payloads, payloads, strict=True)] == [True] * 6
    into = [bytearray(size) for size in sizes]
    assert cache.load(prompt(6), into).chunks == 6
    assert [a == b for a, b in zip(into, payloads, strict=True)] == [True] * 6
    server = second.client() if tier == "elsewhere" else real_server.admin
    sound(real_server, cache, server)
    cache.clear()
    assert names(real_server.admin, real_server, "") <= {"log", "trash", "meta", "writers"}
    assert (meta(real_server, "warm"), meta(real_server, "cold")) == (0, 0)


def test_every_server_keeps_payloads(any_server: Backend) -> None:
    """The round trip through both tiers on each server that is claimed, as the user of a worker where there is one."""
    if not any_server.is_real:
        pytest.skip("fakeredis has no socket for the data path")
    cache, tokens = any_server.open("w1"), prompt(4)
    assert cache.store(tokens, data(tokens)) == 4
    assert loaded(cache, tokens) == data(tokens)
    assert cache.demote(ALWAYS) == 4
    assert loaded(cache, tokens) == data(tokens)
    assert cache.promote(tokens) in (0, 4)  # the load has it promoted as well
    assert loaded(cache, tokens) == data(tokens)


def test_none_stands_for_what_is_there(real_server: Backend) -> None:
    """None is taken for a chunk that is stored, and ends a store where it is not; a store ends at a hole."""
    cache, payloads = real_server.open(), data(prompt(6))
    assert cache.store(prompt(6), [payloads[0], None, payloads[2]]) == 1
    assert cache.store(prompt(6), [None, payloads[1], payloads[2]]) == 3
    assert cache.store(prompt(6), [None, None]) == 2
    assert cache.store(prompt(6), [None, None, None, None, payloads[4]]) == 3
    assert loaded(cache, prompt(6)) == payloads[:3]
    assert names(real_server.admin, real_server, "kv:") == {f"kv:{head}" for head in heads(prompt(3))}
    sound(real_server, cache)


def test_prompts_share_what_they_begin_with(real_server: Backend) -> None:
    """Two prompts that fork share the payloads up to there, and storing again writes nothing."""
    cache = real_server.open()
    one, other = prompt(6), prompt(6, tail=3)
    assert cache.store(one, data(one)) == 6
    assert cache.store(other, [None] * 3 + data(other)[3:]) == 6
    assert (loaded(cache, one), loaded(cache, other)) == (data(one), data(other))
    assert metric(cache, "payloads_stored") == 9
    assert len(names(real_server.admin, real_server, "kv:")) == 9
    calls = cache._tiers.payloads.warm.pool.bytes_out
    assert cache.store(one, data(one)) == 6
    assert cache._tiers.payloads.warm.pool.bytes_out == calls
    assert metric(cache, "payloads_stored") == 9
    sound(real_server, cache)


def test_many_prompts_are_found_in_one_call(real_server: Backend) -> None:
    """What is stored of each of several prompts is told by one call, and one for every further 4,096 chunks."""
    cache, one, other = real_server.open(), prompt(6), prompt(8, tail=3)
    assert cache.store(one, data(one)) == 6
    assert demote(real_server, cache) == 6
    assert cache.store(other, data(other)[:5]) == 5
    assert _calls_of(cache, lambda: cache.find_stored_batch([one, other, prompt(2), [9] * 8, one])) == (
        1,
        [6, 5, 2, 0, 6],
    )
    assert cache.find_stored_batch([]) == []
    assert _calls_of(cache, lambda: cache.find_stored_batch([[i] * 4 for i in range(501)])) == (2, [0] * 501)


def test_long_prompts_are_found_window_by_window(real_server: Backend) -> None:
    """A prompt of many chunks is found whole, wherever its nodes begin and windows end, with prompts beside it."""
    cache = real_server.open(max_run=100, publish_timeout_s=5, payload_timeout_s=20)
    long, body = Chain.packed(Random(5).randbytes(9000 * HASH_BYTES)), b"x"
    assert cache.store(long, [body] * 8500) == 8500
    assert cache.store(prompt(2), [body] * 2) == 2
    found = _calls_of(cache, lambda: cache.find_stored_batch([prompt(2), long, long[:5000], prompt(2)]))
    assert found == (6, [2, 8500, 5000, 2])  # the two, thrice for the long one, twice for its part, and the two with it
    assert cache.load(long).chunks == 8500


def _calls_of(cache: Any, work: Callable[[], list[int]]) -> tuple[int, list[int]]:
    """How many Redis calls something takes, and what it gives."""
    before = cache._state.link.publishes.calls
    found = work()
    return cache._state.link.publishes.calls - before, found


def test_load_into_buffers(real_server: Backend) -> None:
    """A load fills the caller's own memory, no more than asked for, and ends at a buffer of another length."""
    cache, payloads = real_server.open(), data(prompt(4))
    cache.store(prompt(4), payloads)
    memory = bytearray(4000)
    views = [memoryview(memory)[at * 1000 : at * 1000 + 1000] for at in range(4)]
    found = cache.load(prompt(4), views)
    assert memory == b"".join(payloads)
    memory[0] ^= 1
    assert bytes(found.payloads[0]) == bytes(memory[:1000])
    assert cache.load(prompt(4), most=2).chunks == 2
    assert cache.load(prompt(4), most=0).chunks == 0
    assert cache.load(prompt(4), views[:3]).chunks == 3
    assert cache.load(cache.find_longest_cache_hit(prompt(4)), most=99).chunks == 4
    for wrong in (999, 1001, 1):
        assert cache.load(prompt(4), [views[0], bytearray(wrong)]).chunks == 1
    assert metric(cache, "payloads_unfit") == 3
    with pytest.raises(InvalidInputError):
        cache.load(prompt(4), [bytes(1000)])
    with pytest.raises(InvalidInputError):
        cache.store(prompt(2), payloads)
    assert loaded(cache, prompt(4)) == payloads
    sound(real_server, cache)


def _swap(admin: redis.Redis, key: str, other: str) -> None:
    one: Any = admin.get(key)
    two: Any = admin.get(other)
    admin.set(key, two)
    admin.set(other, one)


def _codec(admin: redis.Redis, key: str, _: str) -> None:
    admin.setrange(key, 5, b"\x63")


def _hash(admin: redis.Redis, key: str, _: str) -> None:
    admin.delete(key)
    admin.hset(key, "a", "b")


DAMAGES = [
    (tier, damage)
    for tier in TIERS
    for damage in (flip, cut, delete, _swap, _codec, _hash)
    if damage is not _hash or tier != "elsewhere"
]


@pytest.mark.parametrize(("tier", "damage"), DAMAGES)
def test_damage_ends_the_hit(real_server: Backend, second: Server, tier: str, damage: Callable[..., None]) -> None:
    """What somebody did to a payload ends the hit just before it, is counted, and the tree is trimmed there."""
    tokens = prompt(6)
    cache, server = put(real_server, tier, tokens, second)
    chunks = heads(tokens)
    key, other = (real_server.keys.payload(chunks[at], cold=tier != "warm") for at in (3, 4))
    damage(server, key, other)
    assert loaded(cache, tokens) == data(tokens)[:3]
    reason = "missing" if damage in (delete, _hash) else "damaged"
    assert metric(cache, f"payloads_{reason}") == 1
    sound(real_server, cache, server)
    assert loaded(cache, tokens) == data(tokens)[:3]
    assert metric(cache, f"payloads_{reason}") == 1
    assert cache.store(tokens, data(tokens)) == 6
    assert loaded(cache, tokens) == data(tokens)
    sound(real_server, cache, server)


def test_damage_above_a_fork_trims_both_branches(real_server: Backend, second: Server) -> None:
    """Behind a damaged payload nothing stays, warm or cold, on whatever branch."""
    cache = real_server.open()
    for tokens in (prompt(8), prompt(8, tail=4)):
        assert cache.store(tokens, data(tokens)) == 8
    assert cache.demote(ALWAYS) == 8
    flip(real_server.admin, real_server.keys.payload(heads(prompt(8))[2]), "")
    assert loaded(cache, prompt(8)) == data(prompt(8))[:2]
    sound(real_server, cache)
    assert len(names(real_server.admin, real_server, "kv:") | names(real_server.admin, real_server, "cold:")) == 2


def test_a_part_is_missing(real_server: Backend) -> None:
    """A payload without one of its parts is missing, and its other parts go."""
    cache, big = real_server.open(), [bytes(20 * MIB)] * 2
    assert cache.store(prompt(2), big) == 2
    first = real_server.keys.payload(heads(prompt(2))[1])
    (part,) = real_server.admin.keys(f"{first}:*:1")
    real_server.admin.delete(part)
    assert cache.load(prompt(2)).chunks == 1
    assert metric(cache, "payloads_missing") == 1
    sound(real_server, cache)
    assert len(names(real_server.admin, real_server, "kv:")) == 3


def test_payloads_of_unknown_keys_stay(real_server: Backend) -> None:
    """Who lacks the key of a payload gets a shorter hit and trims nothing; keys are rotated by putting one in front."""
    writer = real_server.open("w1", encryption_keys=KEYS)
    tokens, payloads = prompt(3), data(prompt(3))
    assert writer.store(tokens, payloads) == 3
    assert loaded(writer, tokens) == payloads
    for at, keys in enumerate(("2:" + "22" * 32, "")):
        reader = real_server.open(f"r{at}", encryption_keys=keys)
        assert loaded(reader, tokens) == []
        assert metric(reader, "payloads_unreadable") == 1
    rotated = real_server.open("w4", encryption_keys="2:" + "22" * 32 + "," + KEYS)
    assert rotated.store(prompt(5), [None] * 3 + data(prompt(5))[3:]) == 5
    assert loaded(rotated, prompt(5)) == data(prompt(5))
    assert loaded(writer, prompt(5)) == payloads
    assert demote(real_server, rotated) == 5
    assert loaded(real_server.open("w5", encryption_keys="2:" + "22" * 32), prompt(5)) == data(prompt(5))
    sound(real_server, writer)
    wrong = real_server.open("w6", encryption_keys="2:" + "33" * 32)
    assert loaded(wrong, prompt(5)) == []


def test_plain_payloads_under_keys(real_server: Backend) -> None:
    """A payload from before keys were configured is unreadable to those who have keys, and stays."""
    plain = real_server.open("w1")
    assert plain.store(prompt(2), data(prompt(2))) == 2
    sealed = real_server.open("w2", encryption_keys=KEYS)
    assert loaded(sealed, prompt(2)) == []
    assert metric(sealed, "payloads_unreadable") == 1
    assert loaded(plain, prompt(2)) == data(prompt(2))


# What goes


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("way", ["evict", "clear", "trim"])
def test_payloads_go_with_their_node(real_server: Backend, second: Server, tier: str, way: str) -> None:
    """Evicted, cleared or trimmed chunks leave no payload, and the counts are exact."""
    tokens = prompt(6)
    cache, server = put(real_server, tier, tokens, second)
    if way == "evict":
        cache._state.link.administer(operations.evict(operations.Bounds(2, None, None), 100))
        kept = 2
    elif way == "clear":
        cache.clear()
        kept = 0
    else:
        chain = bytes.fromhex("".join(heads(tokens)[:3]))
        for holder in ("@cold", "@warm"):
            cache._state.link.publish(operations.trim(chain, holder, 1))
        kept = 2
    if way != "clear":
        sound(real_server, cache, server)
        assert loaded(cache, tokens) == data(tokens)[:kept]
    assert len(names(real_server.admin, real_server, "kv:")) == (kept if tier == "warm" else 0)
    if tier == "elsewhere":
        cache.demote(0)
        there = {name for name in names(server, real_server, "cold:") if server.ttl(real_server.keys.base + name) == -1}
        assert len(there) == kept
        assert names(real_server.admin, real_server, "trash") == set()
    else:
        assert len(names(server, real_server, "cold:")) == (kept if tier == "here" else 0)
    assert meta(real_server, "cold" if tier == "warm" else "warm") == 0
    if not kept:
        assert (meta(real_server, "warm"), meta(real_server, "cold"), meta(real_server, "bytes")) == (0, 0, 0)


def test_payloads_count_in_the_budget(real_server: Backend) -> None:
    """Over l2_max_bytes a store evicts the few chunks that are too many, not whole chains."""
    cache = real_server.open(l2_max_bytes=MIB, high_watermark=1.0, low_watermark=0.9)
    for number in range(20):
        tokens = [number + 7] * 40
        assert cache.store(tokens, data(tokens, 10_000)) == 10
    left = sum(len(loaded(cache, [number + 7] * 40)) for number in range(20))
    assert 85 <= left <= 104
    assert 0.75 * MIB < meta(real_server, "bytes") <= MIB
    sound(real_server, cache)


def test_cold_budget(real_server: Backend) -> None:
    """Over cold_max_bytes a demotion evicts."""
    cache = real_server.open(cold_codec="raw", cold_max_bytes=25_000)
    for number in range(5):
        tokens = [number + 7] * 16
        cache.store(tokens, data(tokens, 2_500))
    demote(real_server, cache)
    assert 0 < meta(real_server, "cold") <= 25_000
    sound(real_server, cache)


def test_a_crash_before_the_tree_leaves_what_ends(real_server: Backend) -> None:
    """Bytes that the tree was never told of have an end, count for nothing, and a later store takes them over."""
    cache = real_server.open()
    store = cache._tiers.payloads.warm
    pairs = list(zip(map(bytes.fromhex, heads(prompt(3))), data(prompt(3)), strict=True))
    store.write(pairs, time.monotonic() + 10)
    before = real_server.dump()
    for name in names(real_server.admin, real_server, "kv:"):
        assert 0 < int(real_server.admin.pttl(real_server.keys.base + name)) <= 600_000  # pyright: ignore[reportArgumentType]
    assert loaded(cache, prompt(3)) == []
    assert {name for name in before if ":n:" in name} == set()
    sound(real_server, cache)
    assert cache.store(prompt(3), data(prompt(3))) == 3
    sound(real_server, cache)
    assert loaded(cache, prompt(3)) == data(prompt(3))


# Failures


def test_the_index_opens_no_data_connection(real_server: Backend, second: Server) -> None:
    """Who publishes and looks up never opens the connections for payloads."""
    before: Any = second.client().info("clients")
    cache = real_server.open(cold_url=second.url)
    cache.cache_prefix(prompt(4), range(4))
    assert cache.find_longest_cache_hit(prompt(4)).matched_chunks == 4
    assert cache.load(prompt(4)).chunks == 0
    cache.maintain()
    cache.flush()
    assert [pool.calls for pool in cache._tiers.pools.values()] == [0, 0]
    after: Any = second.client().info("clients")
    assert after["connected_clients"] <= before["connected_clients"] + 1


@pytest.mark.parametrize("how", ["freeze", "kill"])
def test_server_gone(own: Backend, own_server: Server, how: str) -> None:
    """Without Redis a store and a load return within their time with what there is, and are counted."""
    cache = own.open(
        strict=False, payload_timeout_s=0.5, publish_timeout_s=0.3, lookup_timeout_s=0.3, breaker_failures=10_000
    )
    assert cache.store(prompt(4), data(prompt(4))) == 4
    getattr(own_server, how)()
    begun = time.monotonic()
    assert cache.load(prompt(4)).chunks == 0
    assert cache.store(prompt(6), data(prompt(6))) == 0
    assert time.monotonic() - begun < 2.5
    assert (metric(cache, "loads_failed"), metric(cache, "stores_failed")) == (1, 1)
    if how == "freeze":
        own_server.thaw()
        assert loaded(cache, prompt(4)) == data(prompt(4))
        assert cache.store(prompt(6), data(prompt(6))) == 6
        sound(own, cache)
    else:
        own_server.start()
        assert cache.load(prompt(4)).chunks == 0
        assert cache.store(prompt(6), data(prompt(6))) == 6
        assert loaded(cache, prompt(6)) == data(prompt(6))
        sound(own, cache)


def test_out_of_memory(own: Backend) -> None:
    """A server that is full refuses a store, which is counted, keeps what it has, and takes it when there is room."""
    cache = own.open(strict=False)
    assert cache.store(prompt(2), data(prompt(2))) == 2
    used: Any = own.admin.info("memory")["used_memory"]  # pyright: ignore[reportIndexIssue]
    own.admin.config_set("maxmemory", used + 4 * MIB)
    tokens = prompt(8)
    assert cache.store(tokens, data(prompt(2)) + [Random(at).randbytes(2 * MIB) for at in range(6)]) == 2
    assert metric(cache, "stores_failed") == 1
    assert loaded(cache, tokens) == data(prompt(2))
    sound(own, cache)
    own.admin.config_set("maxmemory", 0)
    assert cache.store(prompt(8), data(prompt(8))) == 8
    sound(own, cache)


def test_load_from_a_chunk_on(real_server: Backend) -> None:
    """Who has the first chunks itself loads the others alone; the first bad one ends that, and is told."""
    cache, payloads = real_server.open(), data(prompt(6))
    cache.store(prompt(6), payloads)
    into = [bytearray(1000) for _ in range(3)]
    assert cache.load(prompt(6), into, first=2).chunks == 3
    assert into == payloads[2:5]
    assert list(map(bytes, cache.load(prompt(6), first=4).payloads)) == payloads[4:]
    assert list(map(bytes, cache.load(prompt(6), first=1, most=2).payloads)) == payloads[1:2]
    assert cache.load(prompt(6), first=6).chunks == cache.load(prompt(6), first=9).chunks == 0
    assert metric(cache, "payloads_loaded") == 3 + 2 + 1
    delete(real_server.admin, real_server.keys.payload(heads(prompt(6))[3]), "")
    assert cache.load(prompt(6), first=2).chunks == 1
    assert metric(cache, "payloads_missing") == 1
    assert loaded(cache, prompt(6)) == payloads[:3]
    sound(real_server, cache)
    with pytest.raises(InvalidInputError, match="first is -1"):
        cache.load(prompt(6), first=-1)


# Batches


def test_a_batch_writes_what_its_prompts_share_once(real_server: Backend) -> None:
    """Prompts that are stored together are all there then, and what they share went over the wire once."""
    cache = real_server.open()
    one, other = prompt(6), prompt(6, tail=3)
    assert cache.store_batch([(one, data(one, MIB)), (other, data(other, MIB)), (prompt(2), [None, None])]) == [6, 6, 2]
    assert cache._tiers.payloads.warm.pool.bytes_out < 9.1 * MIB
    assert metric(cache, "payloads_stored") == 9
    assert (loaded(cache, one), loaded(cache, other)) == (data(one, MIB), data(other, MIB))
    assert cache.store_batch([]) == []
    sound(real_server, cache)
    with pytest.raises(InvalidInputError, match="3 payloads do not fit 2"):
        cache.store_batch([([7] * 8, data([7] * 8)), (prompt(2), data(prompt(3)))])  # nothing of it
    assert cache.load([7] * 8).chunks == 0


@pytest.mark.parametrize("l1", [0, MIB])
def test_a_batch_fills_every_buffer(real_server: Backend, l1: int) -> None:
    """Prompts that are loaded together each get their bytes into their own buffers, in one read, shared ones too."""
    one, other = prompt(6), prompt(6, tail=3)
    real_server.open("w0").store_batch([(one, data(one)), (other, data(other))])
    cache = real_server.open("w1", l1_payload_bytes=l1)
    into = [[bytearray(1000) for _ in range(count)] for count in (6, 6, 2)]
    prompts: list[Any] = [cache.find_longest_cache_hit(one), other, one]
    found = cache.load_batch(list(zip(prompts, into, strict=True)))
    assert [each.chunks for each in found] == [6, 6, 2]
    assert [list(map(bytes, each)) for each in into] == [data(one), data(other), data(one)[:2]]
    for each, buffers in zip(found, into, strict=True):
        assert [view.obj for view in each.payloads] == buffers
    assert cache._tiers.payloads.warm.pool.calls == 1
    assert [each.chunks for each in cache.load_batch([(one, None), ([7] * 8, None)])] == [6, 0]
    assert cache.load_batch([]) == []


def test_damage_ends_one_prompt_of_a_batch(real_server: Backend) -> None:
    """A damaged payload ends the prompts that have it, and no other one."""
    cache = real_server.open()
    one, other, third = prompt(6), prompt(6, tail=3), [7] * 16
    cache.store_batch([(tokens, data(tokens)) for tokens in (one, other, third)])
    flip(real_server.admin, real_server.keys.payload(heads(one)[4]), "")
    found = cache.load_batch([(tokens, None) for tokens in (one, other, third)])
    assert [list(map(bytes, each.payloads)) for each in found] == [data(one)[:4], data(other), data(third)]
    assert metric(cache, "payloads_damaged") == 1
    sound(real_server, cache)


# L1


def test_l1_keeps_payloads_within_its_bound(real_server: Backend) -> None:
    """Payloads that were loaded come from L1 as long as they fit, the latest ones, and are right."""
    real_server.open("w0").store(prompt(6), data(prompt(6)))
    cache = real_server.open("w1", l1_payload_bytes=3500)
    pool = cache._tiers.payloads.warm.pool
    assert loaded(cache, prompt(6)) == data(prompt(6))
    assert metric(cache, "l1_payload_bytes_used") == 3000
    calls = pool.calls
    assert loaded(cache, prompt(6)) == data(prompt(6))
    assert metric(cache, "l1_payload_hits") == 3
    assert metric(cache, "l1_payload_bytes_used") <= 3500
    large = real_server.open("w2", l1_payload_bytes=MIB)
    assert loaded(large, prompt(6)) == data(prompt(6))
    pool, calls = large._tiers.payloads.warm.pool, large._tiers.payloads.warm.pool.calls
    into = [bytearray(1000) for _ in range(6)]
    large.load(prompt(6), into)
    assert [bytes(buffer) for buffer in into] == data(prompt(6))
    into[0][0] ^= 1
    assert loaded(large, prompt(6)) == data(prompt(6))
    assert pool.calls == calls
    assert large.load(prompt(1), [bytearray(999)]).chunks == 0
    assert metric(large, "payloads_unfit") == 1


def test_concurrent_loads_are_one_read(real_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads that load the same chunks at once read them once."""
    real_server.open("w0").store(prompt(4), data(prompt(4)))
    cache = real_server.open("w1", l1_payload_bytes=MIB)
    store: Any = cache._tiers.payloads.warm
    read, asked = store.read, list[bytes]()

    def slow(wants: Sequence[Want], deadline: float) -> Any:
        asked.extend(want.chunk for want in wants)
        time.sleep(0.2)
        return read(wants, deadline)

    monkeypatch.setattr(store, "read", slow)
    found: list[list[bytes]] = []
    threads = [threading.Thread(target=lambda: found.append(loaded(cache, prompt(4)))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [data(prompt(4))] * 6
    assert len(asked) == 4
    assert store.pool.calls == 1


def test_a_failed_read_leaves_nobody_waiting(real_server: Backend) -> None:
    """When a read fails or is refused, the next load of the chunk reads by itself."""
    real_server.open("w0").store(prompt(2), data(prompt(2)))
    cache = real_server.open("w1", l1_payload_bytes=MIB)
    assert cache.load(prompt(2), [bytearray(1), bytearray(1000)]).chunks == 0
    begun = time.monotonic()
    assert loaded(cache, prompt(2)) == data(prompt(2))
    small = real_server.open("w2", l1_payload_bytes=1500)
    assert loaded(small, prompt(2)) == data(prompt(2))
    # The first has to be read, the second lies in L1.
    assert small.load(prompt(2), [bytearray(1000), bytearray(1)]).chunks == 1
    assert (metric(cache, "payloads_unfit"), metric(small, "payloads_unfit")) == (1, 1)
    assert loaded(small, prompt(2)) == data(prompt(2))
    assert time.monotonic() - begun < 5
