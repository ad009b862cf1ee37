"""The roster in pages: what changes between two of them is not missed; members that are gone for good are forgotten."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest

from distprefix import PrefixCacheOptimizer
from distprefix.forget import forget_members
from distprefix.redis import roster as pages
from distprefix.redis.roster import heartbeat, read_members, read_roster, register, retire
from distprefix.roster import Reading
from tests.contract.test_find import prompt
from tests.servers import Backend
from tests.workers import LONG_S, calls_of, held, learn, let_lease_end

DAY_MS = 86_400_000


def registered(cache: PrefixCacheOptimizer, count: int, lease_s: float = 0.0) -> list[str]:
    """Members that took an epoch, in this order."""
    link = cache._state.link
    names = [f"m{i}/0" for i in range(count)]
    for name in names:
        register(link.admin, link.keys, name, 0, lease_s, None, time.monotonic() + 60)
    return names


def read(
    cache: PrefixCacheOptimizer, version: str = "", between: Callable[[int], object] = lambda _: None
) -> tuple[Reading, int]:
    """A reading with all leases, four members a page; something happens before each call. And the calls it took."""
    link = cache._state.link
    client, calls = link.admin, 0
    call = client.call

    def spied(script: str, *args: Any) -> Any:
        nonlocal calls
        if script == "roster":
            between(calls)
            calls += 1
        return call(script, *args)

    with patch.object(pages, "_MEMBERS_A_PAGE", 4), patch.object(client, "call", spied):
        return read_roster(client, link.keys, version, time.monotonic() + 60), calls


def test_all_members_come_in_pages(any_server: Backend) -> None:
    """However many there are, all epochs and all ends of leases are told, a page a call."""
    cache = any_server.open("r")
    names = registered(cache, 22, lease_s=LONG_S)
    reading, calls = read(cache)
    assert set(reading.epochs or {}) == {*names, "r/0"}
    assert set(reading.lease_ends_ms) == set(names)
    assert calls == 6
    assert (reading.is_whole, reading.has_all_leases) == (True, True)
    assert read_roster(cache._state.link.admin, any_server.keys, "", time.monotonic() + 60) == reading._replace(
        server_ms=pytest.approx(reading.server_ms, abs=60_000)
    )


@pytest.mark.parametrize("count", [3, 4, 5, 8])
def test_pages_end_where_members_do(any_server: Backend, count: int) -> None:
    """A page that is just full is no reason to miss one, or to ask for ever."""
    cache = any_server.open("r")
    names = registered(cache, count - 1, lease_s=LONG_S)
    reading, calls = read(cache)
    assert set(reading.epochs or {}) == {*names, "r/0"}
    assert set(reading.lease_ends_ms) == set(names)
    assert calls <= count // 4 + 1


def test_what_happens_between_pages_is_not_missed(any_server: Backend) -> None:
    """Renewals, registrations and drops between two pages are in what the reading says at its end."""
    cache = any_server.open("r")
    names = registered(cache, 30, lease_s=LONG_S)
    link = cache._state.link
    taken: Any = any_server.admin.hgetall(any_server.keys.epochs)

    def happen(call: int) -> None:
        if call == 0:
            return
        deadline = time.monotonic() + 60
        heartbeat(
            link.admin,
            link.keys,
            names[call],
            int(taken[names[call].encode()]),
            LONG_S + 60 * call,
            link.info,
            deadline,
        )
        retire(link.admin, link.keys, {names[29 - call]: None}, deadline)
        register(link.admin, link.keys, f"late{call}/0", 0, LONG_S, None, deadline)
        register(link.admin, link.keys, names[10 + call], 0, LONG_S if call % 2 else 0, None, deadline)

    calls: list[int] = []

    def limited(call: int) -> None:
        calls.append(call)
        if call < 6:
            happen(call)

    reading, _ = read(cache, between=limited)
    admin: Any = any_server.admin
    epochs = {name.decode(): int(epoch) for name, epoch in admin.hgetall(any_server.keys.epochs).items()}
    leases = {name.decode(): int(end) for name, end in admin.zrange(any_server.keys.workers, 0, -1, withscores=True)}
    assert reading.epochs == epochs
    assert reading.lease_ends_ms == leases
    assert len(calls) < 20


def test_leases_that_end_together_come_once_each(any_server: Backend) -> None:
    """Very many leases that end in the same millisecond do not keep the reading from going on."""
    cache = any_server.open("r")
    names = registered(cache, 15, lease_s=LONG_S)
    end = 1000 * int(time.time() + 500)
    any_server.admin.zadd(any_server.keys.workers, dict.fromkeys(names[2:], end))
    reading, calls = read(cache)
    assert set(reading.lease_ends_ms) == set(names)
    assert {reading.lease_ends_ms[name] for name in names[2:]} == {end}
    assert calls < 10


def test_a_reader_asks_for_changes_alone(any_server: Backend) -> None:
    """After the first reading only members that changed are told, in one call, with their leases."""
    cache = any_server.open("r")
    names = registered(cache, 12)
    first, _ = read(cache)
    link, deadline = cache._state.link, time.monotonic() + 60
    short = read_roster(link.admin, link.keys, first.version, deadline, with_leases=False, member="m3/0")
    assert (short.epochs, short.own_epoch, short.version) == (None, first.epochs["m3/0"], first.version)  # pyright: ignore[reportOptionalSubscript]
    register(link.admin, link.keys, names[5], 0, LONG_S, None, deadline)
    retire(link.admin, link.keys, {names[7]: None}, deadline)
    changed = read_roster(link.admin, link.keys, first.version, deadline, with_leases=False)
    assert set(changed.epochs or {}) == {names[5], names[7]}
    assert set(changed.lease_ends_ms) == {names[5]}
    assert (changed.is_whole, changed.has_all_leases) == (False, False)


def test_a_refresh_is_one_call_whatever_changed(any_server: Backend) -> None:
    """With hundreds of members that are gone, a reader that knows them asks once."""
    cache = any_server.open("r")
    registered(cache, 120)
    cache._state.link.refresh()
    with calls_of(cache) as sent:
        cache._state.link.refresh()
        register(cache._state.link.admin, any_server.keys, "one/0", 0, 0, None, time.monotonic() + 60)
        sent.clear()
        cache._state.link.refresh()
        assert sent == ["roster"]
    assert cache._state.link.roster.epoch("one/0") > 0


def test_a_version_of_lost_data_is_read_anew(any_server: Backend) -> None:
    """When Redis lost what a reader knows, the reader forgets it and begins again."""
    cache = any_server.open("r")
    names = registered(cache, 3)
    cache._state.link.refresh()
    roster = cache._state.link.roster
    assert roster.epoch(names[0]) > 0
    any_server.admin.delete(any_server.keys.epochs, any_server.keys.changes, any_server.keys.version)
    cache._state.link.refresh()  # it attaches anew, because its own epoch is not there either
    cache._state.link.refresh()
    assert roster.epoch(names[0]) == 0
    assert roster.epoch("r/0") == cache._state.link.epoch


# Forgetting


def age(backend: Backend, ms: int, *members: str) -> None:
    """These members changed so much earlier."""
    for member in members:
        score = backend.admin.zscore(backend.keys.changes, member)
        assert score is not None
        backend.admin.zadd(backend.keys.changes, {member: score - ms})


def forget(cache: PrefixCacheOptimizer) -> int:
    """Forget who is due."""
    link = cache._state.link
    link.admin.command("DEL", link.keys.forgetting, deadline=time.monotonic() + 5)
    return forget_members(link.admin, link.keys, time.monotonic() + 60)


def test_a_void_member_is_forgotten_a_day_later(any_server: Backend) -> None:
    """Once nothing of its coverage is left, and a day after it was made void, nothing is kept of a member."""
    cache, dead = any_server.open("w1"), any_server.open("w2", worker_lease_s=LONG_S)
    reader = any_server.open("r")
    dead.cache_prefix(prompt(8))
    assert held(reader, prompt(8)) == {"w2/0@gpu": 8}
    dead.close()
    age(any_server, DAY_MS + 1000, "w2/0")
    assert forget(cache) == 0, "its coverage is still there"
    assert cache.sweep().coverage == 8
    age(any_server, -3600_000, "w2/0")
    assert forget(cache) == 0, "it has not been void for a day"
    age(any_server, 3600_000, "w2/0")
    assert forget(cache) == 1
    admin: Any = any_server.admin
    for key in (any_server.keys.epochs, any_server.keys.voided, any_server.keys.swept):
        assert not admin.hexists(key, "w2/0")
    assert admin.zscore(any_server.keys.changes, "w2/0") is None
    assert admin.zscore(any_server.keys.workers, "w2/0") is None
    assert not admin.exists(any_server.keys.member("w2/0"))
    assert [member.worker for member in cache.workers()] == ["r", "w1"]
    learn(reader)
    assert not reader.find_longest_cache_hit(prompt(8)).hit


def test_who_lives_is_not_forgotten(any_server: Backend) -> None:
    """Members that are not void stay, however old: with a lease, without one, and one that came back."""
    cache = any_server.open("w1")
    any_server.open("leased", worker_lease_s=LONG_S)
    any_server.open("plain")
    back = any_server.open("back")
    cache.drop_worker("back")
    back.flush()
    cache.sweep()
    age(any_server, 30 * DAY_MS, "w1/0", "leased/0", "plain/0", "back/0")
    let_lease_end(any_server, "leased/0", -GONE_S)
    assert forget(cache) == 0
    assert {member.worker for member in cache.workers()} == {"w1", "leased", "plain", "back"}


GONE_S = 7 * 86_400


def test_a_reader_that_knew_a_forgotten_member_learns_of_its_return(any_server: Backend) -> None:
    """Its new epoch is above all that it had, so it counts for readers that knew it and for those that did not."""
    cache, reader = any_server.open("w1"), any_server.open("r")
    dead = any_server.open("w2")
    dead.cache_prefix(prompt(8))
    learn(reader)
    cache.drop_worker("w2")
    cache.sweep()
    age(any_server, 2 * DAY_MS, "w2/0")
    assert forget(cache) == 1
    dead.flush()  # it is still there: it finds that its epoch is unknown
    assert dead._state.link.epoch > 1
    dead.cache_prefix(prompt(8))
    for each in (reader, any_server.open("new")):
        each.flush()
        each.catch_up()
        assert held(each, prompt(8)) == {"w2/0@gpu": 8}


def test_forgetting_is_done_once_an_hour(any_server: Backend) -> None:
    """Whoever comes next finds it done, and asks for nothing."""
    cache = any_server.open("w1")
    link = cache._state.link
    forget(cache)
    with calls_of(cache) as sent:
        assert forget_members(link.admin, link.keys, time.monotonic() + 60) == 0
        assert sent == ["SET"]
    assert 0 < any_server.admin.pttl(any_server.keys.forgetting) <= 3_600_000  # pyright: ignore[reportOperatorIssue]


def test_hundreds_are_forgotten_in_small_calls(any_server: Backend) -> None:
    """Each call looks at 50 members, so that none takes long."""
    cache = any_server.open("w1")
    names = registered(cache, 230)
    link, admin = cache._state.link, any_server.admin
    retire(link.admin, link.keys, dict.fromkeys(names), time.monotonic() + 60)
    admin.hset(any_server.keys.swept, mapping=dict.fromkeys(names, "99999999999999"))
    for name in names:
        age(any_server, 2 * DAY_MS, name)
    admin.delete(any_server.keys.forgetting)
    with calls_of(cache) as sent:
        assert forget_members(link.admin, link.keys, time.monotonic() + 60) == 230
        assert sent.count("forget") <= 8
    assert [member.name for member in read_members(link.admin, link.keys, time.monotonic() + 60)] == ["w1/0"]
