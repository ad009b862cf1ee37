"""Servers that are killed and come back older, replicas that lag and are promoted, and cold servers restored alone."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.events.ingester import Engine, Ingester
from distprefix.redis.integrity import check_integrity, check_payloads
from distprefix.redis.keys import Keys
from tests.contract.test_find import prompt
from tests.fake_engine import FakeEngine, until
from tests.faults import Relay, wait_until
from tests.followers import holders
from tests.integration.test_ingester import PROMPTS, truth
from tests.lengths import short_or_long
from tests.lost_history import Deployment, InPlace, Killed, Promoted, Run, without_background
from tests.payloads import ALWAYS, data, loaded
from tests.servers import Server, find_server
from tests.workers import held

TEN = prompt(10)


@contextmanager
def servers(count: int, *options: str, tcp: bool = False) -> Generator[list[Server]]:
    """Servers of the test's own."""
    started = [Server(find_server("valkey-9.1"), *options, tcp=tcp).start() for _ in range(count)]
    try:
        yield started
    finally:
        for server in started:
            server.stop()


def opened(url: str, name: str, **settings: Any) -> PrefixCacheOptimizer:
    """A worker with the defaults, but for the size of a chunk."""
    return PrefixCacheOptimizer(PrefixCacheConfig(url=url, worker_id=name, chunk_size=4, **settings))


def play(deployment: Deployment, runs: int) -> None:
    """Random histories, each in a namespace of its own."""
    with without_background():
        for seed in range(runs):
            run = Run(deployment, seed, f"n{seed}", only_newest=True)
            try:
                run.play()
            finally:
                run.close()


@short_or_long("runs", 8, 50)
def test_histories_with_kills(runs: int) -> None:
    """Random operations on a server that is killed and comes back with its newest snapshot: nobody says too much."""
    with servers(1) as (server,):
        play(Killed(server), runs)


@short_or_long("runs", 3, 15)
def test_histories_with_promotions(runs: int) -> None:
    """Random operations on a primary whose replica lags, and is promoted when the primary is killed."""
    with servers(2, "--repl-diskless-sync-delay", "0", tcp=True) as (first, second), Relay(first.port) as name:

        def switch(server: Server) -> str:
            name.target = server.port
            return name.url

        play(Promoted(first, second, switch), runs)


@pytest.mark.parametrize("others", [0, 20])
def test_a_killed_server_loses_a_removal(others: int) -> None:
    """With the defaults and all threads, every cache says the truth again within the stated bound."""
    with servers(1) as (server,), opened(server.url, "a") as worker, opened(server.url, "b") as reader:
        worker.cache_prefix(TEN, range(10))
        assert held(reader, TEN) == {"a/0@gpu": 10}
        with server.client() as admin:
            admin.save()
        assert worker.remove_skipped_blocks([5]) == 1
        server.kill()
        server.start()
        for number in range(others):
            reader.cache_prefix([number] * 8, [0, 1])
        wait_until(lambda: worker.get_metrics()["history_lost"] == {"position": 1})
        wait_until(lambda: held(reader, TEN).get("a/0@gpu", 0) == 5)
        assert held(worker, TEN) == {"a/0@gpu": 5}
        assert worker.check_integrity().problems == []


def test_an_append_only_file_that_lost_its_end() -> None:
    """A power cut takes what the last second wrote: the worker notices, and the tree is whole."""
    options = ("--appendonly", "yes", "--appendfsync", "everysec")
    with servers(1, *options) as (server,), opened(server.url, "a") as worker, opened(server.url, "b") as reader:
        worker.cache_prefix(TEN, range(10))
        time.sleep(1.2)
        (file,) = Path(server.folder, "appendonlydir").glob("*.incr.aof")
        size = file.stat().st_size
        worker.remove_skipped_blocks([5])
        server.kill()
        with file.open("r+b") as handle:
            handle.truncate(size)
        server.start()
        wait_until(lambda: held(reader, TEN).get("a/0@gpu", 0) == 5)
        assert worker.get_metrics()["history_lost"] == {"position": 1}


