"""What a change costs: look-ups, publishes, loads and stores of two checkouts, turn by turn in one run.

    python benchmarks/two_checkouts.py --baseline ../before

Each checkout has a process and a private server of its own, and uses public names alone. Cases take turns between the
two, so that what disturbs one disturbs the other. Prints the median of each in microseconds, their ratio, and the
commands that the server ran for one call. Below 1.03 is within what a change may cost.

`--trace FILE` also replays a trace on both with a third of the room that it needs, and payloads: hit rates beside each
other.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_CHUNKS = (1, 64, 512)
_CHUNK_TOKENS = 16
_PAYLOAD_BYTES = 16 * 1024
_ROUNDS = 60
_HERE = Path(__file__).resolve()


# In a checkout's process


class _Worker:
    """The cases of one checkout."""

    def __init__(self) -> None:
        from array import array  # noqa: PLC0415 - what only this process needs
        from dataclasses import replace  # noqa: PLC0415

        import redis  # noqa: PLC0415

        from distprefix import PrefixCacheConfig, PrefixCacheOptimizer  # noqa: PLC0415

        config = PrefixCacheConfig(
            worker_id="writer",
            namespace="bench",
            max_prefix_length=1 << 30,
            max_cached_sequences=1_000_000,
            lookup_timeout_s=5.0,
            publish_timeout_s=5.0,
            staleness_sample=0.0,
        )
        self._cache = PrefixCacheOptimizer(config)
        other = replace(config, url=self._cache.url, worker_id="reader", l1_ttl_s=0.0, l1_max_bytes=0)
        self._reader = PrefixCacheOptimizer(other)
        self._server: Any = redis.Redis.from_url(self._cache.url, protocol=2)
        self._array = array
        self._fresh = 0
        self._into = [bytearray(_PAYLOAD_BYTES) for _ in range(max(_CHUNKS))]
        self._payloads = [bytes(_PAYLOAD_BYTES)] * max(_CHUNKS)
        self._known = {chunks: self._prompt(chunks) for chunks in _CHUNKS}
        for chunks, prompt in self._known.items():
            self._cache.cache_prefix(prompt)
            if self._cache.store(prompt, self._payloads[:chunks]) != chunks:
                raise RuntimeError("the server did not take the payloads")
            self._reader.load(prompt)

    def cases(self) -> dict[str, Callable[[], Callable[[], Any]]]:
        """What makes each case ready, and gives what is to be timed."""
        found: dict[str, Callable[[], Callable[[], Any]]] = {}
        for chunks in _CHUNKS:
            found[f"look-up in L1, {chunks}"] = self._look_up(self._cache, chunks)
            found[f"look-up in Redis, {chunks}"] = self._look_up(self._reader, chunks)
            found[f"find stored, {chunks}"] = self._find(chunks)
            found[f"load, {chunks}"] = self._load(chunks)
            found[f"publish, {chunks}"] = self._publish(chunks)
            found[f"store, {chunks}"] = self._store(chunks)
        return found

    def commands(self) -> int:
        """Commands that came to the server so far, of connections' housekeeping aside."""
        stats = self._server.info("commandstats")
        aside = {"cmdstat_info", "cmdstat_ping", "cmdstat_role", "cmdstat_hello", "cmdstat_client|setinfo"}
        names = ("cmdstat_evalsha", "cmdstat_evalsha_ro", "cmdstat_script|load")
        plain = sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("unlink",))
        return plain + sum(stats.get(name, {}).get("calls", 0) for name in names if name not in aside)

    def flush(self) -> None:
        """Send what waits between turns, as the background would."""
        self._cache.flush()
        self._reader.flush()

    def _prompt(self, chunks: int) -> Any:
        self._fresh += 1
        return self._array("I", [(self._fresh * 7919 + at * 31) % 100_000 for at in range(chunks * _CHUNK_TOKENS)])

    def _look_up(self, cache: Any, chunks: int) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: cache.find_longest_cache_hit(self._known[chunks])

    def _find(self, chunks: int) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: self._reader.find_stored(self._known[chunks])

    def _load(self, chunks: int) -> Callable[[], Callable[[], Any]]:
        return lambda: lambda: self._reader.load(self._known[chunks], self._into[:chunks])

    def _publish(self, chunks: int) -> Callable[[], Callable[[], Any]]:
        def prepare() -> Callable[[], Any]:
            prompt = self._prompt(chunks)
            return lambda: self._cache.cache_prefix(prompt)

        return prepare

    def _store(self, chunks: int) -> Callable[[], Callable[[], Any]]:
        def prepare() -> Callable[[], Any]:
            prompt = self._prompt(chunks)
            return lambda: self._cache.store(prompt, self._payloads[:chunks])

        return prepare


