"""A server that comes back older, on every kind of server: each cache notices, and nothing lost is believed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer
from distprefix.redis.restored import declare_restored
from distprefix.redis.scripts import SCRIPTS, load_script
from tests.contract.test_find import prompt
from tests.lengths import short_or_long
from tests.lost_history import Run, without_background
from tests.payloads import data, loaded
from tests.servers import Backend
from tests.workers import LONG_S, calls_of, held, learn

TEN = prompt(10)


@pytest.fixture
def by_hand() -> Iterator[None]:
    """Caches work their background when the test says so."""
    with without_background():
        yield


class Kept:
    """The state of one namespace, to come back to."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.url = backend.url or ""
        self._values = self._read()

    def _names(self) -> list[bytes]:
        return list(self._backend.admin.scan_iter(match=f"dp:*{self._backend.namespace}*", count=1000))

    def _read(self) -> list[tuple[bytes, Any, Any]]:
        admin = self._backend.admin
        return [(name, admin.dump(name), admin.pttl(name)) for name in self._names()]

    def restore(self) -> None:
        """The server has this, and nothing that came after it."""
        admin = self._backend.admin
        for name in self._names():
            admin.delete(name)
        for name, value, left in self._values:
            admin.restore(name, max(left, 0), value)


def works(*caches: PrefixCacheOptimizer) -> None:
    """A round of each cache's background, twice: others learn in the second what came out in the first."""
    for _ in range(2):
        for cache in caches:
            cache._upkeep.work()


def opened(backend: Backend, name: str, **settings: Any) -> PrefixCacheOptimizer:
    """A cache whose background does everything in every round."""
    return backend.open(name, feed_interval_s=1e-9, touch_interval_s=1e-9, strict=False, **settings)


def losses(cache: PrefixCacheOptimizer) -> dict[str, int]:
    """How often history was lost, by how it showed."""
    return cache.get_metrics()["history_lost"]


@pytest.mark.usefixtures("by_hand")
def test_a_lost_removal_is_noticed(any_server: Backend) -> None:
    """A removal that the server had taken and lost is noticed by the next reply: nobody says more than is held."""
    worker, reader = opened(any_server, "a"), opened(any_server, "b")
    worker.cache_prefix(TEN, range(10))
    assert held(reader, TEN) == {"a/0@gpu": 10}
    before = Kept(any_server)
    worker.remove_skipped_blocks([5])
    before.restore()
    works(worker, reader)
    assert held(reader, TEN) == held(worker, TEN) == {"a/0@gpu": 5}
    assert (losses(worker), losses(reader)) == ({"position": 1}, {})
    assert worker.get_metrics()["republished"] == 1
    assert worker.check_integrity().problems == []


@pytest.mark.usefixtures("by_hand")
@pytest.mark.parametrize("others", [0, 1, 30])
def test_writes_of_others_hide_nothing(any_server: Backend, others: int) -> None:
    """However many writes of others, or of the worker itself, follow the restore."""
    worker, other = opened(any_server, "a"), opened(any_server, "b")
    worker.cache_prefix(TEN, range(10))
    before = Kept(any_server)
    worker.remove_skipped_blocks([5])
    before.restore()
    for number in range(others):
        other.cache_prefix([number] * 8, [2 * number, 2 * number + 1])
    worker.cache_prefix([77] * 8, [100, 101])
    works(worker, other)
    assert held(other, TEN) == {"a/0@gpu": 5}
    assert losses(worker) == {"position": 1}


@pytest.mark.usefixtures("by_hand")
def test_own_writes_hide_nothing(any_server: Backend) -> None:
    """A write that takes the place of a lost one shows the loss in its own reply, and is done under the new epoch."""
    worker, reader = opened(any_server, "a"), opened(any_server, "b", l1_ttl_s=0)
    worker.cache_prefix(TEN, range(10))
    before = Kept(any_server)
    worker.remove_skipped_blocks([5])
    before.restore()
    worker.cache_prefix([77] * 8, [100, 101])
    works(reader)
    assert held(reader, TEN) == {}
    assert held(reader, [77] * 8) == {"a/0@gpu": 2}


def test_a_look_up_shows_a_loss(any_server: Backend) -> None:
    """Without a background the next look-up that asks Redis does; this worker is not told its own lost coverage."""
    worker = any_server.open("a", l1_ttl_s=0)
    worker.cache_prefix(TEN, range(10))
    before = Kept(any_server)
    worker.remove_skipped_blocks([5])
    before.restore()
    assert held(worker, TEN) == {}
    assert losses(worker) == {"position": 1}
    worker.cache_prefix([77] * 8, [100, 101])
    assert held(any_server.open("b"), TEN) == {}


