"""What following engines' events takes: python benchmarks/ingest.py [--dynamo PYTHON].

Starts its own servers and processes, and needs ``distprefix[events]`` and what the tests need. --dynamo names the
Python of an environment with NVIDIA Dynamo's indexer, which is measured beside:

    python3.11 -m venv DYNAMO && DYNAMO/bin/pip install ai-dynamo-runtime==1.6.1 msgpack pyzmq

rate: a busy engine's frames (event_frames.py), from memory and over ZMQ. CPU seconds are of all threads of this process
    and of the server: where others are at work they are the figure to trust.
forget: a worker that holds a million chunks is dropped.
restart: what a reader, who asks all the time, is told while an ingester, the engine or Redis is restarted: of prompts
    that the engine holds, and of some that it no longer holds. Time runs from when what was away is back.
bytes: what Redis takes for a block that a worker holds, and what keys as others keep them would take: a set of workers
    for each block, or a hash with a field for each worker.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import multiprocessing
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import redis
import zmq
from event_frames import frames as event_frames
from event_frames import prefill_frames
from measure import Figure, run_parts

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer, operations
from distprefix.chunking import HASH_BYTES, Chain
from distprefix.errors import ReplayError
from distprefix.events.follower import Follower
from distprefix.events.frames import Frame
from distprefix.events.ingester import Engine, Ingester, follower_of
from distprefix.events.journal import Fate
from distprefix.redis.client import Client, connect, new_breaker
from distprefix.redis.embedded import find_binary
from distprefix.redis.journal import RedisJournal
from distprefix.redis.keys import Keys
from distprefix.redis.namespace import attach
from tests.fake_engine import FakeEngine
from tests.servers import Server

_GOAL = 100_000
_AT_ONCE = 1000
_BLOCK = 16
_spawn = multiprocessing.get_context("spawn")
_random = random.Random(1)


def main() -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dynamo")
    options, sys.argv[1:] = parser.parse_known_args()
    global _dynamo  # noqa: PLW0603 - run_parts knows the parts' arguments
    _dynamo = options.dynamo or ""
    run_parts({"rate": rate, "forget": forget, "restart": restart, "bytes": bytes_}, __doc__)


_dynamo = ""


# Rate


class _Took(NamedTuple):
    """Seconds: of the clock, of this process's processor time, of the server's."""

    clock: float
    own: float
    server: float


def rate(url: str, scale: float) -> list[Figure]:
    """Blocks a second, from memory and over ZMQ, and Dynamo's on the same frames, for two kinds of engine."""
    blocks = int(1_000_000 * scale)
    return [
        *_rates(url, "prompts of 64 blocks an event", list(prefill_frames(blocks)), blocks),
        *_rates(url, "a busy engine, most events of 1 block", list(event_frames(blocks)), blocks),
    ]


def _rates(url: str, kind: str, payloads: list[bytes], blocks: int) -> list[Figure]:
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames"
        path.write_bytes(b"".join(msgpack.packb(payload) or b"" for payload in payloads))
        frames = [Frame(i, payload) for i, payload in enumerate(payloads)]
        took: dict[str, list[_Took]] = {"from memory": [], "from memory, objects frozen": [], "over ZMQ": []}
        dynamo: dict[str, list[dict[str, Any]]] = {"server": [], "tree": []}
        for i in range(3):
            took["from memory"].append(_from_memory(url, f"m{kind[0]}{i}", frames, frozen=False))
            took["from memory, objects frozen"].append(_from_memory(url, f"f{kind[0]}{i}", frames, frozen=True))
            took["over ZMQ"].append(_over_zmq(url, f"z{kind[0]}{i}", path, len(frames)))
            for mode, results in dynamo.items() if _dynamo else ():
                results.append(_ask_dynamo(path, mode))
        for how, times in took.items():
            figures.append(_rate(f"{kind}, {how}", blocks, times))
        for mode, results in dynamo.items():
            figures.append(_dynamo_rate(f"{kind}, Dynamo's {mode}", blocks, results))
    return figures


def _rate(what: str, blocks: int, times: list[_Took]) -> Figure:
    clock, own, server = (statistics.median(each) for each in zip(*times, strict=True))
    value = blocks / clock
    cost = f"{own:.1f} CPU s here, {server:.1f} in Redis: {blocks / (own + server):,.0f} per CPU s"
    return Figure(what, f"{clock:.1f} s", cost, value, ">=", _GOAL, "/s")


