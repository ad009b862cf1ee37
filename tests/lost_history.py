"""Histories that a server loses: random operations, snapshots, restores, and what every cache may say afterwards.

``python -m tests.lost_history --runs 100000`` runs the long form, and says which seed fails.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from unittest import mock

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import NotAttachedError, UnavailableError
from distprefix.redis.keys import Keys
from distprefix.redis.restored import declare_restored
from tests.payloads import data
from tests.servers import Server, find_server

__all__ = ["Deployment", "InPlace", "Killed", "Promoted", "Run", "without_background"]

CHUNK = 4
WORKERS = ("a", "b")
STEPS = 24
Prompt = tuple[int, ...]


@contextmanager
def without_background() -> Generator[None]:
    """Caches have no thread: their background is worked by hand."""
    with mock.patch.object(PrefixCacheOptimizer, "_begin_background"):
        yield


class Deployment(Protocol):
    """A server whose state can be kept, and brought back later."""

    url: str

    def keep(self) -> Any:
        """A state to come back to."""
        ...

    def restore(self, kept: Any) -> None:
        """The server has this state, and has lost all that came after it."""
        ...

    def flush(self) -> None:
        """All is removed."""
        ...


class InPlace:
    """A server that runs on: keys are dumped, and brought back in one transaction. Fast."""

    def __init__(self, server: Server) -> None:
        self.url = server.url
        self._admin = server.client()

    def flush(self) -> None:
        """FLUSHALL."""
        self._admin.flushall()

    def keep(self) -> list[tuple[bytes, bytes, int]]:
        """Every key."""
        found: list[tuple[bytes, bytes, int]] = []
        for key in self._admin.scan_iter(count=1000):
            value: Any = self._admin.dump(key)
            left: Any = self._admin.pttl(key)
            if value is not None:
                found.append((key, value, max(left, 0)))
        return found

    def restore(self, kept: Any) -> None:
        """At once, as where a server is killed and loads older data between two calls."""
        with self._admin.pipeline(transaction=True) as pipe:
            pipe.flushall()
            for key, value, left in kept:
                pipe.restore(key, left, value)
            pipe.execute()


class Killed:
    """A server that saves a snapshot, is killed and comes back with it. It can only come back to the newest one."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.url = server.url

    def flush(self) -> None:
        """FLUSHALL."""
        with self._server.client() as client:
            client.flushall()

    def keep(self) -> int:
        """SAVE."""
        with self._server.client() as client:
            client.save()
        return 0

    def restore(self, kept: Any) -> None:
        """SIGKILL, and start."""
        del kept
        self._server.kill()
        self._server.start()


class Promoted:
    """A primary and a replica behind one name. The replica lags by what came since it was detached."""

    def __init__(self, first: Server, second: Server, switch: Callable[[Server], str]) -> None:
        self._primary = first
        self._replica = second
        self._switch = switch
        self.url = switch(first)
        self._follow()

    def flush(self) -> None:
        """FLUSHALL."""
        with self._primary.client() as client:
            client.flushall()

    def keep(self) -> int:
        """The replica has all there is, and hears of nothing from now on."""
        self._follow()
        with self._replica.client() as client:
            client.replicaof("127.0.0.1", "1")  # nothing listens there: it keeps what it has
        return 0

    def restore(self, kept: Any) -> None:
        """The primary is killed, the replica takes over."""
        del kept
        self._primary.kill()
        with self._replica.client() as client:
            client.replicaof("NO", "ONE")
        self._switch(self._replica)
        self._primary.start()
        self._primary, self._replica = self._replica, self._primary
        self._follow()

    def _follow(self) -> None:
        with self._replica.client() as replica, self._primary.client() as primary:
            replica.replicaof("127.0.0.1", str(self._primary.port))
            deadline = time.monotonic() + 20
            while time.monotonic() < deadline:
                follows: Any = replica.info("replication")
                leads: Any = primary.info("replication")
                if follows.get("master_link_status") == "up" and (
                    follows["slave_repl_offset"] >= leads["master_repl_offset"]
                ):
                    return
                time.sleep(0.005)
            raise AssertionError("the replica does not follow")


@dataclass
class Worker:
    """A worker and what is true of it."""

    cache: PrefixCacheOptimizer
    held: dict[Prompt, int] = field(default_factory=dict[Prompt, int])
    """Prefix to the block that its last chunk is in. Closed under prefix."""
    unnamed: set[Prompt] = field(default_factory=set[Prompt])
    """Prompts that it published without naming blocks; it cannot take them back."""

    def chunks(self, prompt: Prompt) -> int:
        """How many leading chunks of the prompt it holds."""
        named = 0
        while prompt[: (named + 1) * CHUNK] in self.held and named < len(prompt) // CHUNK:
            named += 1
        return max([named, *(_common(prompt, other) for other in self.unnamed)])