@pytest.mark.usefixtures("by_hand")
def test_a_flush_and_a_restore(any_server: Backend) -> None:
    """What a flush took and a backup brought back counts for nothing, whether or not the flush was noticed."""
    worker, reader = opened(any_server, "a"), opened(any_server, "b")
    worker.cache_prefix(TEN, range(10))
    before, epoch = Kept(any_server), worker.get_metrics()["epoch"]
    worker.remove_skipped_blocks([5])
    any_server.admin.delete(any_server.keys.meta)
    worker.catch_up()
    before.restore()
    works(worker, reader)
    assert held(reader, TEN) == {"a/0@gpu": 5}
    assert worker.get_metrics()["epoch"] > epoch
    assert losses(worker)["gone"] == 1


@pytest.mark.usefixtures("by_hand")
def test_an_epoch_is_not_given_twice(any_server: Backend) -> None:
    """A process that starts after a restore has an epoch of its own, and L1 of others drops the dead one's."""
    opened(any_server, "a").close()
    before = Kept(any_server)
    lost, reader = opened(any_server, "a"), opened(any_server, "b")
    lost.cache_prefix(TEN, range(10))
    assert held(reader, TEN) == {"a/0@gpu": 10}
    before.restore()
    new = opened(any_server, "a")
    assert new.get_metrics()["epoch"] > lost.get_metrics()["epoch"]
    works(reader)
    assert held(reader, TEN) == {}


@pytest.mark.usefixtures("by_hand")
def test_a_lost_registration_is_noticed(any_server: Backend) -> None:
    """A worker whose epoch the server has lost takes another one and publishes again."""
    opened(any_server, "a").close()
    before = Kept(any_server)
    worker, reader = opened(any_server, "a"), opened(any_server, "b")
    before.restore()
    worker.cache_prefix(TEN, range(10))
    works(worker, reader)
    assert held(reader, TEN) == {"a/0@gpu": 10}
    assert losses(worker) == {"epoch": 1}


@pytest.mark.usefixtures("by_hand")
def test_chains_without_blocks_are_published_again(any_server: Backend) -> None:
    """What a worker published without naming blocks comes back as well, but not after it cleared all."""
    worker, reader = opened(any_server, "a"), opened(any_server, "b")
    before = Kept(any_server)
    worker.cache_prefix(TEN)
    before.restore()
    works(worker, reader)
    assert held(reader, TEN) == {"a/0@gpu": 10}
    worker.clear()
    before.restore()
    works(worker, reader)
    assert held(reader, TEN) == {}


