"""Workers come, hold leases, stand still, die and are dropped."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer
from distprefix.errors import DamagedNodeError, DistPrefixError, InvalidInputError, StaleEpochError
from distprefix.redis.roster import GRACE_S, heartbeat
from distprefix.redis.workers import describe_workers
from tests.contract.test_find import prompt
from tests.servers import Backend, Server
from tests.workers import LONG_S, calls_of, held, learn, let_lease_end

# Epochs


def epoch_of(cache: PrefixCacheOptimizer) -> int:
    """What a worker publishes under."""
    return cache._state.link.epoch


def test_ranks_have_epochs_of_their_own(any_server: Backend) -> None:
    """A rank that starts again voids what it published before, and nothing of the worker's other ranks."""
    zero, one = any_server.open("w1"), any_server.open("w1", rank=1)
    zero.cache_prefix(prompt(5))
    one.cache_prefix(prompt(7))
    reader = any_server.open("r")
    assert held(reader, prompt(9)) == {"w1/1@gpu": 7, "w1/0@gpu": 5}
    again = any_server.open("w1", rank=1)
    learn(reader)
    assert held(reader, prompt(9)) == {"w1/0@gpu": 5}
    epochs = {(member.worker, member.rank): member.epoch for member in reader.workers()}
    assert epochs == {("w1", 0): epoch_of(zero), ("w1", 1): epoch_of(again), ("r", 0): epoch_of(reader)}
    assert epoch_of(again) > epoch_of(one)


def test_registering_voids_what_was_published_before(any_server: Backend) -> None:
    """A worker that takes a lease takes a new epoch: older coverage counts for nothing, what comes then does."""
    worker, reader = any_server.open("w1"), any_server.open("r")
    worker.cache_prefix(prompt(5))
    assert held(reader, prompt(9)) == {"w1/0@gpu": 5}
    epoch = epoch_of(worker)
    assert worker.register_worker(lease_s=LONG_S) == epoch_of(worker) > epoch
    learn(reader)
    for cache in (worker, reader):
        assert not cache.find_longest_cache_hit(prompt(9)).hit
    worker.cache_prefix(prompt(4))
    for cache in (worker, reader):
        assert held(cache, prompt(9)) == {"w1/0@gpu": 4}
    epoch = epoch_of(worker)
    assert worker.register_worker(lease_s=LONG_S) > epoch


def test_registering_costs_five_calls(any_server: Backend) -> None:
    """As it says."""
    worker = any_server.open("w1")
    with calls_of(worker) as sent:
        worker.register_worker(lease_s=LONG_S)
    assert sent == ["HGET", "attach", "attach", "register", "roster"]


@pytest.mark.parametrize("lease_s", [0, 2.9, -1])
def test_too_short_a_lease_is_refused(any_server: Backend, lease_s: float) -> None:
    """Readers could not see in time that it goes on; nothing has changed then."""
    worker = any_server.open("w1")
    epoch = epoch_of(worker)
    with pytest.raises(InvalidInputError, match="too short"):
        worker.register_worker(lease_s=lease_s)
    (member,) = worker.workers()
    assert (member.epoch, member.lease_left_s) == (epoch, None)


def test_workers_tell_who_they_are(any_server: Backend) -> None:
    """Address, model, media and load of who holds a lease come back; who holds none says nothing."""
    plain, leased = any_server.open("w1"), any_server.open("w2", rank=3, medium="cpu")
    before = time.time()
    leased.register_worker(
        address="10.0.0.7:8000", model="tiny", media=["gpu", "cpu"], load={"running": 3}, lease_s=100.0
    )
    one, two = plain.workers()
    assert (one.worker, one.rank, one.lease_left_s, one.started) == ("w1", 0, None, 0.0)
    assert (one.info.address, one.info.model, one.info.media, one.info.load) == ("", "", (), {})
    assert (two.worker, two.rank, two.epoch) == ("w2", 3, epoch_of(leased))
    assert (two.info.address, two.info.model, two.info.media) == ("10.0.0.7:8000", "tiny", ("gpu", "cpu"))
    assert two.info.load == {"running": 3.0}
    assert two.lease_left_s is not None
    assert 90 < two.lease_left_s <= 100
    assert before - 1 < two.started < time.time() + 1