def _serve() -> None:
    """Run turns as the parent asks for them: a line with a case and a number of runs, a line with what they took."""
    worker = _Worker()
    cases = worker.cases()
    print(json.dumps(list(cases)), flush=True)
    for line in sys.stdin:
        name, runs = json.loads(line)
        before = worker.commands()
        taken: list[float] = []
        for _ in range(runs):
            run = cases[name]()
            began = time.perf_counter_ns()
            run()
            taken.append((time.perf_counter_ns() - began) / 1000)
        commands = (worker.commands() - before) / runs
        worker.flush()
        print(json.dumps([taken, commands]), flush=True)


# In the parent


class _Checkout:
    """The process of one checkout."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._environment = {**os.environ, "PYTHONPATH": str(folder)}
        self._process = subprocess.Popen(
            [sys.executable, str(_HERE), "--serve"],
            cwd=folder,
            env=self._environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.cases: list[str] = self._read()

    def turn(self, case: str, runs: int) -> tuple[list[float], float]:
        """Microseconds of each run, and commands for one."""
        if self._process.stdin is None:
            raise RuntimeError("the process has no input")
        self._process.stdin.write(json.dumps([case, runs]) + "\n")
        self._process.stdin.flush()
        taken, commands = self._read()
        return taken, commands

    def replay(self, trace: str, block_size: int, limit: int) -> dict[str, Any]:
        """Replay a trace with payloads and a third of the room."""
        options = ["--block-size", str(block_size), "--in-order", "--nodes", "4", "--capacity", "33%", "--json"]
        options += ["--payload-bytes", "256", "--limit", str(limit)]
        program = "from distprefix.cli import main; main()"
        command = [sys.executable, "-c", program, "replay", trace, *options]
        done = subprocess.run(
            command, cwd=self.folder, env=self._environment, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    def end(self) -> None:
        """Let the process end, with its server."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        self._process.wait(30)

    def _read(self) -> Any:
        if self._process.stdout is None:
            raise RuntimeError("the process has no output")
        return json.loads(self._process.stdout.readline())


def _measure(now: _Checkout, before: _Checkout, rounds: int, only: str) -> Iterator[dict[str, Any]]:
    for case in (each for each in now.cases if only in each):
        runs = 20 if "L1" in case else 5 if ", 512" not in case else 2
        taken: dict[str, list[float]] = {"now": [], "before": []}
        commands = {"now": 0.0, "before": 0.0}
        for turn in range(rounds + 2):
            order = [("now", now), ("before", before)]
            for name, checkout in order if turn % 2 else reversed(order):
                times, sent = checkout.turn(case, runs)
                if turn >= 2:
                    taken[name] += times
                    commands[name] = sent
        medians = {name: statistics.median(times) for name, times in taken.items()}
        yield {
            "case": case,
            "now_us": round(medians["now"], 1),
            "before_us": round(medians["before"], 1),
            "ratio": round(medians["now"] / medians["before"], 3),
            "commands_now": round(commands["now"], 2),
            "commands_before": round(commands["before"], 2),
        }


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", type=Path, help="the other checkout")
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--trace", help="a trace to replay on both")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--only", default="", help="cases whose names have this in them")
    parser.add_argument("--limit", type=int, default=2000, help="requests of the trace")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        _serve()
        return
    if options.baseline is None:
        parser.error("name the other checkout with --baseline")
    now = _Checkout(_HERE.parents[1])
    before = _Checkout(options.baseline.resolve())
    try:
        rows = list(_measure(now, before, options.rounds, options.only))
        replays = {}
        if options.trace:
            trace = str(Path(options.trace).resolve())
            pair = {"now": now, "before": before}
            replays = {name: each.replay(trace, options.block_size, options.limit) for name, each in pair.items()}
    finally:
        now.end()
        before.end()
    if options.json:
        print(json.dumps({"cases": rows, "replay": replays}, indent=2))
        return
    print("| case, chunks | now, us | before, us | ratio | commands now | before |")
    print("| --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    for name, replay in replays.items():
        print(f"replay {name}: hit rate {replay['hit_rate']}, evicted {replay.get('evicted_chunks')} chunks")


if __name__ == "__main__":
    main()
