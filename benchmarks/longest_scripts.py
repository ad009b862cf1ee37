"""How long one script call keeps the server from others, on the worst trees: a row for each script and tree.

    python benchmarks/longest_scripts.py                     # a Markdown table; a few minutes
    python benchmarks/longest_scripts.py --quick             # small trees: to see that it runs
    python benchmarks/longest_scripts.py --full              # with 200,000 prompts under one root
    python benchmarks/longest_scripts.py --only holders      # trees whose names have this in them
    python benchmarks/longest_scripts.py --worst             # of each script the tree with its longest call
    python benchmarks/longest_scripts.py --checkout ../before

Starts a server of its own for each tree. Times are the server's, from SLOWLOG: what other clients wait for. Parts of
payloads are 512 bytes here in place of 8 MiB, in the scripts as in the package, so that payloads of 64 parts fit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

_ROOT = Path(__file__).resolve().parents[1]
_MOST_ENTRIES = 200_000
_PART_BYTES = 512


class Row(NamedTuple):
    """One script on one tree."""

    script: str
    tree: str
    longest_ms: float
    median_ms: float
    calls: int
    total_ms: float
    longest_in: str
    """What the call was part of."""


def chunk(*name: Any) -> bytes:
    """A chunk hash that no other name has."""
    return hashlib.md5(repr(name).encode(), usedforsecurity=False).digest()


def chain(name: str, chunks: int) -> bytes:
    """A chain of so many chunks."""
    return b"".join(chunk(name, i) for i in range(chunks))


class Bench:
    """A server, caches on it, and what its slow log says of each step."""

    def __init__(self, tree: str, binary: str) -> None:
        from distprefix.redis.scripts import SCRIPTS, load_script  # noqa: PLC0415 - of the checkout that is measured
        from tests.servers import Server  # noqa: PLC0415

        self.tree = tree
        self.names = {load_script(name).sha: name for name in SCRIPTS}
        self._server = Server(binary).start()
        self.client = self._server.client()
        self.client.config_set("slowlog-log-slower-than", -1)
        self.client.config_set("slowlog-max-len", _MOST_ENTRIES)
        self._caches: list[Any] = []
        self._times: dict[str, list[tuple[float, str]]] = {}

    def open(self, worker: str, **settings: Any) -> Any:
        """A worker's cache, with time for everything and nothing in the background."""
        from distprefix import PrefixCacheConfig, PrefixCacheOptimizer  # noqa: PLC0415

        config = PrefixCacheConfig(
            **{
                **dict[str, Any](url=self._server.url, namespace="n", worker_id=worker, chunk_size=4),
                **dict[str, Any](max_prefix_length=1 << 22, max_cached_sequences=10**8, max_own_chunks=10**7),
                **dict[str, Any](lookup_timeout_s=60.0, publish_timeout_s=60.0, payload_timeout_s=120.0),
                **dict[str, Any](staleness_sample=0.0, l1_max_bytes=1 << 28, touch_interval_s=0, feed_interval_s=0),
                **settings,
            }
        )
        cache = PrefixCacheOptimizer(config)
        self._caches.append(cache)
        return cache

    def publish(self, cache: Any, packed: bytes, holder: str = "", epoch: int = 0) -> None:
        """Publish as another process would: this one's L1 learns nothing of it."""
        from distprefix import operations  # noqa: PLC0415

        link = cache._state.link
        name = holder or cache.config.holder
        number = epoch or link.epoch
        link.publish(operations.publish(packed, 0, name, number, max_run=cache.config.max_run))

    @contextmanager
    def step(self, name: str) -> Generator[None]:
        """What is done here is measured."""
        self.client.slowlog_reset()
        self.client.config_set("slowlog-log-slower-than", 0)
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the rest is worth knowing all the same
            print(f"{self.tree}, {name}: {type(error).__name__}: {str(error)[:100]}", file=sys.stderr)
        finally:
            self.client.config_set("slowlog-log-slower-than", -1)
        for entry in self.client.slowlog_get(_MOST_ENTRIES):
            words = entry["command"].split(b" ")
            script = self.names.get(words[1].decode(errors="replace")) if len(words) > 1 else None
            if script is not None and words[0].lower().startswith(b"evalsha"):
                self._times.setdefault(script, []).append((entry["duration"] / 1000, name))

    def rows(self) -> Iterator[Row]:
        """What was measured."""
        for script, times in sorted(self._times.items()):
            longest, step = max(times)
            taken = [milliseconds for milliseconds, _ in times]
            median = round(statistics.median(taken), 2)
            yield Row(script, self.tree, round(longest, 2), median, len(times), round(sum(taken), 1), step)

    def close(self) -> None:
        """End the caches and the server."""
        for cache in self._caches:
            cache.close()
        self.client.close()
        self._server.stop()