def test_a_lease_from_the_settings(any_server: Backend) -> None:
    """`worker_lease_s` gives a lease from the start, and the medium is told."""
    leased = any_server.open("w1", worker_lease_s=LONG_S, medium="cpu")
    (member,) = any_server.open("w1", rank=1).workers()[:1]
    assert member.epoch == epoch_of(leased)
    assert member.lease_left_s is not None
    assert member.info.media == ("cpu",)


def test_load_goes_with_the_heartbeat(any_server: Backend) -> None:
    """What is reported is told with the next heartbeat, one call, which keeps the lease."""
    worker, reader = any_server.open("w1"), any_server.open("r")
    worker.register_worker(address="here", lease_s=100.0, load={"running": 1})
    worker.report_load({"running": 7, "free": 0.5})
    let_lease_end(any_server, "w1/0", 5)
    with calls_of(worker) as sent:
        worker._state.link.heartbeat()
    assert sent == ["heartbeat"]
    member = reader.workers()[1]
    assert (member.info.load, member.info.address) == ({"running": 7.0, "free": 0.5}, "here")
    assert member.lease_left_s is not None
    assert member.lease_left_s > 90


def test_a_load_that_is_no_number_is_refused(any_server: Backend) -> None:
    """At once, and the heartbeats go on."""
    worker = any_server.open("w1")
    worker.register_worker(lease_s=100.0)
    with pytest.raises(InvalidInputError, match="'running' is 'many'"):
        worker.report_load({"running": "many"})  # pyright: ignore[reportArgumentType]
    let_lease_end(any_server, "w1/0", 1)
    worker._state.link.heartbeat()
    left = worker.workers()[0].lease_left_s
    assert left is not None
    assert left > 90


def test_heartbeats_come_by_themselves(real_server: Backend) -> None:
    """Three a lease, in the background, whatever else is done there."""
    worker = real_server.open("w1", worker_lease_s=3.0)
    let_lease_end(real_server, "w1/0", 0.01)
    deadline = time.monotonic() + 10
    while (worker.workers()[0].lease_left_s or 0) < 2:
        assert time.monotonic() < deadline, "no heartbeat came"
        time.sleep(0.02)


# The end of a lease


def test_a_worker_whose_lease_ends_drops_out(any_server: Backend) -> None:
    """At that moment and with no word from anybody: out of answers of L1 and of Redis, which are only read."""
    dying, living = any_server.open("w1", worker_lease_s=LONG_S), any_server.open("w2", worker_lease_s=LONG_S)
    hot, cold = any_server.open("r1"), any_server.open("r2")
    dying.cache_prefix(prompt(8))
    living.cache_prefix(prompt(5))
    let_lease_end(any_server, "w1/0", 0.4)
    learn(hot, cold)
    assert held(hot, prompt(8)) == {"w1/0@gpu": 8, "w2/0@gpu": 5}
    with calls_of(hot, cold) as sent:
        result = hot.find_longest_cache_hit(prompt(8))
        assert (result.matched_chunks, result.l1_chunks, result.redis_calls) == (8, 8, 0)
        time.sleep(0.45)
        before = any_server.dump()
        for cache in (hot, cold, hot):
            result = cache.find_longest_cache_hit(prompt(8))
            assert (result.matched_chunks, dict(result.holders)) == (5, {"w2/0@gpu": 5})
        assert cold.find_longest_cache_hit(prompt(8), blocks_of="w1/0@gpu").block_ids == ()
        learn(hot, cold)
        assert set(sent) <= {"walk", "roster", "feed"}
    assert any_server.dump() == before


def test_l1_answers_when_the_only_holder_has_died(any_server: Backend) -> None:
    """What nobody else holds is a miss, also when L1 knows it."""
    dying, reader = any_server.open("w1", worker_lease_s=LONG_S), any_server.open("r")
    dying.cache_prefix(prompt(8))
    let_lease_end(any_server, "w1/0", -1)
    learn(reader)
    for _ in range(2):
        result = reader.find_longest_cache_hit(prompt(8))
        assert (result.hit, result.holders, result.tier) == (False, (), None)