@short_or_long("cuts", 12, 150)
def test_an_append_only_file_cut_anywhere(cuts: int) -> None:
    """Wherever the file of a busy server ends, the tree that comes back is whole, and its log has its newest entry."""
    pick = random.Random(5)
    with servers(1, "--appendonly", "yes") as (server,):
        with opened(server.url, "a", l2_max_chunks=100) as worker:
            for number in range(300):
                tokens = [number % 7] * 8 + [number % 50] * (4 * (1 + number % 9))
                worker.cache_prefix(tokens, range(40 * number, 40 * number + len(tokens) // 4))
                if pick.random() < 0.3:
                    worker.remove_skipped_blocks([40 * pick.randrange(number + 1)])
                if pick.random() < 0.1:
                    worker.store(tokens, data(tokens, 40))
        server.kill()
        (file,) = Path(server.folder, "appendonlydir").glob("*.incr.aof")
        whole = file.read_bytes()
        keys = Keys("default")
        for _ in range(cuts):
            file.write_bytes(whole[: pick.randrange(len(whole) // 20, len(whole))])
            server.start()
            with server.client() as admin:
                wait_until(lambda admin=admin: not _is_loading(admin))
                newest: Any = admin.xrevrange(keys.log, count=1)
                assert check_integrity(admin, keys).problems == []
                assert check_payloads(admin, keys) == []
                number: Any = admin.hget(keys.meta, "log")
                assert newest == [] or newest[0][1][b"n"] == number
            server.kill()


def _is_loading(admin: redis.Redis) -> bool:
    found: Any = admin.info("persistence")
    return bool(int(found["loading"]))


def _saved(server: Server) -> Callable[[], None]:
    """SAVE now; SIGKILL and a start later."""
    with server.client() as admin:
        admin.save()

    def comes_back() -> None:
        server.kill()
        server.start()

    return comes_back


def _dumped(server: Server) -> Callable[[], None]:
    """Dump now; bring all of it back in one transaction later."""
    deployment = InPlace(server)
    kept = deployment.keep()
    return lambda: deployment.restore(kept)


@dataclass(frozen=True, slots=True)
class _Followed:
    """An engine whose events an ingester writes to a server, and a worker that reads it."""

    server: Server
    engine: FakeEngine
    ingester: Ingester
    reader: PrefixCacheOptimizer

    def is_right(self) -> bool:
        """Whether the reader finds of each prompt what the engine has of it."""
        self.reader._state.link.roster.version = ""
        return [holders(self.reader, asked).get("w0/0@gpu", 0) for asked in PROMPTS] == truth(self.engine)

    def lost_once(self) -> bool:
        """Whether the ingester has noticed one loss."""
        return self.ingester.streams[0].follower.counts["history_lost"] == 1


@contextmanager
def _followed(lease_s: float) -> Generator[_Followed]:
    """A server of the test's own, an engine, and an ingester that follows it."""
    with servers(1) as (server,), FakeEngine() as engine:
        config = PrefixCacheConfig(url=server.url, worker_id="ingester", chunk_size=4)
        reader = opened(server.url, "reader", l1_ttl_s=0)
        where = Engine(worker="w0", endpoint=engine.endpoint, replay=engine.replay_endpoint, topic=engine.topic)
        with reader, Ingester(config, [where], lease_s=lease_s) as ingester:
            until(lambda: ingester.streams[0].state == "following")
            yield _Followed(server, engine, ingester, reader)


@pytest.mark.parametrize("how", [_saved, _dumped])
def test_an_ingester_goes_on_from_what_there_is(how: Callable[[Server], Callable[[], None]]) -> None:
    """The events that the server lost are written again; what an engine dropped in between is not said to be held."""
    with _followed(lease_s=10.0) as it:
        it.engine.prefill(PROMPTS[0])
        it.engine.prefill(PROMPTS[1])
        until(it.is_right)
        comes_back = how(it.server)
        it.engine.evict(4)
        until(it.is_right)
        comes_back()
        it.engine.prefill(PROMPTS[2])
        until(it.is_right)
        assert it.lost_once()
        assert it.reader.check_integrity().problems == []


def test_an_idle_ingester_notices() -> None:
    """An engine that sends nothing more is right again with the next beat of its lease."""
    with _followed(lease_s=3.0) as it:
        it.engine.prefill(PROMPTS[0])
        until(it.is_right)
        comes_back = _saved(it.server)
        it.engine.evict(2)
        until(it.is_right)
        comes_back()
        until(it.lost_once)
        until(it.is_right)


def test_a_cold_server_that_is_restored_alone() -> None:
    """Payloads that it lost end a load and leave the tree; those that the tree dropped meanwhile are reclaimed."""
    with servers(2) as (tree, cold), opened(tree.url, "a", cold_url=cold.url, demote_interval_s=0) as worker:
        known, later = prompt(6), [9] * 16
        assert worker.store(known, data(known)) == 6
        assert worker.demote(ALWAYS) == 6
        with cold.client() as admin:
            admin.save()
        assert worker.store(later, data(later)) == 4
        assert worker.demote(ALWAYS) == 4
        worker.clear()  # the tree drops both, and has the cold server delete them
        assert worker.store(later, data(later)) == 4
        assert worker.demote(ALWAYS) == 4
        cold.kill()
        cold.start()
        wait_until(lambda: loaded(worker, later) == [] and worker.find_stored(later) == 0)
        assert loaded(worker, later) == []
        assert worker.store(later, data(later)) == 4
        assert loaded(worker, later) == data(later)
        assert worker.check_integrity().problems == []
        with tree.client() as admin, cold.client() as other:
            strays = check_payloads(admin, Keys("default"), other)
            assert strays != [], "what the restored server has again, and the tree does not name"


def test_a_tree_that_is_restored_alone() -> None:
    """A tree that names cold payloads which were deleted meanwhile says less after a load, never a wrong byte."""
    with servers(2) as (tree, cold), opened(tree.url, "a", cold_url=cold.url, demote_interval_s=0) as worker:
        known = prompt(6)
        assert worker.store(known, data(known)) == 6
        assert worker.demote(ALWAYS) == 6
        with tree.client() as admin:
            admin.save()
        worker.clear()
        worker.demote(ALWAYS)  # has the cold server delete what the tree dropped
        with cold.client() as other:
            dropped = list(other.scan_iter("*cold:*"))
            assert len(dropped) == 6
            assert all(int(str(other.pttl(name))) > 0 for name in dropped)
            other.delete(*dropped)  # as when these two minutes are over
        tree.kill()
        tree.start()
        wait_until(lambda: worker.find_stored(known) == 6)
        wait_until(lambda: loaded(worker, known) == [] and worker.find_stored(known) == 0)
        assert worker.store(known, data(known)) == 6
        assert loaded(worker, known) == data(known)
