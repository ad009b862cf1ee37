"""Which eviction policy finds the most, on traces of prefix caches: python benchmarks/policies.py [TRACE...].

Traces are in Mooncake's format, as `distprefix.replay.trace` reads it. Without any, all in the folder that
PREFIX_TRACES names are used, or else in ../shared/traces. Figures are shares of the requested chunks that were in the
cache; capacities are shares of a trace's unique chunks.

What a policy keeps of a run (see `simulator`) holds for all its chunks: a tail that went and came back counts as being
as old, and as often used, as the rest. For lru and belady this is exact: a run's chunks are used by the same requests.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from simulator import Cache, Ghosts, Leaves, Policy, Victim, Workload, simulate

from distprefix.errors import TraceError
from distprefix.replay.trace import read_trace

__all__ = ["POLICIES", "Arc", "Belady", "Cost", "Fifo", "Lfu", "Lru", "S3Fifo", "cost_score"]

MAX_RUN = 256
"""Chunks of the longest node, as in distprefix."""
FRESH_MS = 500
"""What doubling a node costs it while nobody has found it yet, in ms of its age."""
DEEP = 2048
"""Chunks of depth that halve this."""
_CAPACITIES = ("0.5%", "1%", "5%", "10%")


def cost_score(accessed: float, hits: int, depth: int, size: int) -> float:
    """When a leaf counts as last used, in ms: the least goes first. All arguments are the node's own.

    A long node that nobody has found yet is one prompt's own text: it takes the most room for the least chance to be
    asked for, and goes up to four seconds early (256 chunks are 8 doublings). Hits take that back, and so does depth:
    deep chunks cost more prefill. There is no bonus for either as such: on the traces it keeps what conversations that
    are over have left behind.
    """
    return accessed - FRESH_MS * math.log2(1 + size) / ((1 + hits) * (1 + depth / DEEP))


class _Scored:
    """A policy that is a key for each leaf, set when it becomes a leaf and when it is used."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._leaves = Leaves(cache)

    def used(self, run: int, added: int) -> None:
        """Whatever the key needs."""

    def evicted(self, run: int, chunks: int) -> None:
        """Nothing: what is no leaf any more is skipped."""

    def is_leaf(self, run: int) -> None:
        """Takes its place."""
        self._leaves.push(run, *self.key(run))

    def victim(self) -> Victim:
        """All of the first leaf may go: its chunks have one key."""
        run = self._leaves.first()
        assert run is not None
        return Victim(run, self.cache.held[run])

    def key(self, run: int) -> tuple[float, float]:
        """Least goes first."""
        raise NotImplementedError


class Lru(_Scored):
    """The leaf used longest ago."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self.accessed = [0] * len(cache.held)

    def used(self, run: int, added: int) -> None:  # noqa: ARG002 - whatever came in, it was used
        self.accessed[run] = self.cache.now

    def key(self, run: int) -> tuple[float, float]:
        return self.accessed[run], 0


class Fifo(_Scored):
    """The leaf that came first."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self._came = [0] * len(cache.held)

    def used(self, run: int, added: int) -> None:
        if added == self.cache.held[run]:
            self._came[run] = self.cache.now

    def key(self, run: int) -> tuple[float, float]:
        return self._came[run], 0


class Lfu(Lru):
    """The leaf used least often since it came; of those, the one used longest ago."""

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self._uses = [0] * len(cache.held)

    def used(self, run: int, added: int) -> None:
        super().used(run, added)
        self._uses[run] = 1 + (self._uses[run] if added < self.cache.held[run] else 0)

    def key(self, run: int) -> tuple[float, float]:
        return self._uses[run], self.accessed[run]