@pytest.mark.usefixtures("by_hand")
def test_a_removal_beside_publishing_again(any_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is removed while a chain is published again is trimmed after it."""
    worker, reader = opened(any_server, "a"), opened(any_server, "b", l1_ttl_s=0)
    worker.cache_prefix(TEN, range(10))
    before = Kept(any_server)
    worker.cache_prefix([77] * 8, [100, 101])
    before.restore()
    publisher = worker._publisher
    insert = publisher._insert

    def removed_meanwhile(*args: Any) -> Any:
        monkeypatch.setattr(publisher, "_insert", insert)
        worker._state.own.remove([5])
        return insert(*args)

    worker.catch_up()
    worker._state.link.refresh()
    monkeypatch.setattr(publisher, "_insert", removed_meanwhile)
    works(worker, reader)
    assert held(reader, TEN) == {"a/0@gpu": 5}


@pytest.mark.usefixtures("by_hand")
def test_leases_are_taken_again(any_server: Backend) -> None:
    """A lease that the server lost protects again once its worker has noticed."""
    worker = opened(any_server, "a")
    worker.cache_prefix(TEN, range(10))
    before = Kept(any_server)
    lease = worker.find_longest_cache_hit(TEN).lease(60.0)
    before.restore()
    works(worker)
    assert lease.active
    evictor = any_server.open("e", l2_max_chunks=1)
    assert evictor.maintain().chunks == 0
    assert held(any_server.open("b"), TEN) == {"a/0@gpu": 10}


def test_it_is_said_once(any_server: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """One loss is one warning and one count, however many calls and threads see it."""
    worker = any_server.open("a", l1_ttl_s=0)
    worker.cache_prefix(TEN, range(10))
    before = Kept(any_server)
    worker.remove_skipped_blocks([5])
    before.restore()
    with caplog.at_level(logging.WARNING, "distprefix"):
        for _ in range(3):
            worker.find_longest_cache_hit(TEN)
        worker.catch_up()
        worker.flush()
    assert [record.getMessage() for record in caplog.records if "has lost" in record.getMessage()] != []
    assert len(caplog.records) == 1
    assert losses(worker) == {"position": 1}


def test_a_replaced_process_does_not_fight(any_server: Backend) -> None:
    """A process whose name a newer one has is told nothing of a loss, and leaves the newer one's count alone."""
    old = any_server.open("a", strict=False)
    old.cache_prefix(TEN, range(10))
    new = any_server.open("a")
    new.cache_prefix(TEN, range(10))
    old.cache_prefix([77] * 8, [100, 101])
    old.flush()
    new.cache_prefix([78] * 8, [102, 103])
    assert (losses(old), losses(new)) == ({}, {})


@pytest.mark.usefixtures("by_hand")
def test_an_operator_says_so(any_server: Backend) -> None:
    """After `declare_restored` the living publish again what they hold, and what the dead published counts no more."""
    worker, reader = opened(any_server, "a"), opened(any_server, "b")
    dead = opened(any_server, "dead")
    worker.cache_prefix(TEN, range(10))
    dead.cache_prefix([77] * 8)
    epoch = worker.get_metrics()["epoch"]
    done = declare_restored(worker._state.link.admin, any_server.keys, time.monotonic() + 5)
    assert done.members == 3
    works(worker, reader)
    assert held(reader, TEN) == {"a/0@gpu": 10}
    assert held(reader, [77] * 8) == {}
    assert worker.get_metrics()["epoch"] > epoch
    assert losses(worker) == {"generation": 1}


@pytest.mark.usefixtures("by_hand")
def test_a_worker_with_a_lease_comes_back_with_all(any_server: Backend) -> None:
    """Its lease goes on under the new epoch."""
    worker, reader = opened(any_server, "a", worker_lease_s=LONG_S), opened(any_server, "b")
    worker.cache_prefix(TEN, range(10))
    before = Kept(any_server)
    worker.remove_skipped_blocks([9])
    before.restore()
    works(worker, reader)
    learn(reader)
    assert held(reader, TEN) == {"a/0@gpu": 9}
    assert all(member.lease_left_s is not None for member in reader.workers() if member.worker == "a")


@pytest.mark.usefixtures("by_hand")
def test_a_log_that_was_cut_hides_nothing(real_server: Backend) -> None:
    """A worker that could not read the log while it was restored and then cut takes a new epoch all the same."""
    worker, other = opened(real_server, "a"), opened(real_server, "b")
    worker.cache_prefix(TEN, range(10))
    before = Kept(real_server)
    worker.remove_skipped_blocks([5])
    works(worker)
    before.restore()
    for number in range(40):
        other.cache_prefix([number] * 8, [0, 1])
        other.remove_skipped_blocks([0])
    real_server.admin.xtrim(real_server.keys.log, maxlen=3, approximate=False)
    works(worker, other)
    assert held(other, TEN) == {"a/0@gpu": 5}
    assert losses(worker) == {"position": 1}


def test_payloads_of_a_restored_tree(real_server: Backend) -> None:
    """What was stored and lost is stored again when it is next offered; what came back loads as it was."""
    worker = real_server.open("a", strict=False)
    assert worker.store(TEN, data(TEN)) == 10
    before = Kept(real_server)
    assert worker.store(prompt(12), data(prompt(12))) == 12
    before.restore()
    assert loaded(worker, prompt(12)) == data(TEN)
    assert worker.store(prompt(12), data(prompt(12))) == 12
    assert loaded(real_server.open("b"), prompt(12)) == data(prompt(12))


def test_no_call_is_added(real_server: Backend) -> None:
    """Looking whether history was lost costs no call: a look-up is one, and so is a publish."""
    worker, reader = real_server.open("a"), real_server.open("b")
    with calls_of(worker, reader) as sent:
        worker.cache_prefix(TEN, range(10))
        reader.find_longest_cache_hit(TEN)
    assert sent == ["insert", "walk"]


def test_every_reply_says_of_which_history_it_is() -> None:
    """Each script on a shard, whether it reads or writes, answers with its generation and the caller's writes."""
    for name in SCRIPTS:
        body = load_script(name).body
        if "DPGONE" not in body:
            assert name in ("attach", "enroll", "forget", "heartbeat", "register", "report", "retire", "roster", "turn")
            continue
        own = body.rpartition("local function answer")[2]
        assert "return answer(" in own
        is_counted = not load_script(name).reads_only and name not in ("erase", "used")  # they publish nothing
        assert ("HSET', writers" in body) == is_counted


class _Namespace:
    """A server of others in which one namespace is kept and brought back."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self.url = backend.url or ""

    def admin(self) -> Any:
        return self._backend.admin

    def keep(self) -> Kept:
        return Kept(self._backend)

    def restore(self, kept: Kept) -> None:
        kept.restore()

    def flush(self) -> None:
        for name in Kept(self._backend)._names():
            self._backend.admin.delete(name)


@pytest.mark.usefixtures("by_hand")
@short_or_long("runs", 25, 300)
def test_random_histories(real_server: Backend, runs: int) -> None:
    """Random operations with snapshots and restores at any step: after the bound nobody says more than the truth."""
    deployment = _Namespace(real_server)
    for seed in range(runs):
        deployment.flush()
        run = Run(deployment, seed, real_server.namespace)
        try:
            run.play()
        finally:
            run.close()