def _common(one: Prompt, other: Prompt) -> int:
    chunks = 0
    while chunks < min(len(one), len(other)) // CHUNK:
        if one[chunks * CHUNK : (chunks + 1) * CHUNK] != other[chunks * CHUNK : (chunks + 1) * CHUNK]:
            break
        chunks += 1
    return chunks


class Run:
    """One history, made from a seed. `check` raises AssertionError."""

    def __init__(self, deployment: Deployment, seed: int, namespace: str, *, only_newest: bool = False) -> None:
        self._deployment = deployment
        self._random = random.Random(seed)
        self._namespace = namespace
        self._keys = Keys(namespace)
        self._only_newest = only_newest
        self._block = 0
        self._kept: list[Any] = []
        self._was_reduced = False
        """Whether anybody took from the tree what a worker holds: then it may say less."""
        self._stored: dict[Prompt, list[bytes]] = {}
        self.steps: list[str] = []
        self._prompts = [self._prompt() for _ in range(6)]
        self.workers = {name: Worker(self._open(name)) for name in WORKERS}
        self.reader = self._open("reader")

    def play(self) -> None:
        """All steps, then the stated bound, then what everybody says."""
        actions: list[tuple[Callable[[], None], int]] = [
            (self._publish, 8),
            (self._publish_unnamed, 1),
            (self._remove, 6),
            (self._move, 2),
            (self._look_up, 5),
            (self._work, 4),
            (self._keep, 4),
            (self._restore, 4),
            (self._store, 2),
            (self._flush, 1),
            (self._evict, 1),
            (self._clear, 1),
            (self._restart, 1),
            (self._drop_worker, 1),
            (self._say_restored, 1),
        ]
        kinds, weights = zip(*actions, strict=True)
        for _ in range(STEPS):
            self._random.choices(kinds, weights)[0]()
        self.settle()
        self.check()

    def settle(self) -> None:
        """The bound: each cache works its background, and once more for what others found out."""
        for _ in range(4):
            for cache in self._caches():
                self._work_of(cache)

    def check(self) -> None:
        """No cache says of a worker that it holds more than it does, a new one says all, and no byte is wrong."""
        fresh = self._open("fresh")
        for prompt in self._prompts:
            for cache in (*self._caches(), fresh):
                told = {holder.worker: holder.chunks for holder in cache.find_longest_cache_hit(prompt).holders}
                for name, worker in self.workers.items():
                    self._compare(cache, name, told.get(name, 0), worker.chunks(prompt))
                    if cache is fresh and not self._may_be_less:
                        assert told.get(name, 0) == worker.chunks(prompt), f"{name} is less than it holds: {self.steps}"
            found = [bytes(payload) for payload in self.reader.load(prompt).payloads]
            assert found == data(prompt, 40)[: len(found)], self.steps
        fresh.close()
        report = self.reader.check_integrity()
        assert report.problems == [], (report.problems, self.steps)

    @property
    def _may_be_less(self) -> bool:
        """Whether the tree may say less than is held: some was taken from it, or a publish met a dead connection."""
        dropped = [worker.cache.get_metrics()["publishes_dropped"] for worker in self.workers.values()]
        return self._was_reduced or any(dropped)

    def _compare(self, cache: PrefixCacheOptimizer, name: str, said: int, has: int) -> None:
        assert said <= has, f"{cache.config.worker_id} says {said} of {name}, which holds {has}: {self.steps}"

    def close(self) -> None:
        """Close every cache, and remove what there is."""
        for cache in self._caches():
            cache.close()

    def _caches(self) -> list[PrefixCacheOptimizer]:
        return [*(worker.cache for worker in self.workers.values()), self.reader]

    def _open(self, name: str) -> PrefixCacheOptimizer:
        return PrefixCacheOptimizer(
            PrefixCacheConfig(
                url=self._deployment.url,
                namespace=self._namespace,
                worker_id=name,
                chunk_size=CHUNK,
                max_run=4,
                feed_interval_s=1e-9,
                touch_interval_s=1e-9,
                lookup_timeout_s=5.0,
                publish_timeout_s=5.0,
                breaker_failures=10_000,
                l1_ttl_s=600.0,
            )
        )

    def _prompt(self) -> Prompt:
        pick = self._random
        return tuple(token for _ in range(pick.randint(1, 7)) for token in [pick.randint(0, 1)] * CHUNK)

    def _one(self) -> Worker:
        return self.workers[self._random.choice(WORKERS)]

    def _any_prompt(self) -> Prompt:
        if self._random.random() < 0.2:
            self._prompts[self._random.randrange(len(self._prompts))] = self._prompt()
        return self._random.choice(self._prompts)

    # What happens

    def _publish(self) -> None:
        worker, prompt = self._one(), self._any_prompt()
        blocks = range(self._block, self._block + len(prompt) // CHUNK)
        self._block = blocks.stop
        self.steps.append(f"{worker.cache.config.worker_id} publishes {prompt[::CHUNK]}")
        worker.cache.cache_prefix(prompt, blocks)
        for chunk, block in enumerate(blocks):
            worker.held[prompt[: (chunk + 1) * CHUNK]] = block

    def _publish_unnamed(self) -> None:
        worker, prompt = self._one(), self._any_prompt()
        self.steps.append(f"{worker.cache.config.worker_id} publishes {prompt[::CHUNK]} without blocks")
        worker.cache.cache_prefix(prompt)
        worker.unnamed.add(prompt)

    def _remove(self) -> None:
        worker = self._one()
        if not worker.held or worker.unnamed:  # what was published without blocks cannot be taken back
            return
        prefix, block = self._random.choice(list(worker.held.items()))
        self.steps.append(f"{worker.cache.config.worker_id} removes {prefix[::CHUNK]}")
        worker.cache.remove_skipped_blocks([block])
        worker.held = {other: at for other, at in worker.held.items() if other[: len(prefix)] != prefix}

    def _move(self) -> None:
        worker, prompt = self._one(), self._any_prompt()
        blocks = range(self._block, self._block + len(prompt) // CHUNK)
        self._block = blocks.stop
        name = worker.cache.chain_of(prompt).data[-16:].hex()
        if worker.cache.update_prefix_state(name, blocks):
            self.steps.append(f"{worker.cache.config.worker_id} moves {prompt[::CHUNK]}")
            for chunk, block in enumerate(blocks):
                worker.held[prompt[: (chunk + 1) * CHUNK]] = block

    def _look_up(self) -> None:
        cache = self._random.choice(self._caches())
        self.steps.append(f"{cache.config.worker_id} looks up")
        cache.find_longest_cache_hit(self._any_prompt())

    def _work(self) -> None:
        cache = self._random.choice(self._caches())
        self.steps.append(f"{cache.config.worker_id} works")
        self._work_of(cache)

    def _work_of(self, cache: PrefixCacheOptimizer) -> None:
        cache._upkeep.work()
        assert cache.get_metrics()["background_errors"] == 0, self.steps

    def _keep(self) -> None:
        self.steps.append("a snapshot is kept")
        self._kept.append(self._deployment.keep())

    def _restore(self) -> None:
        if not self._kept:
            return
        at = len(self._kept) - 1 if self._only_newest else self._random.randrange(len(self._kept))
        self.steps.append(f"snapshot {at} comes back")
        self._deployment.restore(self._kept[at])
        if self._only_newest:
            self._kept = []

    def _store(self) -> None:
        prompt = self._any_prompt()
        self.steps.append(f"{prompt[::CHUNK]} is stored")
        self._one().cache.store(prompt, data(prompt, 40))

    def _flush(self) -> None:
        self.steps.append("all is flushed")
        self._deployment.flush()

    def _evict(self) -> None:
        self.steps.append("all but one chunk is evicted")
        self._was_reduced = True
        evictor = replace(self.reader.config, worker_id="evictor", l2_max_chunks=1)
        with suppress(UnavailableError), PrefixCacheOptimizer(evictor) as cache:
            cache.maintain()

    def _clear(self) -> None:
        worker = self._one()
        self.steps.append(f"{worker.cache.config.worker_id} clears")
        try:
            worker.cache.clear()
        except UnavailableError:  # nothing is forgotten then
            return
        worker.held.clear()
        worker.unnamed.clear()
        self._was_reduced = True

    def _restart(self) -> None:
        name = self._random.choice(WORKERS)
        self.steps.append(f"{name} is killed and comes back with nothing")
        old = self.workers[name].cache
        old._state.unusable = "killed"
        old._tiers.close()
        old._state.link.close()
        self.workers[name] = Worker(self._open(name))

    def _drop_worker(self) -> None:
        self.steps.append("the reader drops a")
        with suppress(UnavailableError):
            self.reader.drop_worker("a")
        self._was_reduced = True

    def _say_restored(self) -> None:
        self.steps.append("an operator says that it was restored")
        link = self.reader._state.link
        with suppress(NotAttachedError, UnavailableError):  # it was flushed, or a connection was dead
            declare_restored(link.admin, link.keys, time.monotonic() + 5)


def run_in_place(server: Server, seeds: range) -> None:
    """Histories one after another on one server."""
    deployment = InPlace(server)
    with without_background():
        for seed in seeds:
            deployment.flush()
            run = Run(deployment, seed, "n")
            try:
                run.play()
            except BaseException:
                sys.stderr.write(f"seed {seed}\n")
                raise
            finally:
                run.close()


def _main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--first-seed", type=int, default=0)
    arguments = parser.parse_args()
    server = Server(find_server("valkey-9.1")).start()
    began = time.monotonic()
    try:
        for first in range(arguments.first_seed, arguments.first_seed + arguments.runs, 1000):
            run_in_place(server, range(first, min(first + 1000, arguments.first_seed + arguments.runs)))
            done = min(first + 1000, arguments.first_seed + arguments.runs) - arguments.first_seed
            sys.stdout.write(f"{done} runs, {time.monotonic() - began:.0f} s\n")
            sys.stdout.flush()
    finally:
        server.stop()


if __name__ == "__main__":
    _main()