def _dynamo_rate(what: str, blocks: int, results: list[dict[str, Any]]) -> Figure:
    if not results:
        return Figure(what, "not measured", "name its Python by --dynamo", 0, "", 0, "/s")
    clock = statistics.median(one["seconds"] + one["convert_seconds"] for one in results)
    used = statistics.median(one["processor_seconds"] for one in results)
    conversion = statistics.median(one["convert_seconds"] for one in results)
    cost = f"{used:.1f} CPU s" + (f", without {conversion:.1f} s of conversion" if conversion else "")
    return Figure(what, f"{clock:.1f} s", cost, blocks / clock, "", 0, "/s")


def _ask_dynamo(path: Path, mode: str) -> dict[str, Any]:
    script = Path(__file__).with_name("dynamo_indexer.py")
    output = subprocess.run([_dynamo, script, path, mode], check=True, capture_output=True, text=True).stdout
    return json.loads(output)


class _Silent:
    """An engine that cannot be asked."""

    def replay(self, start: int, timeout_s: float) -> Iterator[Frame]:  # noqa: ARG002
        """Nothing."""
        raise ReplayError


def _from_memory(url: str, namespace: str, frames: Sequence[Frame], *, frozen: bool) -> _Took:
    with _following(url, namespace, "w") as (follower, _), _timing(url) as took:
        for i in range(0, len(frames), _AT_ONCE):
            follower.take(frames[i : i + _AT_ONCE])
            if frozen:
                gc.freeze()  # what is there now is not looked at any more
    assert follower.position is not None
    assert follower.position.seq == frames[-1].seq
    gc.unfreeze()
    _flush(url)
    return took[0]


def _over_zmq(url: str, namespace: str, path: Path, count: int) -> _Took:
    config = PrefixCacheConfig(url=url, namespace=namespace, worker_id="w", chunk_size=_BLOCK)
    mine, theirs = _spawn.Pipe()
    publisher = _spawn.Process(target=_publish, args=(theirs, path), daemon=True)
    publisher.start()
    with Ingester(config, [Engine(worker="w", endpoint=mine.recv())], lease_s=30) as ingester:
        stream = ingester.streams[0]
        _until(lambda: stream.state == "following")
        with _timing(url) as took:
            mine.send(True)
            _until(lambda: (stream.follower.position or (-1,))[0] == count - 1)
        assert not stream.follower.counts["gaps"]
    publisher.terminate()
    publisher.join()
    _flush(url)
    return took[0]


def _publish(told: Any, path: Path) -> None:
    """The engine's process: all frames at once, when told to."""
    with path.open("rb") as file:
        payloads = list(msgpack.Unpacker(file, max_buffer_size=0))
    publisher = zmq.Context.instance().socket(zmq.PUB)
    publisher.sndhwm = 0
    told.send(f"tcp://127.0.0.1:{publisher.bind_to_random_port('tcp://127.0.0.1')}")
    told.recv()
    for i, payload in enumerate(payloads):
        publisher.send_multipart([b"", i.to_bytes(8, "big"), payload])
    told.recv()


# Forget


def forget(url: str, scale: float) -> list[Figure]:
    """Workers that hold a million chunks each are dropped, one after the other, and swept away."""
    prompts = [_random.randbytes(4096 * HASH_BYTES) for _ in range(max(1, int(245 * scale)))]
    chunks, names = 4096 * len(prompts), [f"gone{i}" for i in range(5)]
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(_cache(url, "forget", name, worker_lease_s=600)) for name in names]
        for worker in workers:
            holder, link = worker.config.holder, worker._state.link
            for prompt in prompts:
                now_ms = int(time.time() * 1000)
                link.publish(operations.publish(prompt, 0, holder, link.epoch, now_ms=now_ms, max_run=256))
        reader = stack.enter_context(_cache(url, "forget", "reader", l1_ttl_s=600))
        chain = Chain.packed(prompts[-1])
        in_server, waited, wrong = list[float](), list[float](), 0
        for i, name in enumerate(names):
            held = {holder.worker for holder in reader.find_longest_cache_hit(chain).holders}
            assert held == set(names[i:])
            with _logged(url, 0) as calls:
                began = time.perf_counter()
                reader.drop_worker(name)
                waited.append(time.perf_counter() - began)
            in_server.append(sum(calls))
            reader.catch_up()
            wrong += name in {holder.worker for holder in reader.find_longest_cache_hit(chain).holders}
        with _logged(url, 200) as calls:
            began = time.perf_counter()
            swept = reader.sweep()
            took = time.perf_counter() - began
        left = reader.find_longest_cache_hit(chain).matched_chunks
    what = f"{chunks:,} chunks of a worker"
    mean = sum(calls) / max(1, len(calls))
    figures = [
        Figure(
            f"drop {what}, in the server",
            _ms(statistics.median(in_server)),
            f"{_ms(statistics.median(waited))} to the client",
            1000 * statistics.median(in_server),
            "<",
            1,
            " ms",
        ),
        Figure("answers that name it after the next poll", f"{wrong}", f"of {len(names)}", wrong, "<=", 0, ""),
        _untargeted(
            f"sweep {what}, all 5 of them", f"{took:.2f} s", f"{swept.nodes:,} nodes, {left} chunks left", took, " s"
        ),
        Figure(
            "sweep, longest call",
            _ms(max(calls)),
            f"{_ms(mean)} mean of {len(calls)}",
            1000 * max(calls),
            "<=",
            10,
            " ms",
        ),
    ]
    return [*figures, _dynamo_remove(int(chunks / 0.7))]


