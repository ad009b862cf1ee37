"""Tasks of LMCache's L2 adapters: begun at once, done later, told by an event and asked for once. Knows no LMCache."""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from distprefix.engines.store import EngineStore
from distprefix.optimizer import PrefixCacheOptimizer
from distprefix.reservations import Lease

__all__ = ["Holds", "LeasingStore", "Stores", "Tasks", "when_all"]

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)
_log = logging.getLogger("distprefix")


class LeasingStore(EngineStore):
    """A store whose look-ups can also lease what they found."""

    def look_up_and_lease(self, chain: bytes, ttl_s: float) -> Future[tuple[int, Lease | None]]:
        """How many leading chunks can be loaded, and the lease that keeps them from eviction, for everybody.

        Redis calls: 1, and when it found some 1 for the lease, 2 when L1 does not know the way. Without a lease when
        that failed.
        """

        def work(cache: PrefixCacheOptimizer) -> tuple[int, Lease | None]:
            named = cache.chain_of_hashes(chain)
            found = cache.find_stored(named)
            if not found:
                return 0, None
            lease = cache.lease(named[:found], ttl_s)
            return found, lease if lease.chunks else None

        return self._submit(self._lookups, work, (0, None))

    def release(self, lease: Lease) -> None:
        """End a lease, soon. When that fails it ends by itself."""
        self._submit(self._lookups, lambda _: lease.release(), None)


class Holds(Generic[K]):
    """Leases by the keys they were taken for: one ends when its last key was given back. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[K, deque[list[Any]]] = {}

    def __len__(self) -> int:
        return len(self._held)

    def add(self, keys: Sequence[K], release: Callable[[], None]) -> None:
        """These keys are held until each was given back."""
        hold: list[Any] = [len(keys), release]
        with self._lock:
            for key in keys:
                self._held.setdefault(key, deque()).append(hold)

    def give_back(self, keys: Sequence[K]) -> None:
        """Give keys back, what was taken first first; those that are not held do no harm."""
        done: list[Callable[[], None]] = []
        with self._lock:
            for key in keys:
                holds = self._held.get(key)
                if not holds:
                    continue
                hold = holds.popleft()
                if not holds:
                    del self._held[key]
                hold[0] -= 1
                if not hold[0]:
                    done.append(hold[1])
        for release in done:
            release()


class Stores(Generic[K]):
    """Stores by what their KV is; those that were used longest ago are closed when there are too many. Thread-safe."""

    def __init__(self, make: Callable[[K], LeasingStore], most: int) -> None:
        self._make, self._most = make, most
        self._lock = threading.Lock()
        self._stores: OrderedDict[K, LeasingStore] = OrderedDict()
        self._closed = False

    def get(self, space: K) -> LeasingStore | None:
        """The store of a space; None when it cannot be made, or all is closed."""
        with self._lock:
            if self._closed:
                return None
            store = self._stores.get(space)
            if store is None:
                store = self._stores[space] = self._make(space)
            self._stores.move_to_end(space)
            old = self._stores.popitem(last=False)[1] if len(self._stores) > self._most else None
        if old is not None:
            threading.Thread(target=old.close, name="distprefix-close").start()
        return store

    def all(self) -> list[LeasingStore]:
        """Those that are open."""
        with self._lock:
            return list(self._stores.values())

    def close(self) -> None:
        """Close all, for good."""
        with self._lock:
            stores, self._closed = list(self._stores.values()), True
            self._stores.clear()
        for store in stores:
            store.close()


class Tasks(Generic[T]):
    """What became of tasks, until it is asked for. Thread-safe."""

    def __init__(self, notify: Callable[[], None]) -> None:
        self._notify = notify
        self._lock = threading.Lock()
        self._done: dict[int, T] = {}

    def finish(self, task: int, outcome: T) -> None:
        """A task is done: say so."""
        with self._lock:
            self._done[task] = outcome
        try:
            self._notify()
        except (OSError, ValueError):  # closed meanwhile: nobody waits
            _log.debug("a task ended after its adapter was closed")

    def take(self, task: int) -> T | None:
        """What became of a task, once."""
        with self._lock:
            return self._done.pop(task, None)

    def take_all(self) -> dict[int, T]:
        """What became of all that are done, once."""
        with self._lock:
            done, self._done = self._done, {}
        return done


def when_all(futures: Sequence[Future[T]], then: Callable[[list[T | None]], None]) -> None:
    """Call with all results when the last one is there, at once if there is none; None for one that was cancelled."""
    lock, left = threading.Lock(), [len(futures)]

    def one_is_done(_: object) -> None:
        with lock:
            left[0] -= 1
            if left[0]:
                return
        then([None if future.cancelled() or future.exception() else future.result() for future in futures])

    if not futures:
        then([])
    for future in futures:
        future.add_done_callback(one_is_done)