def test_a_worker_that_returns_counts_again(any_server: Backend) -> None:
    """Within the grace one heartbeat brings back all that it published, under the same epoch."""
    worker, other, reader = (
        any_server.open("w1", worker_lease_s=LONG_S),
        any_server.open("w2", worker_lease_s=LONG_S),
        any_server.open("r"),
    )
    worker.cache_prefix(prompt(8))
    epoch = epoch_of(worker)
    let_lease_end(any_server, "w1/0", 5 - GRACE_S)
    learn(reader)
    assert not reader.find_longest_cache_hit(prompt(8)).hit
    other._state.link.heartbeat()
    worker._state.link.heartbeat()
    learn(reader)
    assert held(reader, prompt(8)) == {"w1/0@gpu": 8}
    assert epoch_of(worker) == epoch


def test_after_the_grace_others_void_it(any_server: Backend) -> None:
    """Somebody else's heartbeat makes it void; when it comes back it attaches anew and publishes again."""
    worker, other, reader = (
        any_server.open("w1", worker_lease_s=LONG_S),
        any_server.open("w2", worker_lease_s=LONG_S),
        any_server.open("r"),
    )
    worker.cache_prefix(prompt(8))
    epoch = epoch_of(worker)
    let_lease_end(any_server, "w1/0", -GRACE_S - 1)
    other._state.link.heartbeat()
    assert any_server.admin.zscore(any_server.keys.workers, "w1/0") is None
    assert any_server.admin.exists(any_server.keys.member("w1/0")) == 0
    link = worker._state.link
    with pytest.raises(StaleEpochError):
        heartbeat(link.publishes, link.keys, "w1/0", epoch, 5, link.info, time.monotonic() + 5)
    link.heartbeat()
    link.refresh()
    assert link.epoch > epoch + 1, "the one above is nobody's"
    learn(reader)
    for cache in (reader, worker):
        assert not cache.find_longest_cache_hit(prompt(8)).hit
    worker.cache_prefix(prompt(8))
    assert held(reader, prompt(8)) == {"w1/0@gpu": 8}
    assert reader.workers()[1].lease_left_s is not None


def test_a_heartbeat_voids_no_more_than_sixteen(any_server: Backend) -> None:
    """The rest waits for the next one, so that no call takes long."""
    worker = any_server.open("w1", worker_lease_s=LONG_S)
    for i in range(20):
        any_server.admin.hset(any_server.keys.epochs, f"d{i}/0", 1)
        let_lease_end(any_server, f"d{i}/0", -GRACE_S - 100 + i)
    worker._state.link.heartbeat()
    assert any_server.admin.zcard(any_server.keys.workers) == 5
    worker._state.link.heartbeat()
    assert any_server.admin.zrange(any_server.keys.workers, 0, -1) == [b"w1/0"]


def test_readers_learn_of_a_lease_that_somebody_removed(any_server: Backend) -> None:
    """A heartbeat puts it back, and who knows of no lease then reads when it ends."""
    worker, reader = any_server.open("w1", worker_lease_s=LONG_S), any_server.open("r")
    any_server.admin.delete(any_server.keys.workers)
    learn(reader)
    assert not reader._state.link.roster.has_leases
    worker._state.link.heartbeat()
    reader._state.link.refresh()
    assert reader._state.link.roster.has_leases


def test_close_ends_a_lease(any_server: Backend) -> None:
    """A worker with a lease counts no more once it is closed; one without goes on to count."""
    leased, plain, reader = any_server.open("w1", worker_lease_s=LONG_S), any_server.open("w2"), any_server.open("r")
    leased.cache_prefix(prompt(8))
    plain.cache_prefix(prompt(5))
    leased.close()
    plain.close()
    learn(reader)
    assert held(reader, prompt(8)) == {"w2/0@gpu": 5}
    leased.close()
    epochs = [epoch_of(reader), epoch_of(leased) + 1, epoch_of(plain)]
    assert [member.epoch for member in reader.workers()] == epochs


