"""What following engines' events takes: python benchmarks/ingest.py [--dynamo PYTHON].

Starts its own servers and processes, and needs ``distprefix[events]`` and what the tests need. --dynamo names the
Python of an environment with NVIDIA Dynamo's indexer, which is measured beside:

    python3.11 -m venv DYNAMO && DYNAMO/bin/pip install ai-dynamo-runtime==1.6.1 msgpack pyzmq

rate: a busy engine's frames (event_frames.py), from memory and over ZMQ. CPU seconds are of all threads of this process
    and of the server: where others are at work they are the figure to trust.
forget: a worker that holds a million chunks is dropped.
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
import time
from collections.abc import Generator, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import redis
import zmq
from event_frames import frames as event_frames
from event_frames import prefill_frames
from measure import Figure, run_parts, untargeted

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer, operations
from distprefix.chunking import HASH_BYTES, Chain
from distprefix.errors import ReplayError
from distprefix.events.follower import Follower
from distprefix.events.frames import Frame
from distprefix.events.ingester import Engine, Ingester, follower_of
from distprefix.events.journal import Fate
from distprefix.redis.client import Client
from distprefix.redis.connections import connect
from distprefix.redis.journal import RedisJournal
from distprefix.redis.keys import Keys
from distprefix.redis.namespace import attach
from tests.fake_engine import until

_GOAL = 100_000
_AT_ONCE = 1000
_BLOCK = 16
_PATIENCE_S = 600.0
_spawn = multiprocessing.get_context("spawn")
_random = random.Random(1)


def main() -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dynamo")
    options, sys.argv[1:] = parser.parse_known_args()
    global _dynamo  # noqa: PLW0603 - run_parts knows the parts' arguments
    _dynamo = options.dynamo or ""
    run_parts({"rate": rate, "forget": forget, "bytes": bytes_}, __doc__)


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

    def replay(self, start: int, timeout_s: float, **_: Any) -> Iterator[Frame]:  # noqa: ARG002
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
        until(lambda: stream.state == "following", _PATIENCE_S)
        with _timing(url) as took:
            mine.send(True)
            until(lambda: (stream.follower.position or (-1,))[0] == count - 1, _PATIENCE_S)
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
                link.publish(operations.publish(prompt, 0, holder, link.epoch, max_run=256))
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
        untargeted(
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
        return untargeted(what, "not measured", "name its Python by --dynamo", 0, " ms")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "frames"
        path.write_bytes(b"".join(msgpack.packb(payload) or b"" for payload in event_frames(blocks)))
        told = _ask_dynamo(path, "tree")
    value = told["remove_worker_ms"]
    return untargeted(what, f"{value:.2f} ms", f"{told['blocks'] - told['removed']:,} blocks", value, " ms")


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
            figures.append(untargeted(f"bytes for a block held: {what}", f"{ours:.1f}", other, ours, ""))
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
    client = Client(connect(url, 30))
    hasher = attach(client, Keys(namespace), config, time.monotonic() + 30).hasher
    engine = Engine(worker=worker, endpoint="tcp://nowhere:1")
    follower, journal = follower_of(engine, config, hasher, client, _Silent(), lease_s=3600, engine_chains=False)
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


def _flush(url: str) -> None:
    with contextlib.closing(redis.Redis.from_url(url)) as plain:
        plain.execute_command("FLUSHALL", "SYNC")


def _used(plain: Any) -> int:
    return plain.info("memory")["used_memory"]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.2f} ms"


if __name__ == "__main__":
    main()