def _dynamo_remove(blocks: int) -> Figure:
    what = "Dynamo: RadixTree.remove_worker"
    if not _dynamo:
        return _untargeted(what, "not measured", "name its Python by --dynamo", 0, " ms")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames"
        path.write_bytes(b"".join(msgpack.packb(payload) or b"" for payload in event_frames(blocks)))
        told = _ask_dynamo(path, "tree")
    value = told["remove_worker_ms"]
    return _untargeted(what, f"{value:.2f} ms", f"{told['blocks'] - told['removed']:,} blocks", value, " ms")


# Restart

_PROMPTS, _LENGTH, _LEASE_S = 200, 32, 3.0


def restart(url: str, scale: float) -> list[Figure]:
    """An ingester is killed, an engine restarted, Redis killed: what a reader is told meanwhile."""
    del url
    figures: list[Figure] = []
    for what, happen in _CASES.items():
        runs = [_restarted(happen) for _ in range(max(1, int(3 * scale)))]
        asked, blind, stale = (sum(each) for each in zip(*(run[1:] for run in runs), strict=True))
        seconds = statistics.median(run[0] for run in runs)
        told = f"{asked:,} asked: {100 * blind / asked:.1f}% blind, {100 * stale / asked:.2f}% stale"
        figures.append(_untargeted(f"right again after: {what}", told, f"lease {_LEASE_S:g} s", seconds, " s"))
        figures.append(Figure(f"stale answers: {what}", f"{stale:,}", f"of {asked:,}", stale, "<=", 0, ""))
    return figures


class _World:
    """An engine with prompts, a server, an ingester in a process of its own, and what a reader has to be told."""

    def __init__(self, engine: FakeEngine, server: Server) -> None:
        self.engine, self.server = engine, server
        self.truth: dict[tuple[int, ...], int] = {}
        """Chunks that the engine holds of each prompt."""
        self._ingester: Any = None

    def fill(self, seed: int, count: int) -> None:
        """The engine takes in new prompts."""
        rng = random.Random(seed)
        for _ in range(count):
            prompt = tuple(rng.randrange(128_000) for _ in range(_LENGTH * _BLOCK))
            self.engine.prefill(prompt)
            self.truth[prompt] = _LENGTH

    def lose(self, count: int) -> None:
        """The engine drops whole prompts, those that came first."""
        self.engine.evict(count * _LENGTH)
        for prompt in [prompt for prompt, held in self.truth.items() if held][:count]:
            self.truth[prompt] = 0

    def start_ingester(self) -> None:
        """Another one, beside or after the one before."""
        args = (self.server.url, self.engine.endpoint, self.engine.replay_endpoint)
        self._ingester = _spawn.Process(target=_ingest, args=args, daemon=True)
        self._ingester.start()

    def kill_ingester(self) -> None:
        """At once."""
        if self._ingester is not None:
            self._ingester.kill()
            self._ingester.join()


def _ingest(url: str, endpoint: str, replay: str) -> None:
    config = PrefixCacheConfig(url=url, namespace="restart", worker_id="i", chunk_size=_BLOCK)
    with Ingester(config, [Engine(worker="w", endpoint=endpoint, replay=replay)], lease_s=_LEASE_S):
        threading.Event().wait()


def _ingester_killed(world: _World) -> None:
    world.kill_ingester()
    world.fill(2, 20)
    world.start_ingester()


def _ingester_killed_while_blocks_go(world: _World) -> None:
    world.kill_ingester()
    world.fill(2, 20)
    world.lose(20)
    world.start_ingester()


def _engine_restarted(world: _World) -> None:
    world.engine.restart()
    world.truth = dict.fromkeys(world.truth, 0)
    world.fill(1, 20)