def test_close_leaves_a_newer_process_alone(any_server: Backend) -> None:
    """A process that was replaced ends its own epoch only, which counts no more anyway."""
    old = any_server.open("w1", worker_lease_s=LONG_S)
    epoch = epoch_of(old)
    new = any_server.open("w1", worker_lease_s=LONG_S)
    new.cache_prefix(prompt(8))
    old._state.link.refresh()
    assert epoch_of(old) == epoch, "it does not fight for the name"
    old._state.link.heartbeat()
    old.close()
    assert held(any_server.open("r"), prompt(8)) == {"w1/0@gpu": 8}


# Dropping


@pytest.mark.parametrize("size", [1, 400])
def test_dropping_a_worker_costs_two_calls(any_server: Backend, size: int) -> None:
    """However many ranks it has and however much it holds; one more call lets the caller know it as well."""
    ranks = [any_server.open("w1", rank=rank, max_run=4) for rank in range(3)]
    other, reader = any_server.open("w10", max_run=4), any_server.open("r", max_run=4)
    for rank, cache in enumerate(ranks):
        cache.cache_prefix(prompt(size + rank))
    other.cache_prefix(prompt(1))
    assert reader.find_longest_cache_hit(prompt(size + 2)).matched_chunks == size + 2
    with calls_of(reader, other) as sent:
        assert other.drop_worker("w1") == 3
        assert sent == ["roster", "retire", "roster"]
        sent.clear()
        reader._state.link.refresh()
        assert sent == ["roster"]
    assert held(reader, prompt(size + 2)) == {"w10/0@gpu": 1}
    assert held(other, prompt(size + 2)) == {"w10/0@gpu": 1}


def test_dropping_nobody(any_server: Backend) -> None:
    """Whom nobody knows has no ranks, and nothing changes."""
    cache = any_server.open("w1")
    cache.cache_prefix(prompt(3))
    before = any_server.admin.hgetall(any_server.keys.epochs)
    assert cache.drop_worker("w") == 0
    assert any_server.admin.hgetall(any_server.keys.epochs) == before
    assert cache.find_longest_cache_hit(prompt(3)).hit


def test_a_leased_worker_that_is_dropped_and_runs_comes_back(any_server: Backend) -> None:
    """It takes a new epoch when it next looks, holds its lease again, and counts with what it publishes then."""
    worker, reader = any_server.open("w1", worker_lease_s=LONG_S), any_server.open("r")
    worker.cache_prefix(prompt(8))
    epoch = epoch_of(worker)
    assert reader.drop_worker("w1") == 1
    worker._state.link.heartbeat()
    worker._state.link.refresh()
    worker.cache_prefix(prompt(8))
    learn(reader)
    assert held(reader, prompt(8)) == {"w1/0@gpu": 8}
    assert epoch_of(worker) > epoch + 1, "the one above is nobody's"
    assert reader.workers()[1].lease_left_s is not None


def test_a_worker_without_a_lease_that_is_dropped_and_runs_comes_back(any_server: Backend) -> None:
    """As one with a lease does."""
    worker, reader = any_server.open("w1"), any_server.open("r")
    worker.cache_prefix(prompt(8))
    assert reader.drop_worker("w1") == 1
    worker.flush()
    worker.cache_prefix(prompt(8))
    learn(reader)
    assert held(reader, prompt(8)) == {"w1/0@gpu": 8}


def test_dropping_oneself(any_server: Backend) -> None:
    """A worker with a lease goes on under a new epoch, without what it published."""
    worker = any_server.open("w1", worker_lease_s=LONG_S)
    worker.cache_prefix(prompt(8))
    epoch = epoch_of(worker)
    assert worker.drop_worker("w1") == 1
    assert epoch_of(worker) > epoch + 1, "the one above is nobody's"
    assert not worker.find_longest_cache_hit(prompt(8)).hit


# Another hand

