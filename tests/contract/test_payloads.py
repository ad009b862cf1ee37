"""Payloads in a warm and a cold tier: the bytes come back as they went in, or the hit is a clean, shorter one."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

import pytest
import redis
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from distprefix import PrefixCacheOptimizer, operations
from distprefix.errors import InvalidInputError, UnavailableError
from distprefix.redis.integrity import check_payloads
from distprefix.tiers.envelope import HEADER_BYTES
from distprefix.tiers.store import PART_BYTES, Want
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.servers import Backend, Server, find_server

MIB = 1 << 20
ALWAYS = -60.0
"""An idle time that everything has reached."""
TIERS = ("warm", "here", "elsewhere")
KEYS = "1:" + "11" * 32


def data(tokens: Sequence[int], size: int = 1000) -> list[bytes]:
    """A payload for each chunk, other for other chunks, that a codec can make a little smaller."""
    return [Random(head).randbytes(size // 2) + bytes(size - size // 2) for head in heads(list(tokens))]


def loaded(cache: PrefixCacheOptimizer, tokens: Sequence[int]) -> list[bytes]:
    """What a load gives."""
    result = cache.load(tokens)
    assert result.chunks == len(result.payloads)
    return [bytes(payload) for payload in result.payloads]


def metric(cache: PrefixCacheOptimizer, name: str) -> int:
    """A count of this process."""
    return cache.get_metrics()[name]


def demote(backend: Backend, cache: PrefixCacheOptimizer) -> int:
    """Make everything cold that can be; nobody else is moving anything."""
    moved = done = 0
    while done or not moved:
        for key in backend.admin.scan_iter(match=backend.keys.moving("*"), count=1000):
            backend.admin.delete(key)
        done = cache.demote(ALWAYS)
        moved += done
        if not done:
            break
    return moved


def names(admin: redis.Redis, backend: Backend, kind: str) -> set[str]:
    """Keys of a kind, without what they all begin with."""
    base = backend.keys.base
    return {name.decode().removeprefix(base) for name in admin.scan_iter(match=f"{base}{kind}*", count=1000)}


def meta(backend: Backend, name: str) -> int:
    """A count of the shard."""
    found: Any = backend.admin.hget(backend.keys.meta, name)
    return int(found or 0)


def sound(backend: Backend, cache: PrefixCacheOptimizer, cold: redis.Redis | None = None) -> None:
    """The tree is sound, and payloads in both tiers are just those that it names; what it dropped is in the trash."""
    assert cache.check_integrity().problems == []
    assert check_payloads(backend.admin, backend.keys, cold) == []


@pytest.fixture(scope="module")
def second() -> Iterator[Server]:
    """A server for cold payloads, shared by the tests that leave it running."""
    server = Server(find_server("valkey-9.1")).start()
    yield server
    server.stop()


@pytest.fixture
def third() -> Iterator[Server]:
    """A server for cold payloads that the test may stop."""
    server = Server(find_server("valkey-9.1")).start()
    yield server
    server.stop()


@pytest.fixture
def own(own_server: Server) -> Iterator[Backend]:
    """Caches on a server that the test may stop."""
    backend = Backend("own", own_server.client(), "t", url=own_server.url)
    yield backend
    own_server.thaw()
    backend.close()


def where(tier: str, second: Server) -> dict[str, Any]:
    """Settings for a tier."""
    return {"cold_url": second.url} if tier == "elsewhere" else {}


def put(backend: Backend, tier: str, tokens: list[int], second: Server, size: int = 1000, **more: Any) -> Any:
    """A cache, and the server of the tier in which a prompt's payloads lie."""
    cache = backend.open(**{**where(tier, second), **more})
    assert cache.store(tokens, data(tokens, size)) == len(tokens) // 4
    if tier != "warm":
        assert demote(backend, cache) == len(tokens) // 4
    return cache, second.client() if tier == "elsewhere" else backend.admin


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
    parts = {name for name in names(real_server.admin, real_server, "kv:") if name.count(":") == 2}
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
    assert names(real_server.admin, real_server, "") <= {"log", "trash", "meta"}
    assert (meta(real_server, "warm"), meta(real_server, "cold")) == (0, 0)