class Belady(_Scored):
    """The leaf whose next use is farthest: the optimum that knows the future (Belady, IBM Systems Journal 1966).

    A chunk is never used before its parent, so that the farthest of all chunks is a leaf, and choosing among leaves
    costs nothing. What just came may go at once. Hence no policy here can find more: a chunk that is found was kept all
    the time since its last use, and to give up the spans that end last keeps the most of them.
    """

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self._uses: list[list[int]] = [[len(cache.workload.paths)] for _ in cache.held]
        for i in reversed(range(len(cache.workload.paths))):
            for run in cache.workload.paths[i]:
                self._uses[run].append(i)

    def used(self, run: int, added: int) -> None:  # noqa: ARG002 - whatever came in, it was used
        self._uses[run].pop()

    def key(self, run: int) -> tuple[float, float]:
        return -self._uses[run][-1], 0


class Cost(_Scored):
    """The leaf with the least `cost_score` as the real tree would reckon it, which cannot see what will split a node.

    A node is what one request added, cut where later ones went another way and after `MAX_RUN` chunks. It has a hit for
    every request whose last cached chunk it held; both halves of a cut keep the hits.
    """

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self._accessed = [0.0] * len(cache.held)
        self._hits = [0] * len(cache.held)  # of the node that begins with the run
        self._begins = [True] * len(cache.held)
        self._rest = [-1] * len(cache.held)  # the run below that belongs to the same node
        self._request = -1
        self._found = -1
        self._adding = False

    def used(self, run: int, added: int) -> None:
        if self._request != self.cache.now:
            self._request, self._found, self._adding = self.cache.now, -1, False
        self._accessed[run] = self.cache.workload.clock[self.cache.now]
        if added < self.cache.held[run]:
            self._find(run)
        else:
            self._add(run)

    def key(self, run: int) -> tuple[float, float]:
        first, starts = self._first(run), self.cache.workload.starts
        size = starts[run] + self.cache.held[run] - starts[first]
        above = (size - 1) // MAX_RUN * MAX_RUN
        return cost_score(self._accessed[run], self._hits[first], starts[first] + above, size - above), 0

    def _first(self, run: int) -> int:
        while not self._begins[run]:
            run = self.cache.workload.parents[run]
        return run

    def _find(self, run: int) -> None:
        """The hit is the deepest node's, so that one further down takes it over."""
        if self._found >= 0:
            self._hits[self._found] -= 1
        self._found = self._first(run)
        self._hits[self._found] += 1

    def _add(self, run: int) -> None:
        parent = self.cache.workload.parents[run]
        self._begins[run], self._rest[run] = not self._adding, -1
        if self._adding:
            self._rest[parent] = run
            return
        self._adding, self._hits[run] = True, 0
        if parent >= 0:
            self._cut(parent)

    def _cut(self, run: int) -> None:
        """What a node has below the run becomes a node of its own. A hit of this request stays above."""
        rest, self._rest[run] = self._rest[run], -1
        if rest >= 0 and self.cache.held[rest]:
            first = self._first(run)
            self._begins[rest], self._hits[rest] = True, self._hits[first] - (first == self._found)


