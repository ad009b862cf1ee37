"""A cache of prefixes that loses its leaves, replayed over a trace: what every eviction policy is measured on.

Requests are chains of chunks. Those chunks of a trace that are used by the same requests, in a row, make a run: a cache
that is closed under prefix has the first chunks of a run and no others, so that a run and a count describe all it has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

from distprefix.replay.trace import Request

__all__ = ["Cache", "Ghosts", "Leaves", "Policy", "Victim", "Workload", "simulate"]


@dataclass(frozen=True, slots=True)
class Workload:
    """A trace as a tree of runs: every request is a path from the root, and a run's parent has the smaller number."""

    clock: list[float]
    """When each request arrives, in ms."""
    paths: list[tuple[int, ...]]
    """Its runs, root first. A request ends with a run: nobody uses part of one."""
    parents: list[int]
    """-1 for the runs at the root."""
    starts: list[int]
    """Chunks above each run."""
    lengths: list[int]

    @classmethod
    def read(cls, requests: Sequence[Request]) -> Workload:
        """The tree of a trace's requests. A chunk is told by its id and by the chunk before it."""
        above, tips = _chunks(requests)
        return cls(_clock(requests), *_runs(above, tips))

    @property
    def unique_chunks(self) -> int:
        """What a cache without limit would hold in the end."""
        return sum(self.lengths)

    @property
    def chunks(self) -> int:
        """What all requests ask for."""
        return sum(self.starts[path[-1]] + self.lengths[path[-1]] for path in self.paths)


def _clock(requests: Sequence[Request]) -> list[float]:
    """Their timestamps; their numbers where no time passes in the trace."""
    clock = [request.timestamp for request in requests if request.chunks]
    return clock if len(set(clock)) > 1 else [float(i) for i in range(len(clock))]


def _chunks(requests: Sequence[Request]) -> tuple[list[int], list[int]]:
    """The chunk above each chunk, and the last chunk of each request."""
    numbers: dict[tuple[int, int], int] = {}
    above: list[int] = []
    tips: list[int] = []
    for request in requests:
        chunk = -1
        for first, count in request.runs:
            for i in range(first, first + count):
                known = numbers.get((chunk, i))
                if known is None:
                    known = numbers[chunk, i] = len(above)
                    above.append(chunk)
                chunk = known
        if chunk >= 0:
            tips.append(chunk)
    return above, tips


def _runs(above: list[int], tips: list[int]) -> tuple[list[tuple[int, ...]], list[int], list[int], list[int]]:
    """Paths, parents, starts and lengths. A run ends where a request ends or where two go on differently."""
    children = [0] * len(above)
    for chunk in above:
        if chunk >= 0:
            children[chunk] += 1
    ends = set(tips)
    run_of, parents, starts, lengths = list[int](), list[int](), list[int](), list[int]()
    for chunk in above:
        if chunk >= 0 and children[chunk] == 1 and chunk not in ends:
            run = run_of[chunk]
            lengths[run] += 1
        else:
            run = len(parents)
            parents.append(run_of[chunk] if chunk >= 0 else -1)
            starts.append(starts[parents[run]] + lengths[parents[run]] if chunk >= 0 else 0)
            lengths.append(1)
        run_of.append(run)
    known: dict[int, tuple[int, ...]] = {-1: ()}
    return [_path(run_of[tip], parents, known) for tip in tips], parents, starts, lengths


def _path(run: int, parents: list[int], known: dict[int, tuple[int, ...]]) -> tuple[int, ...]:
    if run not in known:
        path = [run]
        while parents[path[-1]] >= 0:
            path.append(parents[path[-1]])
        known[run] = tuple(reversed(path))
    return known[run]