def _children(bench: Bench, count: int) -> None:
    """Very many children of one node."""
    from distprefix import Chain  # noqa: PLC0415

    worker, other = bench.open("w"), bench.open("z", prewarm_threshold=1)
    root = chain("system", 16)
    for i in range(count):
        bench.publish(worker, root + chunk("child", i) + chunk("tail", i))
    prompt = Chain.packed(root + chunk("child", 5) + chunk("tail", 5))
    with bench.step("look-up"):
        other.find_longest_cache_hit(prompt)
    with bench.step("publish of a child"):
        bench.publish(worker, root + chunk("one more"))
    with bench.step("publish of the shared beginning"):
        other.cache_prefix(Chain.packed(root), range(16))
    with bench.step("touch"):
        other.flush()
    with bench.step("pre-warm"):
        other.prewarm()
    with bench.step("candidates"):
        other.get_prewarm_candidates(1000)
    with bench.step("lease"):
        other.find_longest_cache_hit(prompt).lease(5).release()
    with bench.step("split of the node"):
        bench.publish(other, root[:128] + chunk("branch"))
    with bench.step("take back, without the children"):
        other.remove_skipped_blocks([15])
    with bench.step("evict 1,000 leaves"):
        bench.open("e", max_cached_sequences=max(1, count - 1000), high_watermark=1.0, low_watermark=1.0).maintain()
    restarted = bench.open("z")
    with bench.step("sweep of one worker"):
        restarted.sweep()
    with bench.step("clear"):
        other.clear()


def _roots(bench: Bench, count: int) -> None:
    """Very many prompts that begin differently."""
    worker = bench.open("w")
    for i in range(count):
        bench.publish(worker, chunk("root", i))
    with bench.step("publish"):
        bench.publish(worker, chunk("one more"))
    with bench.step("evict 1,000 leaves"):
        bench.open("e", max_cached_sequences=max(1, count - 1000), high_watermark=1.0, low_watermark=1.0).maintain()
    with bench.step("clear"):
        worker.clear()


def _deep(bench: Bench, count: int, max_run: int) -> None:
    """One long chain."""
    from distprefix import Chain  # noqa: PLC0415

    settings: dict[str, Any] = {"max_run": max_run, "prewarm_threshold": 1, "cold_timeout_s": 0.001}
    worker, reader = bench.open("w", **settings), bench.open("r", **settings)
    packed = chain("deep", count)
    prompt, stored = Chain.packed(packed), min(count, 8192)
    with bench.step("publish"):
        worker.cache_prefix(prompt, range(count))
    with bench.step("publish by another worker"):
        bench.publish(reader, packed)
    with bench.step("look-up"):
        reader.find_longest_cache_hit(prompt)
    with bench.step("lease"):
        reader.find_longest_cache_hit(prompt).lease(60).release()
    with bench.step("pin and unpin"):
        fresh = bench.open("f", **settings)
        fresh.pin(prompt)
        fresh.unpin(prompt)
    with bench.step("touch"):
        reader.flush()
    if count <= 20_000:  # with more, chains of all depths do not fit into memory
        with bench.step("pre-warm"):
            bench.open("p", **settings).prewarm(time_s=60.0)
    with bench.step("store"):
        worker.store(Chain.packed(packed[: 16 * stored]), [b"x" * 8] * stored)
    with bench.step("find stored"):
        reader.find_stored(prompt)
    with bench.step("guess"):
        from distprefix import operations  # noqa: PLC0415

        reader._state.link.publish(operations.guess(packed[:16], 4096))
    with bench.step("demote"):
        worker.demote()
    with bench.step("ingest"):
        _ingest(bench, max_run, packed[: 16 * min(count, 20_000)])
    with bench.step("evict the last 1,000 chunks"):
        settings |= {"l2_max_chunks": max(1, count - 1000), "high_watermark": 1.0, "low_watermark": 1.0}
        bench.open("e", **settings).maintain()
    with bench.step("take back from chunk 5 on"):
        worker.remove_skipped_blocks([5])
    with bench.step("clear"):
        worker.clear()


