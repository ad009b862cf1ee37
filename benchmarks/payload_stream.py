"""Look-ups beside streams of payloads, and payloads between the tiers: python benchmarks/payload_stream.py.

Needs ``distprefix[embedded,payloads]`` and NumPy. Payloads are Gaussian noise rounded to bf16: zstd packs the exponents
of real KV, and cannot pack its mantissas, and so it is here.

The part `lookups` runs a server, a reader and a stream: with two cores, or anything else at work, its p99 is also that
of the scheduler. Streams load at full speed, from another process or from a thread of the reader's. "One connection"
is what the look-ups would be without connections of the payloads' own: the same walks and GETs of the same values on
one redis-py connection, each in its turn.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import random
import statistics
import threading
import time
from collections.abc import Callable, Generator
from typing import Any, NamedTuple

import redis
from measure import Figure, run_parts, untargeted
from payload_common import bf16_payload, gb_per_s, new_chain, open_cache

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.chunking import Chain
from distprefix.redis.client import Client
from distprefix.redis.connections import connect
from distprefix.redis.embedded import EmbeddedServer
from distprefix.tiers.codecs import codec_named
from distprefix.tiers.store import PART_BYTES

_MIB = 1024 * 1024
_STREAMS = {"2 MiB": (2 * _MIB, 16), "32 MiB": (32 * _MIB, 2)}
"""Length of a payload and payloads in a load."""
_LOOKED_UP = 512
"""Chunks of the prompt that is looked up."""
_SLICE_S = 1.0
_spawn = multiprocessing.get_context("spawn")
_random = random.Random(3)


def lookups(url: str, scale: float) -> list[Figure]:
    """Look-ups in L2 while payloads are streamed from the same server."""
    with open_cache(url, "stream-writer") as writer, open_cache(url, "stream") as reader:
        asked = new_chain(_LOOKED_UP)
        writer.cache_prefix(asked)
        streamed = {name: _store(writer, size, count) for name, (size, count) in _STREAMS.items()}
        shared = _OneConnection(url, reader)
        with contextlib.ExitStack() as stack:
            cases: dict[str, _Stream | None] = {"idle": None}
            for name, chain in streamed.items():
                size = _STREAMS[name][0]
                cases[f"{name}, process"] = stack.enter_context(_in_process(url, chain, size))
                cases[f"{name}, thread"] = stack.enter_context(_in_thread(_loader(reader, chain, size)))
                cases[f"{name}, one connection"] = stack.enter_context(_in_thread(shared.reads(chain, size)))
            took: dict[str, list[float]] = {case: [] for case in cases}
            for _ in range(max(2, int(20 * scale))):
                for case, stream in _random.sample(list(cases.items()), len(cases)):
                    with stream or contextlib.nullcontext(), shared.looks_up(one="one" in case):
                        took[case] += _look_up(reader, asked, _SLICE_S)
            speeds = {case: stream.speed for case, stream in cases.items() if stream}
    return [figure for name in _STREAMS for figure in _latencies(name, took, speeds)]


def tiers(url: str, scale: float) -> list[Figure]:
    """Payloads of 2 MiB made cold and warm again: on one server and between two, raw and packed."""
    count, figures = max(8, int(64 * scale)), list[Figure]()
    with EmbeddedServer() as second:
        moves = [
            _Move(url, cold, codec, count)
            for cold in (None, second.url)
            for codec in ("raw", PrefixCacheConfig().cold_codec)
        ]
        sides = [(move, run) for move in moves for run in (move.ours, move.plain)]
        took: dict[Any, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(max(2, int(7 * scale))):
            for side in _random.sample(sides, len(sides)):
                took[side].append(side[1]())
        for move in moves:
            for at, what in enumerate(("demote", "promote")):
                ours, plain = (statistics.median(t[at] for t in took[move, run]) for run in (move.ours, move.plain))
                row = f"{what}, {count} x 2 MiB, {move.name}, against GET, SET, UNLINK by redis-py"
                figures.append(
                    untargeted(row, gb_per_s(move.bytes, ours), gb_per_s(move.bytes, plain), plain / ours, "x")
                )
            move.close()
    return figures


def _latencies(name: str, took: dict[str, list[float]], speeds: dict[str, float]) -> Generator[Figure]:
    """What look-ups take beside one kind of stream, and how fast it is meanwhile."""
    what = f"L2 look-up of {_LOOKED_UP} chunks beside loads of {name}"
    process, thread, one = (f"{name}, {how}" for how in ("process", "thread", "one connection"))
    for label, share in (("p50", 0.5), ("p99", 0.99)):
        value = {case: _percentile(times, share) for case, times in took.items()}
        for how, case, other in (
            ("by another process, against idle", process, "idle"),
            ("by a thread, against idle", thread, "idle"),
            ("by a thread, against one connection", thread, one),
        ):
            ours, theirs = value[case], value[other]
            ratio = ours / theirs if other == "idle" else theirs / ours
            yield untargeted(f"{what} {how}, {label}", _ms(ours), _ms(theirs), ratio, "x")
    yield untargeted(
        f"loads of {name} meanwhile, by another process, by a thread, against one connection",
        f"{speeds[process]:.2f}, {speeds[thread]:.2f} GB/s",
        f"{speeds[one]:.2f} GB/s",
        speeds[thread] / speeds[one],
        "x",
    )


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.2f} ms"


def _look_up(cache: PrefixCacheOptimizer, chain: Chain, seconds: float) -> list[float]:
    """Seconds that look-ups took that L1 knows nothing of, at random moments."""
    took, until = list[float](), time.perf_counter() + seconds
    while time.perf_counter() < until:
        time.sleep(_random.uniform(0, 0.002))
        with cache._state.lock:
            cache._state.l1.clear()
        began = time.perf_counter()
        result = cache.find_longest_cache_hit(chain)
        took.append(time.perf_counter() - began)
        assert result.matched_chunks == len(chain), "the look-up found less than there is"
    return took


# Streams


class _Stream:
    """Loads that go on while it is entered; `state` is shared with the thread or process that does them."""

    def __init__(self, state: _State) -> None:
        self._state = state
        self._seconds = 0.0
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()
        self._state.running.set()

    def __exit__(self, *_: object) -> None:
        self._state.running.clear()
        self._state.resting.wait()
        self._seconds += time.perf_counter() - self._began

    @property
    def speed(self) -> float:
        """GB/s over the time that it ran."""
        return self._state.moved.value / self._seconds / 1e9


class _State(NamedTuple):
    running: Any
    resting: Any
    stop: Any
    moved: Any
    """Bytes."""


def _work(state: _State, load: Callable[[], int]) -> None:
    """Load while told to."""
    while True:
        state.resting.set()
        state.running.wait()
        if state.stop.is_set():
            return
        state.resting.clear()
        while state.running.is_set():
            state.moved.value += load()


@contextlib.contextmanager
def _in_thread(load: Callable[[], int]) -> Generator[_Stream]:
    with _stream(threading.Thread, _work, load) as stream:
        yield stream


@contextlib.contextmanager
def _in_process(url: str, chain: Chain, size: int) -> Generator[_Stream]:
    with _stream(_spawn.Process, _work_alone, url, chain.data, size) as stream:
        yield stream


@contextlib.contextmanager
def _stream(start: Callable[..., Any], work: Callable[..., None], *args: Any) -> Generator[_Stream]:
    state = _State(_spawn.Event(), _spawn.Event(), _spawn.Event(), _spawn.Value("d", 0))
    worker = start(target=work, args=(state, *args), daemon=True)
    worker.start()
    try:
        if not state.resting.wait(60):
            raise TimeoutError("a stream of the benchmark did not start within 60 s")
        yield _Stream(state)
    finally:
        state.stop.set()
        state.running.set()
        worker.join(30)


def _work_alone(state: _State, url: str, packed: bytes, size: int) -> None:
    with open_cache(url, "stream-loader") as cache:
        _work(state, _loader(cache, Chain.packed(packed), size))


def _store(cache: PrefixCacheOptimizer, size: int, count: int) -> Chain:
    """A new chain with payloads."""
    chain = new_chain(count)
    assert cache.store(chain, [bf16_payload(size, seed) for seed in range(count)]) == count, "not all was stored"
    return chain


def _loader(cache: PrefixCacheOptimizer, chain: Chain, size: int) -> Callable[[], int]:
    """Loads a chain's payloads into buffers of its own; returns their bytes."""
    targets = [bytearray(size) for _ in chain]

    def load() -> int:
        assert cache.load(chain, targets).chunks == len(chain), "the stream did not load all"
        return size * len(chain)

    return load