class Cache:
    """What is in the cache, and when: policies read it, only `simulate` changes it."""

    def __init__(self, workload: Workload, capacity: int) -> None:
        runs = len(workload.parents)
        self.workload = workload
        self.capacity = capacity
        self.size = 0
        self.now = 0
        """The number of the request."""
        self.held = [0] * runs
        """Leading chunks of each run that are in the cache."""
        self.children = [0] * runs
        """Runs below each that are in the cache, at least in part."""

    def is_leaf(self, run: int) -> bool:
        """Whether its last cached chunk has no cached child."""
        return self.held[run] > 0 and not self.children[run]

    def insert(self, run: int) -> int:
        """The whole run is in the cache. Returns how many of its chunks were not."""
        had, length = self.held[run], self.workload.lengths[run]
        self.held[run] = length
        self.size += length - had
        parent = self.workload.parents[run]
        if not had and parent >= 0:
            self.children[parent] += 1
        return length - had

    def evict(self, run: int, chunks: int) -> None:
        """The last chunks of a leaf are gone."""
        if not self.is_leaf(run) or not 0 < chunks <= self.held[run]:
            raise ValueError(
                f"run {run} cannot lose {chunks} of {self.held[run]} chunks: it has {self.children[run]} children"
            )
        self.held[run] -= chunks
        self.size -= chunks
        parent = self.workload.parents[run]
        if not self.held[run] and parent >= 0:
            self.children[parent] -= 1


class Victim(NamedTuple):
    """A leaf, and how many chunks it may lose before the policy wants to choose again."""

    run: int
    chunks: int


class Leaves:
    """Leaves in order of a key, least first. Entries of runs that were queued again or are no leaves are skipped."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._heap: list[tuple[float, float, int, int]] = []
        self._stamps = [0] * len(cache.held)
        self._stamp = 0

    def push(self, run: int, key: float, then: float = 0.0) -> None:
        """The run is a leaf with this key, and with no other any more. Keys being equal, `then` decides."""
        self._stamp += 1
        self._stamps[run] = self._stamp
        heappush(self._heap, (key, then, self._stamp, run))

    def remove(self, run: int) -> None:
        """The run is in another queue now."""
        self._stamps[run] = 0

    def first(self) -> int | None:
        """The leaf with the least key, which stays."""
        while self._heap:
            *_, stamp, run = self._heap[0]
            if stamp == self._stamps[run] and self._cache.is_leaf(run):
                return run
            heappop(self._heap)
        return None


class Ghosts:
    """Runs that lost chunks, and how many, in the order they lost them."""

    def __init__(self) -> None:
        self._lost: OrderedDict[int, int] = OrderedDict()
        self.size = 0

    def add(self, run: int, chunks: int) -> None:
        """The run lost more: it is the newest."""
        self._lost[run] = self._lost.pop(run, 0) + chunks
        self.size += chunks

    def take(self, run: int) -> int:
        """Forget the run. Returns the chunks it had lost."""
        chunks = self._lost.pop(run, 0)
        self.size -= chunks
        return chunks

    def shrink(self, size: float) -> None:
        """Forget the oldest until no more chunks than this are left."""
        while self.size > max(size, 0):
            _, chunks = self._lost.popitem(last=False)
            self.size -= chunks


class Policy(Protocol):
    """Chooses which leaf goes next."""

    def used(self, run: int, added: int) -> None:
        """A request used a run: called for each of its runs, root first, when `added` chunks of it have come in."""
        ...

    def is_leaf(self, run: int) -> None:
        """A run became a leaf, or is one and was used."""
        ...

    def victim(self) -> Victim:
        """Who goes. Called while there are leaves."""
        ...

    def evicted(self, run: int, chunks: int) -> None:
        """The run has lost so many chunks; it may have none left."""
        ...


def simulate(
    workload: Workload, capacity: int, policy: Callable[[Cache], Policy], after: Callable[[Cache], None] | None = None
) -> int:
    """Chunks that the requests found, of all they asked for. `after` sees the cache after every request."""
    cache = Cache(workload, capacity)
    chosen, hits = policy(cache), 0
    for cache.now, path in enumerate(workload.paths):
        for run in path:
            added = cache.insert(run)
            hits += workload.lengths[run] - added  # a run that is not whole has nothing below it
            chosen.used(run, added)
        if cache.is_leaf(path[-1]):
            chosen.is_leaf(path[-1])
        _shrink(cache, chosen)
        if after:
            after(cache)
    return hits


def _shrink(cache: Cache, policy: Policy) -> None:
    while cache.size > cache.capacity:
        run, most = policy.victim()
        chunks = min(most, cache.held[run], cache.size - cache.capacity)
        cache.evict(run, chunks)
        policy.evicted(run, chunks)
        parent = cache.workload.parents[run]
        if parent >= 0 and not cache.held[run] and cache.is_leaf(parent):
            policy.is_leaf(parent)
