"""What keeping the shared tree within its budget, pre-warming and the feed take: python benchmarks/memory.py.

Starts its own servers and processes. The part `prewarm` replays traces from the folder that PREFIX_TRACES names, or
else from ../shared/traces. The parts `lookup` and `staleness` run up to three processes beside a server: with fewer
cores, or anything else at work, their p99 is that of the scheduler.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import redis
import xxhash
from measure import Figure, run_parts, untargeted

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer, operations
from distprefix.chunking import HASH_BYTES, Chain
from distprefix.operations import Bounds
from distprefix.prewarm import speculate as guess
from distprefix.redis.embedded import EmbeddedServer
from distprefix.replay.trace import Request, read_trace
from distprefix.staleness import check_samples

_CHUNK = 16
_RUN = 256
_TRACES = ("mooncake_conversation_b512", "sharegpt_b16", "claude_code_weka_sharedroot_b64")
_AFTER_RESTART = 100
_BACKLOG = 4_000_000
"""Chunks that the evicting process lets come together: some 160 calls' worth."""
_PROMPTS, _PREFIX, _LENGTH = 1000, 16, 48
"""Of the part `staleness`: prompts, chunks that they share, chunks of each."""
_random = random.Random(multiprocessing.current_process().name)  # each process publishes prompts of its own
_spawn = multiprocessing.get_context("spawn")


def main() -> None:
    """Run what was asked for and print it."""
    run_parts(_PARTS, __doc__)


def evict(url: str, scale: float) -> list[Figure]:
    """A full tree emptied by one client: chunks a second, and how long one call keeps the server from others."""
    figures: list[Figure] = []
    for chunks, run in ((100, 100), (256, 256), (4096, 256)):
        with _open(url, f"evict{run}", max_run=run) as cache:
            rounds = [_empty(cache, chunks, int(1_000_000 * scale)) for _ in range(max(2, int(5 * scale)))]
        what = f"evict, prompts of {chunks:,} chunks in runs of {run}"
        rate = statistics.median(one.chunks / sum(one.waited) for one in rounds)
        within = statistics.median(one.chunks / one.seconds_in_server for one in rounds)
        figures.append(Figure(what, _rate(rate), f"{_rate(within)} in the server", rate, ">=", 1_000_000, "/s"))
        figures.append(_longest(f"{what}, longest call, to the client", [one.waited for one in rounds]))
        figures.append(_longest(f"{what}, longest call, in the server", [one.in_server for one in rounds]))
        if any(any(one.on_cpu) for one in rounds):
            figures.append(_longest(f"{what}, longest call, on the processor", [one.on_cpu for one in rounds]))
    return figures


def lookup(url: str, scale: float) -> list[Figure]:
    """Look-ups that L1 knows nothing of, while one process publishes and another one evicts, by the million."""
    figures: list[Figure] = []
    with _open(url, "lookup", feed_interval_s=0.1) as cache:
        chain = _chain(512)
        cache.cache_prefix(chain)
        lease = cache.find_longest_cache_hit(chain).lease(3600)
        assert lease.chunks == 512
        for batch in (operations.EVICTS_A_CALL, 5):
            figures += _beside(cache, chain, batch, scale)
    return figures