class _Queues:
    """What arc and s3fifo share: two queues that a run is in one of, in `order`, and their sizes in chunks."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self._leaves = (Leaves(cache), Leaves(cache))
        self._queue = [0] * len(cache.held)
        self._order = [0] * len(cache.held)
        self._sizes = [0, 0]
        self._entered = 0

    def is_leaf(self, run: int) -> None:
        """Takes its place in its queue; a queue that it was in before forgets it."""
        queue = self._queue[run]
        self._leaves[queue].push(run, self._order[run])
        self._leaves[1 - queue].remove(run)

    def _enter(self, run: int, queue: int, chunks: int) -> None:
        """The run is the last of the queue, with so many chunks it did not have in any."""
        had = self.cache.held[run] - chunks
        self._sizes[self._queue[run]] -= had
        self._sizes[queue] += had + chunks
        self._entered += 1
        self._queue[run], self._order[run] = queue, self._entered

    def _first(self, queue: int) -> int:
        """The first leaf of the queue, or of the other where this one has none."""
        run = self._leaves[queue].first()
        if run is None:
            run = self._leaves[1 - queue].first()
        assert run is not None
        return run


class Arc(_Queues):
    """ARC (Megiddo and Modha, FAST 2003), on leaves.

    T1 has the runs used once, T2 those used again, both in order of their last use; B1 and B2 remember what went. Sizes
    are chunks. A parent is used whenever its child is, so it is rarely in T1 with a child in T2; where the queue that
    should lose a chunk has no leaf, the other does. All chunks of a request come in before any goes, and a run that was
    in a ghost moves the target by as many steps as it had chunks there. Ghosts forget whole runs.
    """

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self._ghosts = (Ghosts(), Ghosts())
        self._target = 0.0

    def used(self, run: int, added: int) -> None:
        once, again = self._ghosts
        weight = (again.size / max(1, once.size), once.size / max(1, again.size))
        lost = (once.take(run), again.take(run))
        step = lost[0] * max(1.0, weight[0]) - lost[1] * max(1.0, weight[1])
        self._target = min(max(self._target + step, 0.0), self.cache.capacity)
        self._enter(run, int(added < self.cache.held[run] or any(lost)), added)

    def victim(self) -> Victim:
        """From T1 while it is larger than its target, else from T2."""
        over = self._sizes[0] - self._target
        run = self._first(0 if over > 0 else 1)
        once = self._queue[run] == 0 and over > 0
        return Victim(run, math.ceil(over) if once else self.cache.held[run])

    def evicted(self, run: int, chunks: int) -> None:
        """A ghost remembers; |T1| + |B1| stays within the capacity, all four within twice that."""
        queue = self._queue[run]
        self._sizes[queue] -= chunks
        self._ghosts[queue].add(run, chunks)
        self._ghosts[0].shrink(self.cache.capacity - self._sizes[0])
        self._ghosts[1].shrink(2 * self.cache.capacity - sum(self._sizes) - self._ghosts[0].size)


class S3Fifo(_Queues):
    """S3-FIFO (Yang et al., SOSP 2023), on leaves.

    What is new enters a small queue of a tenth of the capacity, or the main one if a ghost remembers it. The oldest
    leaf of a queue is the one to go; runs with children are passed over and keep their place until they are leaves, and
    where a queue has no leaf the other loses one. As published, a count of uses goes up to 3; more than one moves a run
    from the small to the main queue, where each use is one more round. A run's uses and place are all its chunks'.
    """

    def __init__(self, cache: Cache) -> None:
        super().__init__(cache)
        self._ghosts = Ghosts()
        self._uses = [0] * len(cache.held)
        self._small = cache.capacity / 10

    def used(self, run: int, added: int) -> None:
        remembered = self._ghosts.take(run)
        if added == self.cache.held[run]:
            self._uses[run] = 0
            self._enter(run, int(remembered > 0), added)
        else:
            self._uses[run] = min(3, self._uses[run] + 1)
            self._sizes[self._queue[run]] += added

    def victim(self) -> Victim:
        """The first that nobody asks for; those used stay for another round."""
        while True:
            over = self._sizes[0] - self._small
            run = self._first(0 if over > 0 else 1)
            queue, uses = self._queue[run], self._uses[run]
            if uses <= 1 - queue:
                return Victim(run, math.ceil(over) if queue == 0 and over > 0 else self.cache.held[run])
            self._uses[run] = uses - 1 if queue else 0
            self._enter(run, 1, 0)
            self.is_leaf(run)

    def evicted(self, run: int, chunks: int) -> None:
        """Only the small queue leaves ghosts, as many as the main one may have chunks."""
        self._sizes[self._queue[run]] -= chunks
        if self._queue[run] == 0:
            self._ghosts.add(run, chunks)
            self._ghosts.shrink(self.cache.capacity - self._small)


POLICIES: dict[str, Callable[[Cache], Policy]] = {
    "lru": Lru,
    "cost": Cost,
    "fifo": Fifo,
    "lfu": Lfu,
    "arc": Arc,
    "s3fifo": S3Fifo,
    "belady": Belady,
}


class Rate(NamedTuple):
    """One row: what each policy found of a trace's chunks."""

    trace: str
    requests: int
    limited: bool
    """Whether the trace has more requests, which `--limit` left out."""
    unique_chunks: int
    block_size: int | None
    capacity: str
    capacity_chunks: int
    ideal: float
    """What a cache without limit finds."""
    rates: dict[str, float]