def _ingest(bench: Bench, max_run: int, packed: bytes) -> None:
    """An engine tells all of a chain at once."""
    from distprefix.events.changes import Change  # noqa: PLC0415
    from distprefix.redis.journal import RedisJournal  # noqa: PLC0415
    from distprefix.redis.roster import WorkerInfo  # noqa: PLC0415

    link = bench.open("i", max_run=max_run)._state.link
    journal = RedisJournal(link.admin, link.keys, "engine/0", "bench", WorkerInfo(), lease_s=0, max_run=max_run)
    journal.lead()
    epoch, pos = journal.renew(), 0
    while True:
        part = packed[16 * pos : 16 * (pos + 4096)]
        keys = array("Q", range(1, len(part) // 16 + 1)).tobytes()
        (outcome,) = journal.commit(epoch, [Change("gpu", True, pos, part, keys, ())], None, b"")
        if 16 * (pos + (getattr(outcome, "chunks", 0) or len(part) // 16)) >= len(packed):
            return
        pos += outcome.heads[-1]


def _holders(bench: Bench, count: int) -> None:
    """Very many holders of one node."""
    from distprefix import Chain  # noqa: PLC0415

    worker, reader = bench.open("w"), bench.open("r")
    packed = chain("shared", 16)
    prompt = Chain.packed(packed)
    with bench.step("publishes of all"):
        for i in range(count):
            bench.publish(worker, packed, f"h{i}/0@gpu", 1)
    with bench.step("look-up"):
        reader.find_longest_cache_hit(prompt)
    with bench.step("lease"):
        for _ in range(3):
            reader.find_longest_cache_hit(prompt).lease(60)
    with bench.step("split of the node"):
        bench.publish(worker, packed[:128] + chunk("branch"))
    with bench.step("look-up of two nodes"):
        bench.open("q").find_longest_cache_hit(prompt)
    with bench.step("take back"):
        worker.cache_prefix(prompt, range(16))
        worker.remove_skipped_blocks([3])
    with bench.step("evict"):
        bench.open("e", l2_max_chunks=1, high_watermark=1.0, low_watermark=1.0).maintain()
    with bench.step("clear"):
        worker.clear()


def _members(bench: Bench, count: int) -> None:
    """Very many workers that are gone."""
    from distprefix.redis.roster import register  # noqa: PLC0415
    from distprefix.redis.workers import describe_workers  # noqa: PLC0415

    link = bench.open("w")._state.link
    for i in range(count):
        register(link.admin, link.keys, f"dead{i}/0", 0, 0, None, time.monotonic() + 60)
    with bench.step("open"):
        cache = bench.open("r")
    with bench.step("refresh"):
        cache._state.link.refresh()
    register(link.admin, link.keys, "new/0", 0, 0, None, time.monotonic() + 60)
    with bench.step("refresh after a change"):
        cache._state.link.refresh()
    with bench.step("workers"):
        describe_workers(link.admin, link.keys, time.monotonic() + 60)


def _leased(bench: Bench, count: int) -> None:
    """Leased leaves first in the order of eviction."""
    from distprefix import Chain  # noqa: PLC0415

    worker = bench.open("w")
    for i in range(count):
        prompt = Chain.packed(chain(f"leased{i}", 4))
        worker.cache_prefix(prompt)
        worker.find_longest_cache_hit(prompt).lease(3600)
    seconds, _ = bench.client.time()
    leaves: Any = {}
    for i in range(count):
        packed = chain(f"free{i}", 4)
        bench.publish(worker, packed)
        leaves[packed[:16].hex()] = 1000 * (seconds + 7200) + i
    bench.client.zadd(worker._state.link.keys.leaves, leaves)
    with bench.step("evict half of the free ones"):
        keep = 4 * count + 2 * count
        bench.open("e", l2_max_chunks=keep, high_watermark=1.0, low_watermark=1.0).maintain()


def _parts(bench: Bench, count: int) -> None:
    """Payloads of 64 parts."""
    from distprefix import Chain  # noqa: PLC0415

    with _short_parts(bench):
        worker = bench.open("w", cold_timeout_s=0.001)
        prompt = Chain.packed(chain("long", count))
        with bench.step("store"):
            worker.store(prompt, [bytes(64 * _PART_BYTES - 100)] * count)
        with bench.step("find stored"):
            worker.find_stored(prompt)
        with bench.step("demote"):
            worker.demote()
        with bench.step("promote"):
            worker.promote(prompt)
        with bench.step("evict"):
            bench.open("e", l2_max_chunks=1, high_watermark=1.0, low_watermark=1.0).maintain()


@contextmanager
def _short_parts(bench: Bench) -> Generator[None]:
    """Parts of 512 bytes, in the scripts and in the package."""
    from distprefix.redis import client, scripts  # noqa: PLC0415
    from distprefix.tiers import store  # noqa: PLC0415

    whole = store.PART_BYTES
    load_script = scripts.load_script

    def load_short(name: str, *, with_flags: bool = True) -> Any:
        script = load_script(name, with_flags=with_flags)
        body = script.body.replace(str(whole), str(_PART_BYTES))
        sha = hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest()
        bench.names[sha] = name
        return script._replace(body=body, sha=sha)

    client.load_script = load_short  # pyright: ignore[reportPrivateImportUsage]
    store.PART_BYTES = _PART_BYTES
    try:
        yield
    finally:
        client.load_script = load_script  # pyright: ignore[reportPrivateImportUsage]
        store.PART_BYTES = whole


Build = Callable[[Bench], None]


def trees(scale: float, *, full: bool) -> dict[str, Build]:
    """The trees by name, and what is done with each."""

    def count(number: int) -> int:
        return max(4, int(number * scale))

    found: dict[str, Build] = {
        f"{count(60_000):,} children of one node": lambda bench: _children(bench, count(60_000)),
        f"{count(50_000):,} roots": lambda bench: _roots(bench, count(50_000)),
        f"{count(20_000):,} nodes of one chunk in a row": lambda bench: _deep(bench, count(20_000), 1),
        f"a chain of {count(100_000):,} chunks": lambda bench: _deep(bench, count(100_000), 256),
        f"{count(5_000):,} holders of one node": lambda bench: _holders(bench, count(5_000)),
        f"{count(30_000):,} dead members": lambda bench: _members(bench, count(30_000)),
        f"{count(1_000):,} leased leaves": lambda bench: _leased(bench, count(1_000)),
        f"{count(256):,} payloads of 64 parts": lambda bench: _parts(bench, count(256)),
    }
    if full:
        found[f"{count(200_000):,} prompts under one root"] = lambda bench: _children(bench, count(200_000))
    return found


def measure(scale: float, only: str = "", *, full: bool = False) -> list[Row]:
    """Build the trees and do everything with them."""
    from distprefix.redis.embedded import find_binary  # noqa: PLC0415

    rows: list[Row] = []
    for tree, build in trees(scale, full=full).items():
        if only in tree:
            bench = Bench(tree, find_binary())
            try:
                build(bench)
                rows += bench.rows()
            finally:
                bench.close()
    return rows


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="trees of a hundredth: to see that it runs")
    parser.add_argument("--full", action="store_true", help="with 200,000 prompts under one root")
    parser.add_argument("--only", default="", help="trees whose names have this in them")
    parser.add_argument("--worst", action="store_true", help="of each script only the tree with its longest call")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--checkout", type=Path, default=_ROOT, help="measure the package and scripts of this checkout")
    options = parser.parse_args()
    sys.path.insert(0, str(options.checkout.resolve()))
    rows = measure(0.01 if options.quick else 1.0, options.only, full=options.full)
    if options.worst:
        longest = sorted(rows, key=lambda row: row.longest_ms)
        rows = list({row.script: row for row in longest}.values())
    if options.json:
        print(json.dumps([row._asdict() for row in rows], indent=2))
        return
    print("| script | tree | longest call, ms | median, ms | calls | total, ms | longest in |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in sorted(rows, key=lambda row: (row.script, row.tree)):
        print("| " + " | ".join(str(value) for value in row) + " |")


if __name__ == "__main__":
    main()
