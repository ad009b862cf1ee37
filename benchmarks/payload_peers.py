"""Payloads by LMCache's Redis clients and by ours: python benchmarks/payload_peers.py [--lmcache-python PYTHON].

PYTHON is that of an environment with LMCache: benchmarks/install_lmcache.sh DIR makes one. Needs
``distprefix[embedded]`` and NumPy.

All move the same number of values at once, to new keys, between the same server and memory of their own, in turns.
Ours is `store` and `load`, with the tree and with checksums, from one thread. LMCache's are what it calls connectors,
below its engine: `resp` is C++ with 8 threads and connections and knows no Unix socket; the other one is redis-py's
asyncio client with up to 150 connections and two values a chunk, with hiredis, and without as LMCache installs it.
None of them verifies what it loads.
"""

from __future__ import annotations

import argparse
import contextlib
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import NamedTuple

import redis
from measure import Figure, run_parts, untargeted
from payload_common import bf16_payload, gb_per_s, new_chain, open_cache

_KIB = 1024
_SIZES = {"64 KiB": (64 * _KIB, 128), "2 MiB": (2048 * _KIB, 16), "32 MiB": (32_768 * _KIB, 2)}
"""Length of a value and values in a call."""
_ROUNDS = {"64 KiB": 30, "2 MiB": 20, "32 MiB": 10}
_NAMES = {
    "resp": "LMCache's C++ client",
    "hiredis": "LMCache's redis-py with hiredis",
    "redis-py": "the same without hiredis",
}
_lmcache: str | None = None


def main() -> None:
    """Run what was asked for and print it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--lmcache-python")
    options, sys.argv[1:] = parser.parse_known_args()
    global _lmcache  # noqa: PLW0603 - run_parts knows the parts' arguments
    _lmcache = options.lmcache_python
    if _lmcache is None:
        print("LMCache is skipped: benchmarks/install_lmcache.sh DIR, --lmcache-python DIR/bin/python", file=sys.stderr)
    run_parts({"unix": unix, "tcp": tcp}, __doc__)


def unix(url: str, scale: float) -> list[Figure]:
    """Over the Unix socket."""
    return _measure_all("Unix", url, ("hiredis", "redis-py"), scale)


def tcp(url: str, scale: float) -> list[Figure]:
    """Over TCP, to the same server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with redis.Redis.from_url(url) as plain:
        plain.config_set("port", str(port))
    return _measure_all("TCP", f"redis://127.0.0.1:{port}", tuple(_NAMES), scale)


_Ask = Callable[[str], str]
"""Tells a worker what to do, and returns its answer."""


class _Side(NamedTuple):
    """One client. Each call returns the seconds that moving all values took."""

    store: Callable[[], float]
    load: Callable[[], float]


def _measure_all(where: str, url: str, kinds: tuple[str, ...], scale: float) -> list[Figure]:
    with contextlib.ExitStack() as stack:
        theirs = {kind: stack.enter_context(_worker(_lmcache, kind)) for kind in kinds if _lmcache}
        return [figure for name in _SIZES for figure in _measure(where, url, theirs, name, scale)]


def _measure(where: str, url: str, theirs: dict[str, _Ask], name: str, scale: float) -> Generator[Figure]:
    size, count = _SIZES[name]
    with contextlib.ExitStack() as stack:
        plain = stack.enter_context(redis.Redis.from_url(url))
        sides = {"ours": stack.enter_context(_ours(url, size, count))}
        sides |= {kind: _theirs(ask, url, size, count) for kind, ask in theirs.items()}
        stored: dict[str, list[float]] = {kind: [] for kind in sides}
        loaded: dict[str, list[float]] = {kind: [] for kind in sides}
        for turn in range(1 + max(3, int(_ROUNDS[name] * scale))):
            for kind in random.sample(list(sides), len(sides)):
                took = sides[kind].store(), sides[kind].load()
                if turn:  # the first warms up
                    stored[kind].append(took[0])
                    loaded[kind].append(took[1])
                plain.unlink(*(plain.keys("bench@*") or ["none"]))
    total = size * count
    for what, times in (("load", loaded), ("store", stored)):
        medians = {kind: statistics.median(seconds) for kind, seconds in times.items()}
        ours = gb_per_s(total, medians.pop("ours"))
        if not medians:
            yield untargeted(f"{what}, {name}, {where}", ours, "-", total / statistics.median(times["ours"]) / 1e9, "")
        for kind, seconds in medians.items():
            ratio = seconds / statistics.median(times["ours"])
            row = f"{what}, {name}, {where}, against {_NAMES[kind]}"
            yield untargeted(row, ours, gb_per_s(total, seconds), ratio, "x")


@contextlib.contextmanager
def _ours(url: str, size: int, count: int) -> Generator[_Side]:
    sources = [bf16_payload(size, seed) for seed in range(count)]
    targets = [memoryview(bytearray(size)) for _ in range(count)]
    chain = new_chain(count)
    with open_cache(url, "peers") as cache:

        def store() -> float:
            nonlocal chain
            cache.clear()
            chain = new_chain(count)
            began = time.perf_counter()
            assert cache.store(chain, sources) == count, "not all was stored"
            return time.perf_counter() - began

        def load() -> float:
            began = time.perf_counter()
            assert cache.load(chain, targets).chunks == count, "not all was loaded"
            return time.perf_counter() - began

        store()
        load()
        assert targets == sources, "ours does not load what was stored"
        yield _Side(store, load)
        cache.clear()


def _theirs(ask: _Ask, url: str, size: int, count: int) -> _Side:
    assert ask(f"open {url} {size} {count}") == "ready", "LMCache does not start"
    ask("store")
    assert ask("check") == "True", "LMCache does not load what was stored"
    return _Side(lambda: float(ask("store")), lambda: float(ask("load")))


@contextlib.contextmanager
def _worker(python: str, kind: str) -> Generator[_Ask]:
    """A client of LMCache in a process of its own, which times itself."""
    command = [python, str(Path(__file__).with_name("lmcache_worker.py")), kind]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as worker:
        stdin, stdout = worker.stdin, worker.stdout
        assert stdin is not None
        assert stdout is not None
        told = (line[2:].strip() for line in stdout if line.startswith("> "))

        def ask(what: str) -> str:
            stdin.write(f"{what}\n")
            stdin.flush()
            return next(told, f"it ended: try {' '.join(command)}")

        yield ask
        stdin.close()


if __name__ == "__main__":
    main()