def main() -> None:
    """Replay and print."""
    options = _options()
    traces = options.traces or _traces()
    if not traces:
        sys.exit(f"no trace given, and no *.jsonl.gz in {_folder()}: name some, or the folder in PREFIX_TRACES")
    began, rows = time.perf_counter(), list[Rate]()
    for path in traces:
        try:
            rows += _measure(path, options)
        except TraceError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not rows:
        sys.exit("none of these is a trace")
    if options.json:
        print(json.dumps({"fresh_ms": FRESH_MS, "rows": [row._asdict() for row in rows]}, indent=2))
    else:
        _print_table(rows)
    print(f"{time.perf_counter() - began:.0f} s", file=sys.stderr)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("traces", nargs="*", metavar="TRACE", help="Mooncake's format, gzipped or not")
    parser.add_argument("--block-size", type=int, metavar="N", help="tokens in a block; default: N of _bN in the name")
    parser.add_argument(
        "--capacity", nargs="+", default=_CAPACITIES, type=_share, metavar="SHARE", help="like 5%% or 0.05"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N requests of each trace")
    parser.add_argument("--policy", nargs="+", choices=POLICIES, default=list(POLICIES), help="default: all")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_intermixed_args()


def _share(text: str) -> str:
    """Checks a capacity; it stays as it was written."""
    if not 0 < _as_number(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of the unique chunks: more than 0%, at most 100%")
    return text


def _as_number(share: str) -> float:
    return float(share.removesuffix("%")) / (100 if share.endswith("%") else 1)


def _folder() -> Path:
    return Path(os.environ.get("PREFIX_TRACES") or Path(__file__).resolve().parents[2] / "shared" / "traces")


def _traces() -> list[str]:
    return sorted(str(path) for path in _folder().glob("*.jsonl.gz"))


def _measure(path: str, options: argparse.Namespace) -> list[Rate]:
    requests = read_trace(path)
    total, requests = len(requests), requests[: options.limit]
    workload = Workload.read(requests)
    if not workload.paths:
        raise TraceError(f"{path} has no blocks")
    name = Path(path).name.split(".")[0]
    block = options.block_size or next((int(size) for size in re.findall(r"_b(\d+)", name)), None)
    unique, chunks = workload.unique_chunks, workload.chunks
    rows: list[Rate] = []
    for share in options.capacity:
        capacity = max(1, int(unique * _as_number(share)))
        hits = {policy: simulate(workload, capacity, POLICIES[policy]) for policy in options.policy}
        rates = {policy: round(found / chunks, 6) for policy, found in hits.items()}
        about = (name, len(requests), len(requests) < total, unique, block, share, capacity)
        rows.append(Rate(*about, round(_ideal(workload) / chunks, 6), rates))
        print(f"{name}: {share}", file=sys.stderr)
    return rows


def _ideal(workload: Workload) -> int:
    """What an unlimited cache finds: all but the first use of every chunk."""
    return workload.chunks - workload.unique_chunks


def _print_table(rows: Sequence[Rate]) -> None:
    """Hit rates in percent, as a Markdown table that reads well as plain text too."""
    head = ["trace", "requests", "capacity", "chunks", "tokens", *rows[0].rates, "no limit"]
    table = [head, ["---" for _ in head], *(_cells(row) for row in rows)]
    widths = [max(len(cells[i]) for cells in table) for i in range(len(head))]
    for cells in table:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |")


def _cells(row: Rate) -> list[str]:
    tokens = f"{row.capacity_chunks * row.block_size:,}" if row.block_size else "?"
    requests = f"{row.requests:,}" + (" (first)" if row.limited else "")
    rates = [f"{100 * rate:.2f}" for rate in (*row.rates.values(), row.ideal)]
    return [row.trace, requests, row.capacity, f"{row.capacity_chunks:,}", tokens, *rates]


if __name__ == "__main__":
    main()
