"""Payloads between the tiers, and on another server: they count in one of both, and none is lost or left over."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer, operations
from distprefix.errors import UnavailableError
from distprefix.tiers import moving
from tests.contract.test_failures import wait_until
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.payloads import ALWAYS, TIERS, data, demote, loaded, meta, metric, names, put, sound, where
from tests.servers import Backend, Server

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
    cache = own.open(cold_url=third.url, payload_timeout_s=1.0, breaker_reset_s=0.05, strict=False)
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
    wait_until(lambda: loaded(cache, one) == data(one))
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
    assert moving.demote(cache._tiers.payloads, time.monotonic() + 10, ALWAYS) == 4
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

    def hooked(run: bytes, deadline: float, command: str, *args: Any) -> None:
        each(run, deadline, command, *args)
        if todo and command == "EXPIRE":
            todo.pop()
            demote(real_server, other)

    monkeypatch.setattr(elsewhere, "_each", hooked)
    cache.demote(3600)
    assert not todo
    assert {server.ttl(real_server.keys.base + name) for name in names(server, real_server, "cold:")} == {-1}
    sound(real_server, cache, server)
    assert loaded(cache, prompt(2)) == data(prompt(2))