class _OneConnection:
    """What the walks of a reader and the payloads would be on one redis-py connection."""

    def __init__(self, url: str, reader: PrefixCacheOptimizer) -> None:
        self._link = reader._state.link
        self._own = self._link.lookups
        self._client = _InTurns(connect(url, 10), self._link.breakers, self._link.failures)

    @contextlib.contextmanager
    def looks_up(self, *, one: bool) -> Generator[None]:
        """Let the reader walk on it, or as it does by itself."""
        self._link.lookups = self._client if one else self._own
        try:
            yield
        finally:
            self._link.lookups = self._own

    def reads(self, chain: Chain, size: int) -> Callable[[], int]:
        """Gets the values of a chain's payloads one after the other, and copies them to where they are wanted."""
        target = memoryview(bytearray(size + PART_BYTES))
        firsts = [self._link.keys.payload(chunk.hex()) for chunk in chain]
        parts: Any = self._client.redis.keys(f"{self._link.keys.base}kv:*:*")
        keys = [*firsts, *parts]

        def load() -> int:
            for key in keys:
                value = self._client.command("GET", key, deadline=time.monotonic() + 10)
                if value is not None:
                    target[: len(value)] = value
            return size * len(chain)

        return load


class _InTurns(Client):
    """A client whose callers have its one connection by turns: nobody comes twice while another one waits."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._next, self._turn = threading.Lock(), threading.Lock()

    def command(self, *args: Any, deadline: float, reads: bool | None = None) -> Any:
        with self._next:
            self._turn.acquire()
        try:
            return super().command(*args, deadline=deadline, reads=reads)
        finally:
            self._turn.release()


# Tiers


class _Move:
    """Payloads that become cold and warm again: by ours, and by redis-py alone, key by key with the same codec."""

    def __init__(self, url: str, cold_url: str | None, codec: str, count: int) -> None:
        where = "two" if cold_url else "one"
        self._cache = open_cache(url, f"tiers.{where}.{codec}", cold_url=cold_url, cold_codec=codec)
        self._codec = codec_named(codec)
        self._payloads = [bf16_payload(2 * _MIB, seed) for seed in range(count)]
        self._warm, self._cold = (redis.Redis.from_url(each) for each in (url, cold_url or url))
        self.bytes = 2 * _MIB * count
        packed = sum(len(self._codec.encode(payload)) for payload in self._payloads)
        self.name = f"{where} Redis, {codec} ({self.bytes / packed:.2f} times smaller)"

    def ours(self) -> tuple[float, float]:
        """Seconds of demote and of promote."""
        cache, chain = self._cache, new_chain(len(self._payloads))
        assert cache.store(chain, self._payloads) == len(chain), "not all was stored"
        time.sleep(0.01)
        began = time.perf_counter()
        demoted = cache.demote(idle_s=0, timeout_s=600)
        between = time.perf_counter()
        promoted = cache.promote(chain, timeout_s=600)
        ended = time.perf_counter()
        assert demoted == promoted == len(chain), f"{demoted} became cold and {promoted} warm, of {len(chain)}"
        loaded = cache.load(chain)
        assert list(loaded.payloads) == self._payloads, "the payloads are not what they were"
        cache.clear()
        return between - began, ended - between

    def plain(self) -> tuple[float, float]:
        """The same by GET, SET and UNLINK. Nothing is checked, and nobody is told where the payloads are."""
        for at, payload in enumerate(self._payloads):
            self._warm.set(f"warm:{at}", payload)
        began = time.perf_counter()
        for at in range(len(self._payloads)):
            value: Any = self._warm.get(f"warm:{at}")
            self._cold.set(f"cold:{at}", memoryview(self._codec.encode(memoryview(value))))
            self._warm.unlink(f"warm:{at}")
        between = time.perf_counter()
        target = memoryview(bytearray(2 * _MIB))
        for at in range(len(self._payloads)):
            value = self._cold.get(f"cold:{at}")
            self._codec.decode(memoryview(value), target)
            self._warm.set(f"warm:{at}", target)
            self._cold.unlink(f"cold:{at}")
        ended = time.perf_counter()
        self._warm.unlink(*(f"warm:{at}" for at in range(len(self._payloads))))
        return between - began, ended - between

    def close(self) -> None:
        """Close the connections."""
        self._cache.close()
        for client in (self._warm, self._cold):
            client.close()


if __name__ == "__main__":
    run_parts({"lookups": lookups, "tiers": tiers}, __doc__)