def test_every_server_keeps_payloads(any_server: Backend) -> None:
    """The round trip through both tiers on each server that is claimed, as the user of a worker where there is one."""
    if not any_server.is_real:
        pytest.skip("fakeredis has no socket for the data path")
    cache, tokens = any_server.open("w1"), prompt(4)
    assert cache.store(tokens, data(tokens)) == 4
    assert loaded(cache, tokens) == data(tokens)
    assert cache.demote(0.0) == 4
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


def test_load_into_buffers(real_server: Backend) -> None:
    """A load fills the caller's own memory, no more than asked for, and refuses what does not fit."""
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
        with pytest.raises(InvalidInputError):
            cache.load(prompt(4), [views[0], bytearray(wrong)])
    with pytest.raises(InvalidInputError):
        cache.load(prompt(4), [bytes(1000)])
    with pytest.raises(InvalidInputError):
        cache.store(prompt(2), payloads)
    assert loaded(cache, prompt(4)) == payloads
    sound(real_server, cache)


# Damage


def _flip(admin: redis.Redis, key: str, _: str) -> None:
    value: Any = admin.get(key)
    admin.setrange(key, len(value) // 2, bytes([value[len(value) // 2] ^ 1]))


def _cut(admin: redis.Redis, key: str, _: str) -> None:
    value: Any = admin.get(key)
    admin.set(key, value[:-1])


def _delete(admin: redis.Redis, key: str, _: str) -> None:
    admin.delete(key)


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
    for damage in (_flip, _cut, _delete, _swap, _codec, _hash)
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
    reason = "missing" if damage in (_delete, _hash) else "damaged"
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
    _flip(real_server.admin, real_server.keys.payload(heads(prompt(8))[2]), "")
    assert loaded(cache, prompt(8)) == data(prompt(8))[:2]
    sound(real_server, cache)
    assert len(names(real_server.admin, real_server, "kv:") | names(real_server.admin, real_server, "cold:")) == 2


def test_a_part_is_missing(real_server: Backend) -> None:
    """A payload without one of its parts is missing, and its other parts go."""
    cache, big = real_server.open(), [bytes(20 * MIB)] * 2
    assert cache.store(prompt(2), big) == 2
    real_server.admin.delete(real_server.keys.payload(heads(prompt(2))[1], 1))
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


# Between the tiers


@pytest.mark.parametrize("tier", TIERS[1:])
def test_demotion_goes_from_the_leaves_up(real_server: Backend, second: Server, tier: str) -> None:
    """Only what is idle becomes cold, leaves first, and no node while one behind it is warm."""
    cache = real_server.open(**where(tier, second))
    server = second.client() if tier == "elsewhere" else real_server.admin
    one, other = prompt(6), prompt(6, tail=3)
    for tokens in (one, other):
        cache.store(tokens, data(tokens))
    assert cache.demote(3600) == 0
    key = real_server.keys.node(heads(other)[3])
    real_server.admin.hset(key, "a", str(int(time.time() * 1000) + 3_600_000))
    assert demote(real_server, cache) == 3
    assert len(names(server, real_server, "cold:")) == 3
    real_server.admin.hset(key, "a", "1")
    assert demote(real_server, cache) == 6
    sound(real_server, cache, server)
    assert names(real_server.admin, real_server, "kv:") == set()
    assert (loaded(cache, one), loaded(cache, other)) == (data(one), data(other))
    assert cache.promote(one) == 6
    assert cache.promote(one) == 0
    sound(real_server, cache, server)
    assert len(names(real_server.admin, real_server, "kv:")) == 6
    assert (loaded(cache, one), loaded(cache, other)) == (data(one), data(other))


@pytest.mark.parametrize("change", ["split", "trim", "grow", "promote", "evict"])
@pytest.mark.parametrize("tier", TIERS[1:])
def test_a_node_that_changes_is_left_alone(
    real_server: Backend, second: Server, tier: str, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node that another one split, cut, extended or moved between copy and move stays what the other made it."""
    tokens = prompt(6)
    cache, other = (real_server.open(who, **where(tier, second)) for who in ("w1", "w2"))
    server = second.client() if tier == "elsewhere" else real_server.admin
    cache.store(tokens, data(tokens))
    cold: Any = cache._tiers.payloads.cold
    copy = cold.copy
    todo = [True]

    def hooked(*args: Any) -> Any:
        size = copy(*args)
        if todo:
            todo.pop()
            if change == "split":
                fork = prompt(6, tail=3)
                assert other.store(fork, data(fork)) == 6
            elif change == "grow":
                assert other.store(prompt(8), data(prompt(8))) == 8
            elif change == "promote":
                demote(real_server, other)
                other.promote(tokens)
            elif change == "evict":
                other._state.link.administer(operations.evict(operations.Bounds(0, None, None), 100))
            else:
                other._state.link.publish(operations.trim(bytes.fromhex("".join(heads(tokens)[:3])), "@warm", 1))
        return size

    monkeypatch.setattr(cold, "copy", hooked)
    cache.demote(ALWAYS)
    sound(real_server, cache, server)
    expected = {"trim": 2, "evict": 0}.get(change, 6)
    assert loaded(cache, tokens) == data(tokens)[:expected]
    monkeypatch.undo()
    demote(real_server, cache)
    sound(real_server, cache, server)
    assert loaded(cache, tokens) == data(tokens)[:expected]


@pytest.mark.parametrize("tier", TIERS[1:])
def test_two_demote_at_once(real_server: Backend, second: Server, tier: str) -> None:
    """Two processes that demote at once move each chunk once."""
    caches = [real_server.open(f"w{at}", **where(tier, second)) for at in range(2)]
    prompts = [[number + 7] * 16 for number in range(30)]
    for tokens in prompts:
        caches[0].store(tokens, data(tokens))
    moved: list[int] = []

    def run(cache: PrefixCacheOptimizer) -> None:
        moved.append(cache.demote(ALWAYS))

    threads = [threading.Thread(target=run, args=(cache,)) for cache in caches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(moved) == 120
    sound(real_server, caches[0], second.client() if tier == "elsewhere" else real_server.admin)
    assert all(loaded(caches[0], tokens) == data(tokens) for tokens in prompts)


@pytest.mark.parametrize("tier", TIERS[1:])
def test_a_load_promotes_in_the_background(real_server: Backend, second: Server, tier: str) -> None:
    """What a load found cold is served at once and soon is warm."""
    cache, server = put(real_server, tier, prompt(4), second, touch_interval_s=0.05)
    assert loaded(cache, prompt(4)) == data(prompt(4))
    until = time.monotonic() + 10
    while metric(cache, "promoted_chunks") < 4 and time.monotonic() < until:
        time.sleep(0.02)
    assert metric(cache, "promoted_chunks") == 4
    sound(real_server, cache, server)
    assert meta(real_server, "cold") == 0
    assert loaded(cache, prompt(4)) == data(prompt(4))


@pytest.mark.parametrize("tier", TIERS[1:])
@pytest.mark.parametrize("fork", [0, 2])
def test_store_behind_what_is_cold(real_server: Backend, second: Server, tier: str, fork: int) -> None:
    """A prompt that goes on from a cold one, at its end or in its middle, brings back what lies above it."""
    cache, server = put(real_server, tier, prompt(4), second)
    longer = prompt(6, tail=fork)
    assert cache.store(longer, data(longer)) == 6
    assert loaded(cache, longer) == data(longer)
    assert loaded(cache, prompt(4)) == data(prompt(4))
    sound(real_server, cache, server)
    demote(real_server, cache)
    sound(real_server, cache, server)
    assert meta(real_server, "warm") == 0
    assert (loaded(cache, longer), loaded(cache, prompt(4))) == (data(longer), data(prompt(4)))


@pytest.mark.parametrize("tier", TIERS[1:])
def test_promotion_of_a_part_of_a_node(real_server: Backend, second: Server, tier: str) -> None:
    """A shorter prompt of a cold chain is promoted as far as it goes, or with all of its node."""
    cache, server = put(real_server, tier, prompt(6), second)
    assert cache.promote(prompt(3)) == 3
    assert cache.promote(prompt(3)) == 0
    sound(real_server, cache, server)
    assert loaded(cache, prompt(6)) == data(prompt(6))
    assert len(names(real_server.admin, real_server, "kv:")) == 3
    assert cache.promote(prompt(5)) == 2
    sound(real_server, cache, server)
    assert demote(real_server, cache) == 5
    sound(real_server, cache, server)
    assert loaded(cache, prompt(6)) == data(prompt(6))
    assert cache.promote(prompt(2)) == 2
    assert cache.promote(prompt(6)) == 4
    sound(real_server, cache, server)
    assert meta(real_server, "cold") == 0
    assert loaded(cache, prompt(6)) == data(prompt(6))


@pytest.mark.parametrize("loss", ["missing", "other"])
@pytest.mark.parametrize("tier", TIERS[1:])
def test_copies_that_are_not_what_was_written(real_server: Backend, second: Server, tier: str, loss: str) -> None:
    """A copy that went, or that another one packed otherwise, does not count: nothing is lost, and none stays."""
    cache = real_server.open(**where(tier, second))
    server = second.client() if tier == "elsewhere" else real_server.admin
    cache.store(prompt(4), data(prompt(4)))
    cold: Any = cache._tiers.payloads.cold
    if loss == "missing":
        if tier == "elsewhere":
            return  # no script can see it there; a load finds it missing
        copy = cold.copy
        last = real_server.keys.payload(heads(prompt(4))[3], cold=True)

        def hooked(*args: Any) -> Any:
            size = copy(*args)
            real_server.admin.delete(last)
            return size

        cold.copy = hooked
    else:
        other: Any = real_server.open("w2", cold_codec="raw", **where(tier, second))._tiers.payloads.cold
        pairs = zip(map(bytes.fromhex, heads(prompt(4))), data(prompt(4)), strict=True)
        other.write(list(pairs), time.monotonic() + 10)
    cache.demote(ALWAYS)
    assert loaded(cache, prompt(4)) == data(prompt(4))
    sound(real_server, cache, server)


@pytest.mark.parametrize("tier", TIERS[1:])
@pytest.mark.parametrize("is_cold", [False, True])
def test_what_is_moved_during_a_load_is_found(
    real_server: Backend, second: Server, tier: str, is_cold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payload that was moved after a load saw where it lies is read there, and nothing is trimmed."""
    tokens = prompt(4)
    cache, server = put(real_server, tier if is_cold else "warm", tokens, second, **where(tier, second))
    server = second.client() if tier == "elsewhere" else real_server.admin
    other = real_server.open("w2", **where(tier, second))
    payloads = cache._tiers.payloads
    store: Any = payloads.cold if is_cold else payloads.warm
    read, todo = store.read, [True]

    def hooked(*args: Any) -> Any:
        if todo:
            todo.pop()
            _ = other.promote(tokens) if is_cold else demote(real_server, other)
            if is_cold and tier == "elsewhere":
                for chunk in heads(tokens):
                    server.delete(real_server.keys.payload(chunk, cold=True))  # the trash was emptied long ago
                real_server.admin.delete(real_server.keys.trash)
        return read(*args)

    monkeypatch.setattr(store, "read", hooked)
    assert loaded(cache, tokens) == data(tokens)
    assert not todo
    assert metric(cache, "payloads_missing") == 0
    sound(real_server, cache, server)


# The other server


def test_cold_server_down(own: Backend, third: Server) -> None:
    """Without the server of the cold tier warm goes on, a load ends at the first cold chunk, and nothing is trimmed."""
    cache = own.open(cold_url=third.url, payload_timeout_s=1.0, strict=False)
    one, other = prompt(6), prompt(6, tail=3)
    for tokens in (one, other):
        cache.store(tokens, data(tokens))
    assert cache.demote(ALWAYS) == 6
    third.freeze()
    begun = time.monotonic()
    assert loaded(cache, one) == data(one)[:3]
    assert time.monotonic() - begun < 2
    assert metric(cache, "payloads_unavailable") == 1
    fresh = prompt(3, tail=1)
    assert cache.store(fresh, data(fresh)) == 3
    assert loaded(cache, fresh) == data(fresh)
    begun = time.monotonic()
    with pytest.raises(UnavailableError):
        cache.demote(ALWAYS, timeout_s=0.5)
    assert time.monotonic() - begun < 3
    third.thaw()
    assert loaded(cache, one) == data(one)
    third.restart()
    assert loaded(cache, one) == data(one)[:3]
    assert metric(cache, "payloads_missing") == 1
    sound_without = own.admin.hget(own.keys.meta, "cold")
    assert int(sound_without or 0) > 0  # pyright: ignore[reportArgumentType]
    assert loaded(cache, other) == data(other)[:3]
    sound(own, cache, third.client())
    assert cache.store(one, data(one)) == 6
    assert loaded(cache, one) == data(one)


def test_a_crash_before_settling_is_made_good(
    real_server: Backend, second: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that became cold and were not told to stay are told by whoever demotes next."""
    cache = real_server.open(cold_url=second.url)
    server = second.client()
    cache.store(prompt(4), data(prompt(4)))
    assert cache._tiers.payloads.demote(time.monotonic() + 10, ALWAYS) == 4
    ends: Any = [server.pttl(real_server.keys.base + name) for name in names(server, real_server, "cold:")]
    assert len(ends) == 4
    assert all(end > 0 for end in ends)
    assert loaded(cache, prompt(4)) == data(prompt(4))
    real_server.open("w2", cold_url=second.url).demote(3600)
    assert {server.pttl(real_server.keys.base + name) for name in names(server, real_server, "cold:")} == {-1}
    assert names(real_server.admin, real_server, "unsettled") == set()
    sound(real_server, cache, server)


def test_trash_is_emptied_and_what_comes_back_stays(real_server: Backend, second: Server) -> None:
    """What is promoted ends on the other server, and what becomes cold again meanwhile does not."""
    cache, server = put(real_server, "elsewhere", prompt(4), second)
    assert cache.promote(prompt(4)) == 4
    assert len(names(server, real_server, "cold:")) == 4
    trash: Any = real_server.admin.scard(real_server.keys.trash)
    assert trash == 4
    cache.demote(3600)
    ends: Any = [server.ttl(real_server.keys.base + name) for name in names(server, real_server, "cold:")]
    assert len(ends) == 4
    assert all(0 < end <= 120 for end in ends)
    assert names(real_server.admin, real_server, "trash") == set()
    assert demote(real_server, cache) == 4
    sound(real_server, cache, server)
    assert {server.ttl(real_server.keys.base + name) for name in names(server, real_server, "cold:")} == {-1}
    assert cache.promote(prompt(4)) == 4
    assert demote(real_server, cache) == 4
    assert {server.ttl(real_server.keys.base + name) for name in names(server, real_server, "cold:")} == {-1}
    sound(real_server, cache, server)


def test_trash_that_comes_back_while_it_is_emptied(
    real_server: Backend, second: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chunk that becomes cold again between being told to end and leaving the trash is told to stay."""
    cache, server = put(real_server, "elsewhere", prompt(2), second)
    cache.promote(prompt(2))
    elsewhere: Any = cache._tiers._elsewhere
    each = elsewhere._each
    other = real_server.open("w2", cold_url=second.url)
    todo = [True]

    def hooked(run: bytes, command: str, *args: Any) -> None:
        each(run, command, *args)
        if todo and command == "EXPIRE":
            todo.pop()
            demote(real_server, other)

    monkeypatch.setattr(elsewhere, "_each", hooked)
    cache.demote(3600)
    assert not todo
    assert {server.ttl(real_server.keys.base + name) for name in names(server, real_server, "cold:")} == {-1}
    sound(real_server, cache, server)
    assert loaded(cache, prompt(2)) == data(prompt(2))


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
    assert not cache._tiers.payloads.warm._pool
    cold = cache._tiers.payloads.cold
    assert cold is not None
    assert not cold._pool
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
    with pytest.raises(InvalidInputError):
        large.load(prompt(1), [bytearray(999)])


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
    with pytest.raises(InvalidInputError):
        cache.load(prompt(2), [bytearray(1), bytearray(1000)])
    begun = time.monotonic()
    assert loaded(cache, prompt(2)) == data(prompt(2))
    small = real_server.open("w2", l1_payload_bytes=1500)
    assert loaded(small, prompt(2)) == data(prompt(2))
    with pytest.raises(InvalidInputError):
        small.load(prompt(2), [bytearray(1000), bytearray(1)])  # the first has to be read, the second lies in L1
    assert loaded(small, prompt(2)) == data(prompt(2))
    assert time.monotonic() - begun < 5


# Random histories

PROMPTS: dict[int, list[int]] = {
    0: prompt(2),
    1: prompt(5),
    2: prompt(5, tail=2),
    3: prompt(7, tail=4),
    4: [9] * 12,
}
WHICH = st.sampled_from(sorted(PROMPTS))
EXAMPLES = 12
_numbers = itertools.count()


class Histories(RuleBasedStateMachine):
    """Two workers that store, load, move, evict and damage, and what is there at least."""

    def __init__(self, backend: Backend, second: Server, tier: str) -> None:
        super().__init__()
        space = f"{backend.namespace}-{next(_numbers)}"
        self.backend = Backend(backend.name, backend.admin, space, url=backend.url)
        options = {"max_run": 3, **where(tier, second)}
        self.caches = [self.backend.open(f"w{at}", **options) for at in range(2)]
        self.server = second.client() if tier == "elsewhere" else backend.admin
        self.least: dict[int, int] = {}
        """Chunks of a prompt that must be there."""

    def teardown(self) -> None:
        """Remove everything."""
        self.caches[0].clear()
        self.backend.close()

    @rule(which=WHICH, who=st.integers(0, 1), most=st.integers(1, 7))
    def store(self, which: int, who: int, most: int) -> None:
        """Store some leading chunks: all of them are there then."""
        payloads = data(PROMPTS[which])[:most]
        stored = self.caches[who].store(PROMPTS[which], payloads)
        assert stored >= len(payloads)
        self.least[which] = max(self.least.get(which, 0), stored)

    @rule(which=WHICH, who=st.integers(0, 1))
    def load(self, which: int, who: int) -> None:
        """Load: right bytes, and all that must be there."""
        found = loaded(self.caches[who], PROMPTS[which])
        assert found == data(PROMPTS[which])[: len(found)]
        assert len(found) >= self.least.get(which, 0)

    @rule(who=st.integers(0, 1))
    def demote(self, who: int) -> None:
        """Make cold what can be, one level."""
        for name in names(self.backend.admin, self.backend, "moving:"):
            self.backend.admin.delete(self.backend.keys.base + name)
        self.caches[who].demote(ALWAYS)

    @rule(which=WHICH, who=st.integers(0, 1))
    def promote(self, which: int, who: int) -> None:
        """Make warm what is cold."""
        self.caches[who].promote(PROMPTS[which])

    @rule(chunks=st.integers(0, 12))
    def evict(self, chunks: int) -> None:
        """Keep so many chunks."""
        self.caches[0]._state.link.administer(operations.evict(operations.Bounds(chunks, None, None), 100))
        self.least.clear()

    @rule(which=WHICH, at=st.integers(0, 6), cold=st.booleans(), damage=st.sampled_from((_flip, _cut, _delete)))
    def damage(self, which: int, at: int, cold: bool, damage: Callable[..., None]) -> None:
        """Damage a payload, if it is there; a load finds it."""
        chunks, server = heads(PROMPTS[which]), self.server if cold else self.backend.admin
        key = self.backend.keys.payload(chunks[min(at, len(chunks) - 1)], cold=cold)
        if server.exists(key) and server.ttl(key) == -1:
            damage(server, key, "")
            self.least.clear()
            for tokens in PROMPTS.values():
                found = loaded(self.caches[0], tokens)
                assert found == data(tokens)[: len(found)]
            trash: Any = self.backend.admin.smembers(self.backend.keys.trash)
            if damage is not _delete and key.rsplit(":", 1)[1].encode() in trash:
                server.delete(key)

    @rule()
    def clear(self) -> None:
        """Empty everything."""
        self.caches[1].clear()
        self.least.clear()

    @invariant()
    def is_sound(self) -> None:
        """Nothing is wrong, nothing leaks."""
        if self.backend.admin.exists(self.backend.keys.meta):
            sound(self.backend, self.caches[0], self.server)


@pytest.mark.parametrize("tier", TIERS[1:])
def test_random_histories(real_server: Backend, second: Server, tier: str) -> None:
    """Whatever happens, bytes are right or the hit is shorter, the tree is sound and no payload is left over."""
    machine: Any = lambda: Histories(real_server, second, tier)  # noqa: E731 - it is called without arguments
    run_state_machine_as_test(machine, settings=settings(max_examples=EXAMPLES, stateful_step_count=18))