def _redis_killed(world: _World) -> None:
    world.server.restart()


_CASES: dict[str, Callable[[_World], None]] = {
    "the ingester is killed and another one started, 20 prompts meanwhile": _ingester_killed,
    "the same, and 20 prompts dropped meanwhile": _ingester_killed_while_blocks_go,
    "the engine is restarted, takes in 20 prompts": _engine_restarted,
    "Redis is killed, comes back empty": _redis_killed,
}


class _Watched(NamedTuple):
    """Seconds until every answer is right; until then answers, and those that said too little or too much."""

    seconds: float
    asked: int
    blind: int
    stale: int


def _restarted(happen: Callable[[_World], None]) -> _Watched:
    server = Server(find_binary(), tcp=True).start()
    try:
        with FakeEngine(block_size=_BLOCK) as engine:
            world = _World(engine, server)
            world.fill(1, _PROMPTS)
            world.start_ingester()
            try:
                with _cache(server.url, "restart", "reader", strict=False, feed_interval_s=0.1) as reader:
                    _until(lambda: all(_told(reader, prompt) == _LENGTH for prompt in world.truth))
                    return _watch(world, reader, happen)
            finally:
                world.kill_ingester()
    finally:
        server.stop()


def _watch(world: _World, reader: PrefixCacheOptimizer, happen: Callable[[_World], None]) -> _Watched:
    happen(world)
    began = ended = time.perf_counter()
    asked = blind = stale = until_then = right = 0
    prompts = list(world.truth)
    while right < 5 * len(prompts):  # each is right five times over
        prompt = prompts[right % len(prompts)] if right else _random.choice(prompts)
        told, truth = _told(reader, prompt), world.truth[prompt]
        asked, blind, stale = asked + 1, blind + (told < truth), stale + (told > truth)
        right = right + 1 if told == truth else 0
        if told != truth:
            ended, until_then = time.perf_counter(), asked
        assert time.perf_counter() - began < 60, "it does not become right"
        time.sleep(0.0005)
    return _Watched(ended - began, max(1, until_then), blind, stale)


def _told(reader: PrefixCacheOptimizer, prompt: tuple[int, ...]) -> int:
    """Chunks that the engine is said to hold."""
    holders = reader.find_longest_cache_hit(prompt).holders
    return max((holder.chunks for holder in holders if holder.worker == "w"), default=0)


# Bytes


def bytes_(url: str, scale: float) -> list[Figure]:
    """Redis memory for each block that each worker holds, when they hold the same and when they do not."""
    figures: list[Figure] = []
    blocks = int(100_000 * scale)
    with contextlib.closing(redis.Redis.from_url(url)) as plain:
        for count, each, same in ((1, blocks, True), (8, blocks, True), (64, blocks, True), (8, blocks, False)):
            _flush(url)
            with contextlib.ExitStack() as stack:
                workers = [stack.enter_context(_following(url, "bytes", f"worker-{i}")) for i in range(count)]
                before = _used(plain)
                if same:
                    keys = [_hold(workers, each, 0)]
                else:
                    keys = [_hold([worker], each, i) for i, worker in enumerate(workers)]
                ours = (_used(plain) - before) / (each * count)
            sets, hashes = (_peers(plain, keys, count if same else 1, how) / (each * count) for how in ("set", "hash"))
            what = f"{each:,} blocks held by {count} worker{'s' * (count > 1)}, {'the same' if same else 'each others'}"
            other = f"a set a block {sets:.1f}, a hash a block {hashes:.1f}"
            figures.append(_untargeted(f"bytes for a block held: {what}", f"{ours:.1f}", other, ours, ""))
    _flush(url)
    return figures


@cache
def _stores(blocks: int, seed: int) -> list[Frame]:
    """An engine's frames without the removals."""
    payloads: list[bytes] = []
    for frame in event_frames(blocks, seed + 1):
        at, events, rank = msgpack.unpackb(frame)
        events = [event for event in events if event["type"] == "BlockStored"]
        payloads.append(msgpack.packb([at, events, rank]) or b"")
    return [Frame(i, payload) for i, payload in enumerate(payloads)]


