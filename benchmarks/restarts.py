"""What a reader is told while parts are restarted: python benchmarks/restarts.py.

Starts its own servers and processes, and needs ``distprefix[events]`` and what the tests need. A reader asks all the
time while an ingester, the engine or Redis is restarted: of prompts that the engine holds, and of some that it no
longer holds. Time runs from when what was away is back.
"""

from __future__ import annotations

import multiprocessing
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from measure import Figure, run_parts, untargeted

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.events.ingester import Engine, Ingester
from distprefix.redis.embedded import find_binary
from tests.fake_engine import FakeEngine, until
from tests.servers import Server

_BLOCK = 16
_PATIENCE_S = 600.0
_spawn = multiprocessing.get_context("spawn")
_random = random.Random(1)
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
        figures.append(untargeted(f"right again after: {what}", told, f"lease {_LEASE_S:g} s", seconds, " s"))
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
                with _reader(server.url) as reader:
                    until(lambda: all(_told(reader, prompt) == _LENGTH for prompt in world.truth), _PATIENCE_S)
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


def _reader(url: str) -> PrefixCacheOptimizer:
    return PrefixCacheOptimizer(
        PrefixCacheConfig(
            url=url,
            namespace="restart",
            worker_id="reader",
            chunk_size=_BLOCK,
            max_cached_sequences=10**9,
            lookup_timeout_s=10,
            publish_timeout_s=10,
            touch_interval_s=0,
            feed_interval_s=0.1,
        )
    )


if __name__ == "__main__":
    run_parts({"restart": restart}, __doc__)