def prewarm(url: str, scale: float) -> list[Figure]:
    """Bringing 10,000 chunks into an empty L1, and what L1 answers after a restart, with that and without."""
    shapes = ((100, 100), (1000, 10), (1, 10_000))
    figures = [_prewarming(url, prompts, chunks, max(5, int(30 * scale))) for prompts, chunks in shapes]
    for name, requests in _traces(_TRACES):
        half = min(len(requests) // 2, int(3000 * scale))
        with EmbeddedServer() as server:
            figures += _restarted(server.url, name, requests[:half], requests[half:][:_AFTER_RESTART])
    return figures


def staleness(url: str, scale: float) -> list[Figure]:
    """Answers of L1 that named more than there was, while one process publishes, removes and evicts at full speed."""
    figures: list[Figure] = []
    for i, (interval, ttl, at_once) in enumerate(((0.1, 1, True), (0.1, 30, True), (0, 1, True), (0.1, 30, False))):
        shared, namespace, touch = _Shared(), f"stale{i}", 0 if at_once else 1
        with (
            _running(shared, (_rewrite, url, namespace)),
            _open(
                url,
                f"{namespace}-reader",
                l1_ttl_s=ttl,
                feed_interval_s=interval,
                staleness_sample=0.0 if at_once else 1.0,
                touch_interval_s=touch,
            ) as cache,
        ):
            rates = _read_always(cache, 10 * scale, shared, at_once=at_once)
            told = cache.get_metrics()
        feed = f"feed every {interval} s" if interval else "no feed"
        when = "" if at_once else ", checked in the background"
        over, checked = told["staleness_over"], max(1, told["staleness_checked"])
        figures.append(
            untargeted(
                f"L1 answers that said too much: {feed}, TTL {ttl:g} s{when}; {rates}, {told['feed_gaps']} gaps",
                f"{over:,}",
                f"{checked:,} answers",
                100 * over / checked,
                "%",
            )
        )
    return figures


def speculate(url: str, scale: float) -> list[Figure]:
    """What guessing how prompts go on adds to L1, on four nodes that take turns: the share of hit chunks it answers."""
    del url
    figures: list[Figure] = []
    for name, requests in _traces(("mooncake_conversation_b512", "sharegpt_b16", "taubench_airline_b16")):
        (on, brought), (off, _) = (_guessing(requests[: int(2500 * scale)], speculate=on) for on in (True, False))
        what = f"L1 share of hit chunks with guesses, {name}, {brought:,} chunks guessed"
        figures.append(untargeted(what, f"{on:.2f} %", f"{off:.2f} % without", on - off, " points"))
    return figures


_PARTS: dict[str, Callable[[str, float], list[Figure]]] = {
    "evict": evict,
    "lookup": lookup,
    "prewarm": prewarm,
    "staleness": staleness,
    "speculate": speculate,
}


def _traces(names: Iterable[str]) -> Iterator[tuple[str, list[Request]]]:
    """Real workloads by name, as far as they are here."""
    folder = Path(os.environ.get("PREFIX_TRACES") or Path(__file__).resolve().parents[2] / "shared" / "traces")
    for name in names:
        path = next(iter(folder.glob(f"{name}*.jsonl*")), None)
        if path is None:
            print(f"skipped: no {name} in {folder}; name the folder of traces in PREFIX_TRACES", file=sys.stderr)
        else:
            yield name, [request for request in read_trace(str(path)) if request.chunks]


def _guessing(requests: list[Request], *, speculate: bool) -> tuple[float, int]:
    """Four nodes take turns. Returns the share that L1 answers, in percent, and the chunks guessed."""
    with EmbeddedServer() as server:
        nodes = [_open(server.url, f"guess-{i}", l1_ttl_s=600, speculate=speculate) for i in range(4)]
        hit = answered = 0
        for i, request in enumerate(requests):
            cache, prompt = nodes[i % len(nodes)], _prompt(request)
            cache.catch_up()
            result = cache.find_longest_cache_hit(prompt)
            hit, answered = hit + result.matched_chunks, answered + result.l1_chunks
            cache.cache_prefix(prompt)
            guess(cache._state)
        told = [cache.get_metrics() for cache in nodes]
        for cache in nodes:
            cache.close()
        return 100 * answered / max(1, hit), sum(one["speculated_chunks"] for one in told)


# Evict


class _Emptied(NamedTuple):
    """A tree taken down. Times are in seconds."""

    chunks: int
    seconds_in_server: float
    waited: list[float]
    """For each call."""
    in_server: list[float]
    """For each call that took a millisecond."""
    on_cpu: list[float]
    """For each call: without the time that the server had no processor. Zeros where the system does not tell."""


def _empty(cache: PrefixCacheOptimizer, chunks: int, total: int) -> _Emptied:
    """Fill the tree and evict all of it."""
    _fill(cache, chunks, total)
    link, batch, waited = cache._state.link, operations.EVICTS_A_CALL, list[float]()
    before, evicted, taken = _script_seconds(cache.url, "evalsha"), None, 0
    server, on_cpu = _process_id(cache.url), list[float]()
    with _slow_calls(cache.url) as in_server:
        while evicted is None or evicted.more:
            time.sleep(0.0002)  # the server's processor time is counted when it goes to sleep
            used, sent = _processor_seconds(server), time.perf_counter()
            evicted = link.publish(operations.evict(Bounds(0, None, None), batch))
            waited.append(time.perf_counter() - sent)
            time.sleep(0.0002)
            on_cpu.append(_processor_seconds(server) - used)
            taken += evicted.chunks
    assert taken >= total
    return _Emptied(taken, _script_seconds(cache.url, "evalsha") - before, waited, in_server, on_cpu)


def _process_id(url: str) -> int:
    with contextlib.closing(redis.Redis.from_url(url)) as plain:
        info: Any = plain.info("server")
    return info["process_id"]


def _processor_seconds(process_id: int) -> float:
    """How long the main thread of a process ran; 0 where the system does not tell."""
    try:
        return int(Path(f"/proc/{process_id}/schedstat").read_text(encoding="ascii").split()[0]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


@contextlib.contextmanager
def _slow_calls(url: str) -> Generator[list[float], None, None]:
    """A list that gets, at the end, how long script calls took by the server's slow log.

    Those of less than a millisecond are not logged: the commands that a script calls would be too, and slow it down.
    """
    took: list[float] = []
    with contextlib.closing(redis.Redis.from_url(url)) as plain:
        plain.slowlog_reset()
        plain.config_set("slowlog-max-len", 100_000)
        plain.config_set("slowlog-log-slower-than", 1000)
        try:
            yield took
        finally:
            plain.config_set("slowlog-log-slower-than", -1)
            entries: Any = plain.slowlog_get(100_000)
            took += [entry["duration"] / 1e6 for entry in entries if entry["command"].startswith(b"EVALSHA")]


def _longest(what: str, rounds: list[list[float]]) -> Figure:
    """The longest call of all rounds; a process that is put aside meanwhile shows here."""
    longest, usual = max(map(max, rounds)), statistics.median(took for one in rounds for took in one)
    return Figure(what, _ms(longest), f"{_ms(usual)} usually", longest * 1000, "<=", 10, " ms")


# Look-ups beside others


class _Shared:
    """What the processes of a part tell each other."""

    def __init__(self) -> None:
        self.stop: Any = _spawn.Event()
        self.ready: Any = _spawn.Semaphore(0)
        self.evicting: Any = _spawn.Value("b", 0)
        self.done: Any = _spawn.Value("q", 0)
        """Chunks evicted, or prompts rewritten."""
        self.busy_s: Any = _spawn.Value("d", 0)


@contextlib.contextmanager
def _running(shared: _Shared, *targets: tuple[Any, ...]) -> Generator[None, None, None]:
    """Run a function of this module in a process of its own, for each target, until the block is left."""
    processes = [_spawn.Process(target=run, args=(shared, *args), daemon=True) for run, *args in targets]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            if not shared.ready.acquire(timeout=60):
                raise TimeoutError("a process of the benchmark did not start within 60 s")
        yield
    finally:
        shared.stop.set()
        for process in processes:
            process.join(timeout=30)


def _beside(cache: PrefixCacheOptimizer, chain: Chain, batch: int, scale: float) -> list[Figure]:
    """Look-ups of a chain: nothing else goes on, others publish, and others evict so many leaves a call as well."""
    quiet, _ = _sample(cache, chain, 5 * scale, _Shared())
    shared = _Shared()
    with _running(shared, (_publish_always, cache.url), (_evict_always, cache.url, batch)):
        alone, busy = _sample(cache, chain, max(8.0, 30 * scale), shared)
    quiet += _sample(cache, chain, 5 * scale, _Shared())[0]
    what, figures = "L2 look-up of 512 chunks, others publish", list[Figure]()
    for others, times in (("", alone), (f" and evict {batch} leaves a call", busy)):
        for name, share in (("p50", 0.5), ("p99", 0.99)):
            value, idle = _percentile(times, share), _percentile(quiet, share)
            row = f"{what}{others}, {name} of {len(times):,}, against idle"
            figures.append(untargeted(row, _ms(value), _ms(idle), value / idle, "x"))
    rate = shared.done.value / shared.busy_s.value
    return [*figures, untargeted(f"chunks evicted meanwhile, {batch} leaves a call", _rate(rate), "-", rate, "/s")]


def _publish_always(shared: _Shared, url: str) -> None:
    """Publish new prompts of 4,096 chunks, one after the other."""
    with _open(url, "lookup-publisher") as cache:
        shared.ready.release()
        while not shared.stop.is_set():
            _fill(cache, 4096, 4096)


def _evict_always(shared: _Shared, url: str, batch: int) -> None:
    """Whenever `_BACKLOG` chunks have come together, evict nearly all of them without a pause."""
    bounds = Bounds(_BACKLOG // 10, None, None)
    with _open(url, "lookup-evictor") as cache, contextlib.closing(redis.Redis.from_url(url)) as plain:
        link = cache._state.link
        shared.ready.release()
        while not shared.stop.is_set():
            stored: Any = plain.hget(link.keys.meta, "chunks")
            if int(stored) < _BACKLOG:
                time.sleep(0.01)
                continue
            shared.evicting.value, began, more = 1, time.perf_counter(), True
            while more and not shared.stop.is_set():
                evicted = link.publish(operations.evict(bounds, batch))
                shared.done.value, more = shared.done.value + evicted.chunks, evicted.more
            shared.evicting.value = 0
            shared.busy_s.value += time.perf_counter() - began


def _sample(
    cache: PrefixCacheOptimizer, chain: Chain, seconds: float, shared: _Shared
) -> tuple[list[float], list[float]]:
    """Seconds that look-ups at random moments took: while nothing was evicted, and while something was.

    They do not follow each other at once: then each would come just when the server has done another's call.
    """
    took: dict[int, list[float]] = {0: [], 1: []}
    state, until = cache._state, time.perf_counter() + seconds
    while time.perf_counter() < until:
        time.sleep(_random.uniform(0, 0.002))
        with state.lock:
            state.l1.clear()
        evicting, began = shared.evicting.value, time.perf_counter()
        result = cache.find_longest_cache_hit(chain)
        ended = time.perf_counter()
        assert result.matched_chunks == len(chain)
        if shared.evicting.value == evicting:
            took[evicting].append(ended - began)
    return took[0], took[1]


# Pre-warm


def _prewarming(url: str, prompts: int, chunks: int, rounds: int) -> Figure:
    """So many hot prompts of so many chunks, each with nodes of its own, brought into an empty L1."""
    namespace = f"prewarm{chunks}"
    with _open(url, f"{namespace}-writer") as writer:
        heads = [_last_head(chain) for chain in _fill(writer, chunks, prompts * chunks)]
        touches = [(head, 5, int(time.time() * 1000)) for head in heads]
        writer._state.link.publish(operations.touch(touches, 3))
    nodes, took = 0, list[float]()
    with _open(url, f"{namespace}-reader") as cache:
        before = _script_seconds(url, "evalsha_ro")
        for _ in range(rounds):
            cache._state.l1.clear()
            began = time.perf_counter()
            came = cache.prewarm(time_s=60, max_bytes=1 << 40)
            took.append(time.perf_counter() - began)
            assert (came.chunks, came.complete) == (prompts * chunks, True)
            nodes = came.nodes
        within = (_script_seconds(url, "evalsha_ro") - before) / rounds
    value = statistics.median(took)
    what = f"pre-warming 10,000 chunks: {prompts:,} prompts of {chunks:,}, {nodes:,} nodes"
    return Figure(what, _ms(value), f"{_ms(within)} in the server", value * 1000, "<=", 200, " ms")


def _script_seconds(url: str, command: str) -> float:
    """Seconds that the server has spent in scripts called by EVALSHA, or by EVALSHA_RO."""
    with contextlib.closing(redis.Redis.from_url(url)) as plain:
        stats: Any = plain.info("commandstats")
    return stats.get(f"cmdstat_{command}", {"usec": 0})["usec"] / 1e6


def _restarted(url: str, trace: str, before: Sequence[Request], after: Sequence[Request]) -> list[Figure]:
    """A trace up to a restart, then look-ups from a fresh process: pre-warmed, and not."""
    with _open(url, "trace-running", touch_interval_s=0.2, l1_ttl_s=600, feed_interval_s=0.1) as cache:
        for request in before:
            prompt = _prompt(request)
            cache.find_longest_cache_hit(prompt)
            cache.cache_prefix(prompt)
        cache.flush()
        asked = [_prompt(request) for request in after]
        warm, cold = (_begin(url, asked, prewarmed=prewarmed) for prewarmed in (True, False))
    where = f"first {len(asked)} look-ups after a restart, {trace}, {len(before):,} requests before"
    return [
        untargeted(
            f"hit chunks that L1 answered, {where}",
            f"{100 * warm.share:.1f}%",
            f"{100 * cold.share:.1f}% cold",
            100 * warm.share,
            "%",
        ),
        untargeted(
            f"Redis calls, {where}", f"{warm.calls:,}", f"{cold.calls:,} cold", warm.calls / max(1, cold.calls), "x"
        ),
        untargeted(f"pre-warming, {trace}", _ms(warm.seconds), f"{warm.chunks:,} chunks", warm.seconds * 1000, " ms"),
    ]


def _prompt(request: Request) -> Chain:
    ids = (i for first, count in request.runs for i in range(first, first + count))
    return Chain.packed(b"".join(xxhash.xxh3_128_digest(i.to_bytes(8, "little")) for i in ids))


class _Began(NamedTuple):
    """How a fresh process did."""

    share: float
    calls: int
    chunks: int
    seconds: float


def _begin(url: str, prompts: list[Any], *, prewarmed: bool) -> _Began:
    """Look prompts up in a process that has just begun. Nothing is published, so that the next one finds the same."""
    chunks, seconds = 0, 0.0
    with _open(url, "trace-begun", l1_ttl_s=600, feed_interval_s=0.1) as cache:
        if prewarmed:
            came = cache.prewarm()
            chunks, seconds = came.chunks, came.seconds
        assert cache.catch_up()
        results = [cache.find_longest_cache_hit(prompt) for prompt in prompts]
        cache._state.outbox.touches.take()
    hit, l1 = sum(one.matched_chunks for one in results), sum(one.l1_chunks for one in results)
    return _Began(l1 / max(1, hit), sum(one.redis_calls for one in results), chunks, seconds)


# Staleness


def _rewrite(shared: _Shared, url: str, namespace: str) -> None:
    """Publish prompts picked at random, take half of one back in turn, and evict what is over nine tenths of them."""
    budget = _PREFIX + (_LENGTH - _PREFIX) * _PROMPTS * 9 // 10
    with _open(url, f"{namespace}-writer", l1_ttl_s=1.0, feed_interval_s=0.1, l2_max_chunks=budget) as cache:
        prompts = _many()
        for i, prompt in enumerate(prompts):
            cache.cache_prefix(prompt, _blocks(i))
        shared.ready.release()
        while not shared.stop.is_set():
            i = _random.randrange(_PROMPTS)
            cache.cache_prefix(prompts[i], _blocks(i))
            j = _random.randrange(_PROMPTS)
            cache.remove_skipped_blocks(_blocks(j)[_LENGTH // 2 :])
            shared.done.value += 2


def _read_always(cache: PrefixCacheOptimizer, seconds: float, shared: _Shared, *, at_once: bool) -> str:
    """Look prompts up, some much more often than others, and check what L1 said. Returns what went on meanwhile."""
    prompts, state, asked, answered = _many(), cache._state, 0, 0
    weights = [1 / (1 + i) for i in range(_PROMPTS)]
    picked = iter(_random.choices(prompts, weights, k=1_000_000))
    written, began = shared.done.value, time.perf_counter()
    while (passed := time.perf_counter() - began) < seconds:
        prompt = next(picked)
        result = cache.find_longest_cache_hit(prompt)
        asked, answered = asked + 1, answered + (not result.redis_calls)
        if at_once and not result.redis_calls:
            samples = deque([(prompt.data, dict(result.holders))])  # of its own: the background empties the cache's
            told: Any = SimpleNamespace(samples=samples, link=state.link, lock=state.lock, counts=state.counts)
            check_samples(told)
    rate = (shared.done.value - written) / passed
    return f"{100 * answered / asked:.0f}% of {asked / passed:,.0f} look-ups/s, {rate:,.0f} writes/s"


def _many() -> list[Chain]:
    """The prompts that both processes of the part `staleness` know."""
    same = random.Random(11)
    prefix = same.randbytes(_PREFIX * HASH_BYTES)
    return [Chain.packed(prefix + same.randbytes((_LENGTH - _PREFIX) * HASH_BYTES)) for _ in range(_PROMPTS)]


def _blocks(i: int) -> list[int]:
    """Block ids of prompt `i`: the shared prefix lies in the same blocks for all."""
    own = _LENGTH - _PREFIX
    return [*range(_PREFIX), *range(_PREFIX + i * own, _PREFIX + (i + 1) * own)]


# Common


def _open(url: str, name: str, **settings: Any) -> PrefixCacheOptimizer:
    """A cache without limits or background work, but for `settings`; `name` is the namespace, or NAMESPACE-WORKER."""
    return PrefixCacheOptimizer(
        PrefixCacheConfig.from_mapping(
            {
                "url": url,
                "namespace": name.partition("-")[0],
                "worker_id": name,
                "chunk_size": _CHUNK,
                "max_run": _RUN,
                "max_cached_sequences": 10**9,
                "lookup_timeout_s": 10,
                "publish_timeout_s": 10,
                "touch_interval_s": 0,
                "feed_interval_s": 0,
                "staleness_sample": 0,
                "l1_ttl_s": 1e6,
                "strict": True,
                **settings,
            }
        )
    )


def _fill(cache: PrefixCacheOptimizer, chunks: int, total: int) -> list[Chain]:
    """Publish new prompts of so many chunks until there are `total`; past L1, so that the server sets the pace."""
    link, config, chains = cache._state.link, cache.config, list[Chain]()
    for _ in range(-(-total // chunks)):
        packed = _random.randbytes(chunks * HASH_BYTES)
        publish = operations.publish(packed, 0, config.holder, link.epoch, max_run=config.max_run)
        link.publish(publish)
        chains.append(Chain.packed(packed))
    return chains


def _chain(chunks: int) -> Chain:
    return Chain.packed(_random.randbytes(chunks * HASH_BYTES))


def _last_head(chain: Chain) -> bytes:
    """The head of the last node of a chain that shares nothing with others."""
    return chain[(len(chain) - 1) // _RUN * _RUN]


def _percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.2f} ms"


def _rate(value: float) -> str:
    return f"{value:,.0f}/s"


if __name__ == "__main__":
    main()