def _hold(workers: Sequence[tuple[Follower, RedisJournal]], blocks: int, seed: int) -> list[int]:
    """All these workers hold the same blocks: what the first one's follower writes is written for the others too."""
    follower, journal = workers[0]
    commit, others = journal.commit, [(other.epoch, its.commit) for other, its in workers[1:]]

    def for_all(epoch: int, changes: Any, position: Any, state: bytes) -> Any:
        outcomes = commit(epoch, changes, position, state)
        for its_epoch, its_commit in others:
            assert all(outcome.fate is Fate.DONE for outcome in its_commit(its_epoch, changes, position, state))
        return outcomes

    journal.commit = for_all
    frames = _stores(blocks, seed)
    for i in range(0, len(frames), _AT_ONCE):
        follower.take(frames[i : i + _AT_ONCE])
    assert follower.holdings.chunks["gpu"] == blocks
    return list(follower.holdings._blocks)


def _peers(plain: Any, keys: Sequence[Sequence[int]], workers: int, how: str) -> float:
    """Bytes of a key for each block that names its workers."""
    plain.execute_command("FLUSHALL", "SYNC")
    before, now = _used(plain), int(time.time() * 1000)
    for seed, batch in enumerate(keys):
        names = [f"worker-{seed + i}" for i in range(workers)]
        told = names if how == "set" else [part for name in names for part in (name, now)]
        command = "SADD" if how == "set" else "HSET"
        for at in range(0, len(batch), 1000):
            pipeline = plain.pipeline(transaction=False)
            for key in batch[at : at + 1000]:
                pipeline.execute_command(command, f"dp:block:{key:016x}", *told)
            pipeline.execute()
    return _used(plain) - before


# Common


@contextlib.contextmanager
def _following(url: str, namespace: str, worker: str) -> Generator[tuple[Follower, RedisJournal]]:
    """A follower that has begun, of an engine that says nothing by itself."""
    config = PrefixCacheConfig(url=url, namespace=namespace, worker_id=worker, chunk_size=_BLOCK)
    client = Client(connect(url, 30), new_breaker(1 << 30, 1.0), Counter())
    attach(client, Keys(namespace), config, time.monotonic() + 30)
    engine = Engine(worker=worker, endpoint="tcp://nowhere:1")
    follower, journal = follower_of(engine, config, client, _Silent(), lease_s=3600, engine_chains=False)
    try:
        assert follower.begin()
        yield follower, journal
    finally:
        client.close()


@contextlib.contextmanager
def _timing(url: str) -> Generator[list[_Took]]:
    """A list that gets, at the end, what passed."""
    took: list[_Took] = []
    gc.collect()
    with contextlib.closing(redis.Redis.from_url(url)) as plain:
        server, own, began = _server_seconds(plain), time.process_time(), time.perf_counter()
        yield took
        took.append(_Took(time.perf_counter() - began, time.process_time() - own, _server_seconds(plain) - server))


def _server_seconds(plain: redis.Redis) -> float:
    cpu: Any = plain.info("cpu")
    return cpu["used_cpu_user"] + cpu["used_cpu_sys"]


@contextlib.contextmanager
def _logged(url: str, slower_us: int) -> Generator[list[float]]:
    """A list that gets, at the end, seconds of the script calls that took so long, by the server's slow log."""
    took: list[float] = []
    with contextlib.closing(redis.Redis.from_url(url)) as plain:
        plain.config_set("slowlog-max-len", 100_000)
        plain.config_set("slowlog-log-slower-than", slower_us)
        plain.slowlog_reset()
        yield took
        plain.config_set("slowlog-log-slower-than", -1)
        entries: Any = plain.slowlog_get(100_000)
        took += [entry["duration"] / 1e6 for entry in entries if entry["command"].startswith(b"EVALSHA")]


def _cache(url: str, namespace: str, worker: str, **settings: Any) -> PrefixCacheOptimizer:
    return PrefixCacheOptimizer(
        PrefixCacheConfig.from_mapping(
            {
                "url": url,
                "namespace": namespace,
                "worker_id": worker,
                "chunk_size": _BLOCK,
                "max_prefix_length": 1 << 30,
                "max_cached_sequences": 10**9,
                "lookup_timeout_s": 10,
                "publish_timeout_s": 10,
                "touch_interval_s": 0,
                "feed_interval_s": 0,
                "strict": True,
                **settings,
            }
        )
    )


def _until(condition: Callable[[], object], timeout_s: float = 600.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def _flush(url: str) -> None:
    with contextlib.closing(redis.Redis.from_url(url)) as plain:
        plain.execute_command("FLUSHALL", "SYNC")


def _used(plain: Any) -> int:
    return plain.info("memory")["used_memory"]


def _untargeted(what: str, ours: str, other: str, value: float, unit: str) -> Figure:
    """A figure that nobody set a target for."""
    return Figure(what, ours, other, value, "", 0, unit)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.2f} ms"


if __name__ == "__main__":
    main()
