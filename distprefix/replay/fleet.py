"""Several node processes, each with its own L1 and worker id, that look prompts up and publish them."""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple, Self

import xxhash

from distprefix.chunking import Chain
from distprefix.config import PrefixCacheConfig
from distprefix.errors import DistPrefixError
from distprefix.optimizer import PrefixCacheOptimizer
from distprefix.replay.kv import KvBytes, Moved

__all__ = ["Fleet", "Outcome"]

_LARGEST_TABLE = 20_000_000
_FREE_TABLE = 1_000_000
_TABLE_PER_CHUNK = 8
"""Ids that the table of hashes may have per chunk that was asked for: one large id does not fill memory."""
_DEMOTE_S = 60.0
"""Others may promote as fast."""
Job = tuple[tuple[int, int], ...] | bytes
"""A prompt as runs of ids, or as packed tokens."""


class Restart(NamedTuple):
    """Ends a node's cache and opens it anew, as a new process would."""

    prewarm: bool


class Demote(NamedTuple):
    """Makes cold all payloads that are there."""


class Tell(NamedTuple):
    """Asks for a node's metrics."""


class Outcome(NamedTuple):
    """What one request met."""

    node: int
    chunks: int
    matched: int
    own: int
    """Chunks that the node holds itself."""
    l1: int
    calls: int
    lookup_us: float
    publish_us: float
    evicted: int
    """Chunks that this request's publish evicted."""
    moved: Moved = Moved()


class Fleet:
    """Node processes behind pipes. Use as a context manager; leaving it ends them."""

    def __init__(
        self,
        nodes: int,
        settings: dict[str, Any],
        *,
        share: bool = True,
        as_tokens: bool = False,
        name: str = "node",
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []
        self._waiting = [0] * nodes
        for i in range(nodes):
            own = {**settings, "worker_id": f"{name}-{i}"}
            if not share:
                own["namespace"] = f"{settings['namespace']}-{i}"
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, i, own, as_tokens), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            self._receive(pipe)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(timeout=5)
            if process.is_alive():
                process.kill()
                process.join()
            process.close()

    @property
    def in_flight(self) -> int:
        """Requests that no outcome has come back for."""
        return sum(self._waiting)

    def send(self, node: int, job: Job) -> None:
        """Give a node a request."""
        self._waiting[node] += 1
        try:
            self._pipes[node].send(job)
        except OSError as error:
            raise DistPrefixError(f"node {node} has ended") from error

    def restart(self, node: int, *, prewarm: bool) -> None:
        """Restart a node that has no request in flight, and wait until it is there."""
        self._pipes[node].send(Restart(prewarm))
        self._receive(self._pipes[node])

    def demote(self) -> None:
        """Make cold all payloads that are there, while no request is in flight."""
        self._pipes[0].send(Demote())
        self._receive(self._pipes[0])

    def metrics(self) -> list[dict[str, Any]]:
        """Every node's metrics, while no request is in flight."""
        for pipe in self._pipes:
            pipe.send(Tell())
        return [self._receive(pipe) for pipe in self._pipes]

    def outcomes(self) -> Iterator[Outcome]:
        """Wait for at least one outcome; all that are there."""
        ready = wait([pipe for i, pipe in enumerate(self._pipes) if self._waiting[i]])
        for pipe in ready:
            assert isinstance(pipe, Connection)
            outcome: Outcome = self._receive(pipe)
            self._waiting[outcome.node] -= 1
            yield outcome

    def _receive(self, pipe: Connection) -> Any:
        try:
            reply = pipe.recv()
        except (EOFError, OSError) as error:
            raise DistPrefixError(f"node {self._pipes.index(pipe)} has ended") from error
        if isinstance(reply, str):
            raise DistPrefixError(f"node {self._pipes.index(pipe)}: {reply}")
        return reply


class _Prompts:
    """Ids to hashes or tokens, the same in every process."""

    def __init__(self, block_size: int, *, as_tokens: bool) -> None:
        self._as_tokens = as_tokens
        self._bytes = 4 * block_size
        self._table = bytearray()
        self._asked = 0
        """Chunks of all prompts so far."""

    def read(self, job: Job) -> Any:
        if isinstance(job, bytes):
            return job
        if self._as_tokens:
            ids = (i for first, count in job for i in range(first, first + count))
            return b"".join(hashlib.shake_128(i.to_bytes(8, "little")).digest(self._bytes) for i in ids)
        return Chain.packed(b"".join(self._hashes(first, count) for first, count in job))

    def _hashes(self, first: int, count: int) -> bytes:
        self._asked += count
        if first + count > min(_LARGEST_TABLE, _FREE_TABLE + _TABLE_PER_CHUNK * self._asked):
            return b"".join(_hash(i) for i in range(first, first + count))
        known = len(self._table) // 16
        if first + count > known:
            self._table += b"".join(_hash(i) for i in range(known, first + count))
        return bytes(self._table[16 * first : 16 * (first + count)])


def _hash(i: int) -> bytes:
    return xxhash.xxh3_128_digest(i.to_bytes((i.bit_length() + 7) // 8 or 1, "little"))


def _serve(pipe: Connection, node: int, settings: dict[str, Any], as_tokens: bool) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    in_step, size = bool(settings.pop("in_step", False)), int(settings.pop("payload_bytes", 0))
    config = PrefixCacheConfig.from_mapping(settings)
    prompts, kv = _Prompts(config.chunk_size, as_tokens=as_tokens), KvBytes(size) if size else None
    try:
        job: Any = Restart(prewarm=False)
        while isinstance(job, Restart):
            with PrefixCacheOptimizer(replace(config, prewarm_on_start=job.prewarm)) as cache:
                pipe.send(node)
                while (job := pipe.recv()) is not None and not isinstance(job, Restart):
                    match job:
                        case Demote():
                            until = time.monotonic() + _DEMOTE_S
                            while cache.demote(0.0) and time.monotonic() < until:
                                pass
                            pipe.send(node)
                        case Tell():
                            pipe.send(cache.get_metrics())
                        case _:
                            pipe.send(_do(cache, node, prompts.read(job), kv, in_step=in_step))
    except EOFError:
        pass  # the parent is gone
    except DistPrefixError as error:
        with contextlib.suppress(OSError):
            pipe.send(f"{type(error).__name__}: {error}")


def _do(cache: PrefixCacheOptimizer, node: int, prompt: Any, kv: KvBytes | None, *, in_step: bool) -> Outcome:
    if in_step:
        cache.catch_up()  # what another node's publish evicted just now is known before this look-up
    hit = cache.find_longest_cache_hit(prompt)
    evicted = cache.get_metrics()["evicted_chunks"] if in_step else 0
    chunks = len(prompt) if isinstance(prompt, Chain) else len(prompt) // (4 * cache.config.chunk_size)
    own = next((held for name, held in hit.holders if name == cache.config.holder), 0)
    moved = Moved()
    if kv is not None and chunks:  # first: what others find of this node they can load
        chain = prompt if isinstance(prompt, Chain) else cache.chain_of(prompt)
        moved = kv.exchange(cache, chain, own, hit.matched_chunks)
    began = time.perf_counter_ns()
    cache.cache_prefix(prompt)
    publish_us = (time.perf_counter_ns() - began) / 1000
    return Outcome(
        *(node, chunks, hit.matched_chunks, own, hit.l1_chunks, hit.redis_calls, hit.lookup_time_us, publish_us),
        evicted=cache.get_metrics()["evicted_chunks"] - evicted if in_step else 0,
        moved=moved,
    )
