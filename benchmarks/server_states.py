"""What a worker's calls do while its server goes through bad states: python benchmarks/server_states.py.

Starts its own servers, and needs what the tests need. In each state the worker looks up, publishes, stores and loads,
one call after the other, with its background at work. Every byte that a load gives is compared.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import redis
from server_state_list import STATES, Site, State

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import DistPrefixError

__all__ = ["DEADLINES_S", "Row", "run_state"]

T = TypeVar("T")
DEADLINES_S = {"look-up": 0.25, "publish": 0.5, "load": 1.0, "store": 1.0}
_CHUNK = 16
_CHUNKS = 4
_PAUSE_S = 0.01
_QUIET_LOOKS = 10
_RECOVER_S = 20.0
_WARM_UP = 12
_COLD_A_SECOND = 80
"""Cold prompts: more than are loaded, since what is loaded becomes warm."""
_HEAD = """\
| state | look-ups | publishes | loads | stores | slowest of each, ms | off | trimmed | well again after | wrong |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |"""
_IDLE_S = -60.0
"""An idle time that everything has reached."""


@dataclass(frozen=True, slots=True)
class Row:
    """What was seen in one state. Shares are of the calls made while it lasted, slowest calls of the whole run."""

    state: str
    calls: int
    look_ups: float
    """Share that Redis answered."""
    publishes: float
    """Share that Redis took."""
    loads: float
    """Share that gave all that had been stored."""
    stores: float
    """Share that stored everything."""
    slowest_ms: dict[str, int]
    deadline_ms: dict[str, int]
    recovered_s: float | None
    """From the end of the state until all four kinds of calls were well; None for never."""
    wrong: int
    """Loads with a byte that was never stored."""
    exceptions: list[str]
    trimmed: int
    """Payloads that loads took out of the shared tree."""
    off: list[str]
    """Breakers that were seen open."""
    causes: dict[str, int]
    """Failed calls, by cause."""


class _Worker:
    """One cache at work, and what is seen of it."""

    def __init__(self, site: Site, payload_bytes: int) -> None:
        self._size = payload_bytes
        config = PrefixCacheConfig(
            url=site.url,
            cold_url=site.cold_url,
            worker_id="w",
            worker_lease_s=10,
            l1_ttl_s=0,
            lookup_timeout_s=DEADLINES_S["look-up"],
            publish_timeout_s=DEADLINES_S["publish"],
            payload_timeout_s=DEADLINES_S["load"],
        )
        self.cache = PrefixCacheOptimizer(config)
        self.done: Counter[str] = Counter()
        self.tried: Counter[str] = Counter()
        self.slowest: defaultdict[str, float] = defaultdict(float)
        self.wrong = 0
        self.exceptions: set[str] = set()
        self.off: set[str] = set()
        self._number = 0
        self._stored: list[int] = []
        self._cold: list[int] = []
        self._answered = 0
        self._watch_look_ups()

    def _watch_look_ups(self) -> None:
        """Count the look-ups that Redis answered: L1 answers the others."""
        link: Any = self.cache._state.link
        look_up = link.look_up

        def watched(*args: Any) -> Any:
            answer, calls = look_up(*args)
            self._answered += answer is not None
            return answer, calls

        link.look_up = watched

    def make_cold(self, count: int) -> None:
        """Store prompts and have them moved to the cold server."""
        while len(self._cold) < count:
            number = self._next()
            self._store(number)
            self._cold.append(number)
        while self.cache.demote(_IDLE_S):
            pass
        self._stored.clear()

    def step(self) -> bool:
        """One call of each kind, and a second load. Whether all were well."""
        number = self._next()
        before = self.done.copy()
        self._publish(number)
        self._store(number)
        self._look_up(number)
        for old in (*self._stored[-1:], *([self._cold.pop()] if self._cold else self._stored[-6:-5])):
            self._load(old)
        self.off |= set(self.cache.health().off)
        return all(self.done[kind] > before[kind] for kind in DEADLINES_S)

    def row(self, state: str, base: tuple[Counter[str], Counter[str]], ended: tuple[Counter[str], Counter[str]]) -> Row:
        """What was seen between two moments."""
        done, tried = (after - before for before, after in zip(base, ended, strict=True))
        share = {kind: round(done[kind] / tried[kind], 3) if tried[kind] else 0.0 for kind in DEADLINES_S}
        metrics = self.cache.get_metrics()
        causes = Counter[str](metrics["redis_failures"])
        for pool in ("warm", "cold"):
            causes.update(metrics.get(f"payload_failures_{pool}", {}))
        return Row(
            state=state,
            calls=tried.total(),
            look_ups=share["look-up"],
            publishes=share["publish"],
            loads=share["load"],
            stores=share["store"],
            slowest_ms={kind: round(1000 * self.slowest[kind]) for kind in DEADLINES_S},
            deadline_ms={kind: round(1000 * seconds) for kind, seconds in DEADLINES_S.items()},
            recovered_s=None,
            wrong=self.wrong,
            exceptions=sorted(self.exceptions),
            trimmed=metrics["payloads_trimmed"],
            off=sorted(self.off),
            causes=dict(causes),
        )

    def seen(self) -> tuple[Counter[str], Counter[str]]:
        """Calls that were well, and all, so far."""
        return self.done.copy(), self.tried.copy()

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _payloads(self, number: int) -> list[bytes]:
        return [bytes([(31 * number + 7 * chunk) % 251 + 1]) * self._size for chunk in range(_CHUNKS)]

    def _timed(self, kind: str, call: Callable[[], T]) -> T | None:
        self.tried[kind] += 1
        began = time.perf_counter()
        try:
            return call()
        except Exception as error:  # noqa: BLE001 - there must be none, and the row says so
            self.exceptions.add(f"{kind}: {type(error).__name__}: {str(error)[:100]}")
            return None
        finally:
            self.slowest[kind] = max(self.slowest[kind], time.perf_counter() - began)

    def _publish(self, number: int) -> None:
        dropped = self.cache.get_metrics()["publishes_dropped"]
        self._timed("publish", lambda: self.cache.cache_prefix(_tokens(number)))
        self.done["publish"] += self.cache.get_metrics()["publishes_dropped"] == dropped

    def _store(self, number: int) -> None:
        stored = self._timed("store", lambda: self.cache.store(_tokens(number), self._payloads(number)))
        if stored == _CHUNKS:
            self.done["store"] += 1
            self._stored.append(number)

    def _look_up(self, number: int) -> None:
        before = self._answered
        self._timed("look-up", lambda: self.cache.find_longest_cache_hit(_tokens(number)))
        self.done["look-up"] += self._answered > before

    def _load(self, number: int) -> None:
        loaded = self._timed("load", lambda: self.cache.load(_tokens(number)))
        if loaded is None:
            return
        right = self._payloads(number)[: loaded.chunks]
        self.done["load"] += loaded.chunks == _CHUNKS
        self.wrong += any(bytes(payload) != each for payload, each in zip(loaded.payloads, right, strict=True))


def _tokens(number: int) -> list[int]:
    return [number] * (_CHUNK * _CHUNKS)


def run_state(state: State, seconds: float, server: str = "valkey-9.1") -> Row:
    """Have a worker at work before, in and after a state."""
    site = Site(state, seconds, server)
    try:
        worker = _Worker(site, state.payload_bytes)
        try:
            return _go_through(worker, site, state, seconds)
        finally:
            worker.cache.close()
    finally:
        site.close()


def _go_through(worker: _Worker, site: Site, state: State, seconds: float) -> Row:
    if state.second == "cold":
        worker.make_cold(_WARM_UP + int(_COLD_A_SECOND * (1 + seconds)))
    for _ in range(_WARM_UP):
        worker.step()
    state.begin(site)
    base = worker.seen()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        state.during(site)
        worker.step()
        time.sleep(_PAUSE_S)
    ended = worker.seen()
    state.end(site)
    began = time.monotonic()
    recovered: float | None = 0.0 if state.stays else None
    while recovered is None and time.monotonic() - began < _RECOVER_S:
        if worker.step() and worker.cache.health().ok:
            recovered = round(time.monotonic() - began, 1)
        time.sleep(_PAUSE_S)
    row = worker.row(state.name, base, ended)
    _wait_for_quiet(worker.cache)
    try:
        problems = [*worker.cache.check_integrity().problems]
    except (DistPrefixError, redis.RedisError):  # a server that takes a right from us
        problems = []
    return replace(row, recovered_s=recovered, exceptions=[*row.exceptions, *problems])


def _wait_for_quiet(cache: PrefixCacheOptimizer) -> None:
    """Return when the background publishes nothing again: what is read while others write is no snapshot."""
    deadline = time.monotonic() + _RECOVER_S
    quiet = 0
    while quiet < _QUIET_LOOKS and time.monotonic() < deadline:
        quiet = 0 if cache.get_metrics()["republish_waiting"] else quiet + 1
        time.sleep(_PAUSE_S)


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"


def _print_row(row: Row) -> None:
    slowest = ", ".join(f"{row.slowest_ms[kind]}" for kind in DEADLINES_S)
    again = "never" if row.recovered_s is None else f"{row.recovered_s:.1f} s"
    shares = " | ".join(_share(share) for share in (row.look_ups, row.publishes, row.loads, row.stores))
    off = ", ".join(row.off) or "none"
    print(f"| {row.state} | {shares} | {slowest} | {off} | {row.trimmed} | {again} | {row.wrong} |", flush=True)
    for each in row.exceptions:
        print(f"{row.state}: {each}")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one object for each state")
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="states whose name has one of these")
    parser.add_argument("--seconds", type=float, default=2.0, help="how long each state lasts")
    parser.add_argument("--server", default="valkey-9.1", help="valkey-9.1, redis-8.2 or redis-7.0")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    chosen = [state for state in STATES if not options.only or any(word in state.name for word in options.only)]
    if options.json:
        rows = [run_state(state, options.seconds, options.server) for state in chosen]
        print(json.dumps([asdict(row) for row in rows], indent=1))
        return
    print(_HEAD)
    for state in chosen:
        _print_row(run_state(state, options.seconds, options.server))


if __name__ == "__main__":
    main()