DAMAGE: dict[str, tuple[str, Any]] = {
    "the leases are a string": ("workers", "foreign"),
    "what a member says is a string": ("w", "foreign"),
    "the epochs are a string": ("epochs", "foreign"),
    "what was swept is a string": ("swept", "foreign"),
    "the version is a list": ("version", ["foreign"]),
    "the version is no number": ("version", "foreign"),
    "the lock is a list": ("sweeping", ["foreign"]),
    "an epoch is no number": ("epochs", {"w3/0": "many", "w4/0": "nan", "w5/0": "inf", "w6/0": "", b"\xff/0": "\xff"}),
    "an epoch has no rank": ("epochs", {"w3": "3", "": "4", "/": "5", "w1/x": "6"}),
    "what was swept is no number": ("swept", {"w2/0": "many", b"\xff": "2"}),
    "a lease never ends": ("workers zset", {"w2/0": float("inf"), "w3/0": float("-inf")}),
    "what a member says makes no sense": ("w", {"load": "\xff", "media": b"\xff,,", "started": "long ago"}),
}


def damage(backend: Backend, where: str, value: Any) -> None:
    """Write something that does not belong there."""
    admin, keys = backend.admin, backend.keys
    name = where.partition(" ")[0]
    key = keys.member("w2/0") if name == "w" else getattr(keys, name)
    if where.endswith("zset"):
        admin.zadd(key, value)
        return
    if not isinstance(value, dict):
        admin.delete(key)
    if isinstance(value, dict):
        admin.hset(key, mapping=value)  # pyright: ignore[reportUnknownArgumentType]
    elif isinstance(value, list):
        admin.rpush(key, *value)  # pyright: ignore[reportUnknownArgumentType]
    else:
        admin.set(key, value)


@pytest.mark.parametrize("what", DAMAGE)
def test_another_hand_does_not_stop_look_ups(any_server: Backend, what: str) -> None:
    """Look-ups and publishes go on; the rest works, or says what is wrong with an error of ours."""
    reader, worker = any_server.open("r"), any_server.open("w2", worker_lease_s=LONG_S)
    worker.cache_prefix(prompt(8))
    assert held(reader, prompt(8)) == {"w2/0@gpu": 8}
    damage(any_server, *DAMAGE[what])
    link = reader._state.link
    learn(reader, worker)
    worker._state.link.heartbeat()
    assert held(reader, prompt(8)) == {"w2/0@gpu": 8}
    worker.cache_prefix(prompt(9))
    assert reader.find_longest_cache_hit(prompt(9), blocks_of="w2/0@gpu").matched_chunks == 9
    doings: list[Callable[[], object]] = [
        reader.workers,
        reader.sweep,
        lambda: describe_workers(link.admin, link.keys, time.monotonic() + 5),
        lambda: reader.drop_worker("w3"),
        lambda: any_server.open("w4"),
        reader.flush,
    ]
    for action in doings:
        with contextlib.suppress(DistPrefixError):
            action()


def test_an_epoch_that_is_no_number_is_named(any_server: Backend) -> None:
    """A worker cannot know which epoch it never had, and is told so; nothing was written."""
    any_server.open("w1")
    any_server.admin.hset(any_server.keys.epochs, "w2/0", "many")
    with pytest.raises(DamagedNodeError, match="the epoch of w2/0 is no number: many"):
        any_server.open("w2", worker_lease_s=LONG_S)
    assert any_server.admin.hget(any_server.keys.epochs, "w2/0") == b"many"


def test_leased_holders_run_out_of_trust_without_redis(own_server: Server) -> None:
    """When Redis is gone L1 goes on to name who holds no lease, and who holds one until that ends."""
    backend = Backend("valkey-9.1", own_server.client(), "down", url=own_server.url)
    options: dict[str, Any] = {"strict": False, "lookup_timeout_s": 0.05, "publish_timeout_s": 0.1}
    leased, plain = backend.open("w1", worker_lease_s=LONG_S), backend.open("w2")
    reader = backend.open("r", **options)
    leased.cache_prefix(prompt(8))
    plain.cache_prefix(prompt(5))
    let_lease_end(backend, "w1/0", 0.5)
    learn(reader)
    assert held(reader, prompt(8)) == {"w1/0@gpu": 8, "w2/0@gpu": 5}
    own_server.kill()
    learn(reader)
    assert held(reader, prompt(8)) == {"w1/0@gpu": 8, "w2/0@gpu": 5}
    time.sleep(0.55)
    assert held(reader, prompt(8)) == {"w2/0@gpu": 5}
    for cache in (leased, plain, reader):
        cache._state.unusable = "its server is gone"
        cache._state.link.close()
