"""Engines over ZMQ, ingesters in threads and processes, a real server: killed, frozen, flushed and restarted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer
from distprefix.errors import ConfigError
from distprefix.events.holdings import Holdings
from distprefix.events.ingester import Engine, Ingester
from distprefix.events.limits import EngineLimits
from distprefix.redis.keys import Keys
from tests.fake_engine import Chain, FakeEngine, until
from tests.followers import holders
from tests.servers import Backend, Server

LEASE_S = 3.0
PROMPTS = [list(range(first, first + 24)) for first in (0, 100, 200)]
_RUN = """
import json, sys, time
from distprefix import PrefixCacheConfig
from distprefix.events.ingester import Engine, Ingester
settings, engine = json.loads(sys.argv[1]), json.loads(sys.argv[2])
with Ingester(PrefixCacheConfig(**settings), [Engine(**engine)], lease_s=float(sys.argv[3])) as ingester:
    while True:
        print(ingester.streams[0].state, flush=True)
        time.sleep(0.05)
"""


class Cluster:
    """A server, and who is there to look at it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.backend = Backend("own", server.client(), "t", url=server.url)
        self.reader = self.backend.open("reader", l1_ttl_s=0, strict=False)
        self.processes: list[subprocess.Popen[str]] = []

    def close(self) -> None:
        """End everything."""
        for process in self.processes:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self.server.thaw()
        self.backend.close()
        self.backend.admin.close()

    def ingester(self, *engines: FakeEngine, **settings: Any) -> Ingester:
        """One for these engines, which are w0, w1, ..."""
        named = [self.named(engine, f"w{i}") for i, engine in enumerate(engines)]
        return Ingester(self.backend.config(**settings), named, lease_s=LEASE_S)

    def named(self, engine: FakeEngine, worker: str = "w0") -> Engine:
        """Where it is."""
        return Engine(worker=worker, endpoint=engine.endpoint, replay=engine.replay_endpoint, topic=engine.topic)

    def process(self, engine: FakeEngine) -> subprocess.Popen[str]:
        """An ingester in a process of its own, which writes its state again and again."""
        settings = {"url": self.server.url, "namespace": "t", "worker_id": "x", "chunk_size": 4}
        where = {"worker": "w0", "endpoint": engine.endpoint, "replay": engine.replay_endpoint, "topic": engine.topic}
        arguments = [json.dumps(settings), json.dumps(where), str(LEASE_S)]
        process = subprocess.Popen(
            [sys.executable, "-c", _RUN, *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[2],
            bufsize=1,
        )
        self.processes.append(process)
        return process

    def told(self, worker: str = "w0", prompts: Sequence[list[int]] = PROMPTS) -> list[int]:
        """What readers are told that the worker holds of each prompt, in chunks."""
        self.reader._state.link.roster.version = ""
        return [holders(self.reader, prompt).get(f"{worker}/0@gpu", 0) for prompt in prompts]

    def settles(self, engine: FakeEngine, worker: str = "w0", within_s: float = 10.0) -> None:
        """It comes to what the engine holds."""
        until(lambda: self.told(worker) == truth(engine), within_s)

    def number(self) -> int:
        """How often the right to write was taken."""
        admin: Any = self.backend.admin
        return int(admin.hget(Keys("t").stream("w0/0"), "f") or 0)


def truth(engine: FakeEngine, prompts: Sequence[list[int]] = PROMPTS) -> list[int]:
    """What the engine holds of each prompt, in blocks."""
    held = engine.held.get("GPU", set[Chain]())
    sizes = [[n for n in range(4, len(prompt) + 1, 4) if Chain(tuple(prompt[:n])) not in held] for prompt in prompts]
    return [
        (missing[0] - 4) // 4 if missing else len(prompt) // 4 for missing, prompt in zip(sizes, prompts, strict=True)
    ]


@pytest.fixture
def cluster(own_server: Server) -> Iterator[Cluster]:
    """A cluster without engines."""
    made = Cluster(own_server)
    yield made
    made.close()


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """An engine that nobody follows."""
    with FakeEngine() as made:
        yield made


def follows(ingester: Ingester, at: int = 0) -> Callable[[], bool]:
    """Whether the stream is followed."""
    return lambda: ingester.streams[at].state == "following"


def wait_for(process: subprocess.Popen[str], state: str) -> None:
    """The process says that it is in this state."""
    assert process.stdout is not None
    deadline = time.monotonic() + 20
    while (said := process.stdout.readline().strip()) != state:
        assert time.monotonic() < deadline, said
        assert process.poll() is None


def test_events_of_two_engines_flow(cluster: Cluster) -> None:
    """What two engines store, drop and clear, in different formats, is what readers are told, for each of its own."""
    with FakeEngine() as one, FakeEngine(format="array-11", hashes="bytes") as two:
        one.prefill(PROMPTS[0])
        with cluster.ingester(one, two) as ingester:
            until(follows(ingester))
            until(follows(ingester, 1))
            cluster.settles(one)
            two.prefill(PROMPTS[0][:12])
            two.prefill(PROMPTS[1])
            one.prefill(PROMPTS[2])
            one.evict(3)
            cluster.settles(one)
            cluster.settles(two, "w1")
            one.clear()
            one.prefill(PROMPTS[1][:8])
            cluster.settles(one)
            cluster.settles(two, "w1")
            (status, _) = [stream.status() for stream in ingester.streams]
            assert (status["sequence"], status["chunks"]) == (one.seq - 1, {"gpu": 2})
            assert cluster.reader.check_integrity().problems == []


def test_a_dead_engine_drops_out_and_comes_back(cluster: Cluster, engine: FakeEngine) -> None:
    """An engine that is killed is in no answer as soon as its connection ends; a new one there begins with nothing."""
    with cluster.ingester(engine) as ingester:
        engine.prefill(PROMPTS[0])
        until(follows(ingester))
        cluster.settles(engine)
        engine.kill()
        began = time.monotonic()
        until(lambda: cluster.told() == [0, 0, 0], LEASE_S + 3)
        assert time.monotonic() - began < LEASE_S
        engine.restart()
        engine.wait_for_subscriber()
        engine.prefill(PROMPTS[1])
        cluster.settles(engine)
        assert cluster.told()[0] == 0


@pytest.mark.parametrize(("seq", "messages"), [(0, 0), (0, 1), (0, 9), (2, 1), (3, 0), (3, 1), (4, 1), (500, 2)])
def test_a_restarted_engine_leaves_nothing_stale(cluster: Cluster, engine: FakeEngine, seq: int, messages: int) -> None:
    """Whether it counts from below or above, what the engine before held is not answered when it is heard of."""
    for prompt in PROMPTS:
        engine.prefill(prompt)
    with cluster.ingester(engine) as ingester:
        until(follows(ingester))
        cluster.settles(engine)
        engine.restart(seq)
        for i in range(messages):
            engine.prefill([900 + i] * 4)
        cluster.settles(engine)
        engine.wait_for_subscriber()
        engine.prefill(PROMPTS[1][:16])
        cluster.settles(engine)


def test_lost_messages_are_replayed(cluster: Cluster, engine: FakeEngine) -> None:
    """Messages that never came are asked for when the next one shows that they are missing; nothing is forgotten."""
    with cluster.ingester(engine) as ingester:
        until(follows(ingester))
        engine.prefill(PROMPTS[0])
        cluster.settles(engine)
        epoch = ingester.streams[0].follower.epoch
        engine.drop_next(2)
        engine.prefill(PROMPTS[1])
        engine.evict(2)
        engine.prefill(PROMPTS[2])
        cluster.settles(engine)
        counts = ingester.streams[0].status()["counts"]
        assert (counts["gaps"], counts.get("messages_lost", 0)) == (1, 0)
        assert ingester.streams[0].follower.epoch == epoch
        engine.lose_next(1)
        engine.evict(1)
        engine.prefill([5] * 8)
        until(lambda: ingester.streams[0].status()["counts"].get("messages_lost") == 1)
        until(lambda: cluster.told() == [0, 0, 0])


def test_a_killed_ingester_is_replaced(cluster: Cluster, engine: FakeEngine) -> None:
    """When the ingester is killed the one that stands by goes on within the lease, with nothing lost or asked anew."""
    process = cluster.process(engine)
    wait_for(process, "following")
    engine.prefill(PROMPTS[0])
    cluster.settles(engine)
    with cluster.ingester(engine) as ingester:
        until(lambda: ingester.streams[0].state == "standby")
        assert cluster.number() == 1
        engine.prefill(PROMPTS[1])
        cluster.settles(engine)
        process.kill()
        engine.prefill(PROMPTS[2])
        engine.evict(2)
        killed = time.monotonic()
        until(follows(ingester), LEASE_S + 3)
        cluster.settles(engine)
        assert time.monotonic() - killed < LEASE_S + 3
        counts = ingester.streams[0].status()["counts"]
        assert not [name for name in counts if name.startswith("renewed")]
        assert cluster.number() == 2
        assert cluster.reader.check_integrity().problems == []


def test_one_that_slept_goes_on_from_what_another_wrote(cluster: Cluster, engine: FakeEngine) -> None:
    """An ingester that slept while another led and ended does not believe its own memory when it wakes."""
    process = cluster.process(engine)
    wait_for(process, "following")
    engine.prefill(PROMPTS[0])
    cluster.settles(engine)
    os.kill(process.pid, signal.SIGSTOP)
    with cluster.ingester(engine) as ingester:
        until(follows(ingester), LEASE_S + 3)
        engine.prefill(PROMPTS[1])
        cluster.settles(engine)
    engine.evict(9)
    engine.prefill(PROMPTS[2])
    os.kill(process.pid, signal.SIGCONT)
    cluster.settles(engine)


def test_a_second_model_is_not_followed_into_a_namespace(cluster: Cluster, engine: FakeEngine) -> None:
    """Its stream says which worker serves which other model, until it is said that both names mean one."""
    with FakeEngine() as other:
        named = [replace(cluster.named(engine), model="one"), replace(cluster.named(other, "w1"), model="two")]
        with pytest.raises(ConfigError, match="--same-model"):
            Ingester(cluster.backend.config(), named, lease_s=LEASE_S)
        with (
            Ingester(cluster.backend.config(), named[:1], lease_s=LEASE_S) as first,
            Ingester(cluster.backend.config(), named[1:], lease_s=LEASE_S) as second,
        ):
            until(follows(first))
            until(lambda: "the model here is" in second.streams[0].state)
            assert "w0/0 serves 'one'" in second.streams[0].state
            other.prefill(PROMPTS[0])
            assert cluster.told("w1") == [0, 0, 0]
        with Ingester(cluster.backend.config(), named, lease_s=LEASE_S, same_model=True) as both:
            until(lambda: all(stream.state == "following" for stream in both.streams))
            cluster.settles(other, "w1")


def test_what_is_not_told_is_credited_only_in_a_plain_fleet(cluster: Cluster) -> None:
    """An engine of before 2026 tells no extra keys: its blocks are nobody's, and are counted, unless it is declared."""
    with FakeEngine(format="array-7") as old:
        with Ingester(cluster.backend.config(), [cluster.named(old)], lease_s=LEASE_S) as running:
            until(follows(running))
            old.prefill(PROMPTS[0])
            until(lambda: running.streams[0].status()["counts"].get("untold") == 6)
            assert cluster.told() == [0, 0, 0]
        plain = replace(cluster.named(old), is_plain=True)
        with Ingester(cluster.backend.config(), [plain], lease_s=LEASE_S) as running:
            until(follows(running))
            old.prefill(PROMPTS[1])
            until(lambda: cluster.told() == [0, 6, 0])


def test_pages_smaller_than_a_chunk_go_on_after_a_take_over(cluster: Cluster) -> None:
    """What a prompt ends with inside a chunk is in no tree: it is heard again, and the next turn goes on from it."""
    with FakeEngine(block_size=1) as paged:
        prompt = list(range(500, 523))
        with Ingester(cluster.backend.config(), [cluster.named(paged)], lease_s=LEASE_S) as running:
            until(follows(running))
            paged.prefill(prompt[:11])
            until(lambda: cluster.told(prompts=[prompt]) == [2])
        with Ingester(cluster.backend.config(), [cluster.named(paged)], lease_s=LEASE_S) as running:
            until(follows(running))
            paged.prefill(prompt)
            until(lambda: cluster.told(prompts=[prompt]) == [5])
            assert running.streams[0].status()["parked"] == 0


def test_the_right_to_write_is_kept_while_the_tree_is_read_back(
    cluster: Cluster, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading back may take longer than the right lasts: another ingester stands by all the same."""
    with cluster.ingester(engine) as first:
        until(follows(first))
        for start in range(0, 4000, 100):
            engine.prefill(list(range(start, start + 24)))
        cluster.settles(engine)
    restore = Holdings.restore

    def slow(self: Holdings, medium: str, blocks: Any) -> None:
        time.sleep(0.15)
        restore(self, medium, blocks)

    monkeypatch.setattr(Holdings, "restore", slow)
    with cluster.ingester(engine) as second, cluster.ingester(engine) as third:
        streams = [second.streams[0], third.streams[0]]
        until(lambda: any(stream.state == "following" for stream in streams), 20.0)
        assert sorted(stream.state for stream in streams) == ["following", "standby"]
        cluster.settles(engine)
        epochs = {stream.status()["epoch"] for stream in streams} - {0}
        assert len(epochs) == 1


def test_two_ingesters_never_both_write(cluster: Cluster, engine: FakeEngine) -> None:
    """Of two ingesters one writes; when it ends the other goes on at once."""
    with cluster.ingester(engine) as one:
        until(follows(one))
        with cluster.ingester(engine) as two:
            until(lambda: two.streams[0].state == "standby")
            for i in range(20):
                engine.prefill([i] * 12)
                time.sleep(0.05)
            assert one.streams[0].state == "following"
            assert two.streams[0].state == "standby"
            assert (cluster.number(), two.streams[0].follower.counts["messages"]) == (1, 0)
            one.stop()
            ended = time.monotonic()
            until(follows(two))
            assert time.monotonic() - ended < 2.0
            engine.prefill(PROMPTS[0])
            cluster.settles(engine)
            assert not [name for name in two.streams[0].status()["counts"] if name.startswith("renewed")]


def test_a_flushed_server_is_filled_again(cluster: Cluster, engine: FakeEngine) -> None:
    """After everything in Redis is gone the ingester attaches again, and what the engine can replay is back."""
    with cluster.ingester(engine) as ingester:
        until(follows(ingester))
        engine.prefill(PROMPTS[0])
        engine.prefill(PROMPTS[1])
        cluster.settles(engine)
        cluster.backend.admin.flushall()
        cluster.settles(engine)
        cluster.server.restart()
        engine.prefill(PROMPTS[2])
        with contextlib.suppress(Exception):
            cluster.backend.admin.ping()
        cluster.settles(engine, within_s=20)
        assert cluster.reader.check_integrity().problems == []


def test_a_frozen_server_loses_nothing(cluster: Cluster, engine: FakeEngine) -> None:
    """What an engine sends while the server stands still is written once it goes on."""
    with cluster.ingester(engine) as ingester:
        until(follows(ingester))
        engine.prefill(PROMPTS[0])
        cluster.settles(engine)
        cluster.server.freeze()
        engine.prefill(PROMPTS[1])
        engine.evict(2)
        time.sleep(2.5)
        engine.prefill(PROMPTS[2])
        cluster.server.thaw()
        cluster.settles(engine)


@pytest.mark.parametrize("messages", [0, 1])
def test_an_engine_restarted_beside_a_frozen_server_leaves_nothing_stale(
    cluster: Cluster, engine: FakeEngine, messages: int
) -> None:
    """Messages of the engine before, which wait when the ingester can go on, are not taken for the new one's."""
    with cluster.ingester(engine) as ingester:
        until(follows(ingester))
        engine.prefill(PROMPTS[0])
        cluster.settles(engine)
        cluster.server.freeze()
        engine.prefill(PROMPTS[1])
        time.sleep(0.5)
        engine.prefill(PROMPTS[2])
        time.sleep(0.5)
        engine.restart()
        engine.wait_for_subscriber()
        for i in range(messages):
            engine.prefill([900 + i] * 4)
        time.sleep(0.5)
        cluster.server.thaw()
        cluster.settles(engine)
        time.sleep(1.5)
        assert cluster.told() == truth(engine)


def test_memory_is_bounded(cluster: Cluster, engine: FakeEngine) -> None:
    """Beyond `max_own_chunks` ends of prompts are forgotten, taken back from Redis, and counted."""
    with cluster.ingester(engine, max_own_chunks=10) as ingester:
        until(follows(ingester))
        for prompt in PROMPTS:
            engine.prefill(prompt)
        until(lambda: ingester.streams[0].follower.counts["messages"] == 3)
        until(lambda: sum(cluster.told()) == 10)
        assert all(told <= held for told, held in zip(cluster.told(), truth(engine), strict=True))
        status = ingester.streams[0].status()
        assert (status["blocks"], status["counts"]["forgotten"]) == (10, 8)
        assert cluster.reader.check_integrity().problems == []


def test_messages_that_find_no_room_are_asked_for_again(cluster: Cluster, engine: FakeEngine) -> None:
    """What came while too much waited is dropped and counted, and then replayed: nothing is forgotten, no new epoch."""
    limits = EngineLimits(queue_bytes=2000)
    with Ingester(cluster.backend.config(), [cluster.named(engine)], lease_s=LEASE_S, limits=limits) as ingester:
        (stream,) = ingester.streams
        until(follows(ingester))
        engine.prefill(PROMPTS[0])
        cluster.settles(engine)
        epoch = stream.follower.epoch
        cluster.server.freeze()
        engine.prefill(PROMPTS[1])
        for i in range(60):
            engine.prefill([5000 + i] * 8)
        engine.evict(2)
        until(lambda: stream.status()["counts"].get("dropped_queue", 0) > 0)
        cluster.server.thaw()
        cluster.settles(engine)
        assert stream.follower.epoch == epoch
        assert stream.status()["counts"]["replayed"] > 0


def test_connections_that_come_and_go_make_few_epochs(
    cluster: Cluster, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """An engine that restarts all the time, with nothing stored, costs no epoch each time, and no line in the log."""
    with cluster.ingester(engine) as ingester:
        (stream,) = ingester.streams
        until(follows(ingester))
        epoch = stream.follower.epoch
        for _ in range(6):
            engine.restart()
            engine.wait_for_subscriber()
            until(lambda: stream.state == "following")
        assert stream.follower.epoch == epoch
    gone = [line for line in caplog.messages if "is gone" in line]
    assert len(gone) <= 2


def test_a_reader_beside(cluster: Cluster, engine: FakeEngine) -> None:
    """A cache of this package beside an ingester: each publishes under its own name, and both are found."""
    with cluster.ingester(engine) as ingester:
        until(follows(ingester))
        cache: PrefixCacheOptimizer = cluster.backend.open("own")
        cache.cache_prefix(PROMPTS[0][:8])
        engine.prefill(PROMPTS[0])
        cluster.settles(engine)
        assert holders(cluster.reader, PROMPTS[0]) == {"w0/0@gpu": 6, "own/0@gpu": 2}
