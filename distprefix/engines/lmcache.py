"""LMCache's L2 in Redis: an adapter plug-in for ``lmcache server --l2-adapter``; docs/lmcache.md tells how."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import itertools
import logging
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from importlib import metadata
from typing import Any, NamedTuple, TypeVar

from lmcache.lmcache_native import Bitmap
from lmcache.v1.distributed.internal_api import L2StoreResult
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.platform.event_notifier import create_event_notifier

from distprefix.chunking import HASH_BYTES
from distprefix.engines.chains_of_keys import ChainsOfKeys, packed
from distprefix.engines.identity import Identity, weights_soon
from distprefix.engines.lmcache_tasks import Holds, LeasingStore, Stores, Tasks, when_all
from distprefix.engines.store import config_for
from distprefix.errors import ConfigError
from distprefix.redis.transfers import Buffer
from distprefix.reservations import Lease

__all__ = ["DistPrefixL2Adapter"]

T = TypeVar("T")
_log = logging.getLogger("distprefix")
_LEASE_S = 60.0
_STORES = 64
_CHUNK = 256
"""Tokens in a chunk, where nobody says: nothing but metrics depends on it."""


class _Space(NamedTuple):
    """What the KV of keys depends on beside their hash: a namespace for each."""

    model: str
    rank: int
    group: int
    salt: str
    layout: str


class DistPrefixL2Adapter(L2AdapterInterface):
    """Chunks of LMCache's servers in Redis, leased across nodes from look-up to unlock. Thread-safe.

    `adapter_params`: settings of distprefix, and ``lease_s``, ``salt``, ``weights``, ``chunk_size``. Raises ConfigError
    for wrong ones when it is made; later it never raises and never blocks: what cannot be had is a miss, and counted.
    """

    def __init__(self, params: dict[str, Any] | None = None, l1_memory_desc: Any = None) -> None:  # noqa: ARG002 - theirs
        super().__init__()
        settings = dict(params or {})
        self._lease_s = float(settings.pop("lease_s", _LEASE_S))
        self._chunk = int(settings.pop("chunk_size", _CHUNK))
        self._settings = settings
        if config_for(self._identity(_Space("", 0, 0, "", "")), settings).url is None:
            raise ConfigError("url is missing: name the Redis that the servers share in adapter_params")
        self._events = [create_event_notifier() for _ in range(3)]
        self._stored: Tasks[Any] = Tasks(self._events[0].notify)
        self._found: Tasks[Any] = Tasks(self._events[1].notify)
        self._loaded: Tasks[Any] = Tasks(self._events[2].notify)
        self._numbers = itertools.count()
        self._stores: Stores[_Space] = Stores(self._make, _STORES)
        self._holds: Holds[Any] = Holds()
        self._chains: dict[tuple[Any, ...], ChainsOfKeys] = {}
        self._layouts: dict[tuple[str, int, int], str] = {}
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def get_store_event_fd(self) -> int:
        """Readable when a store is done."""
        return self._events[0].fileno()

    def get_lookup_and_lock_event_fd(self) -> int:
        """Readable when a look-up is done."""
        return self._events[1].fileno()

    def get_load_event_fd(self) -> int:
        """Readable when a load is done."""
        return self._events[2].fileno()

    def submit_lookup_and_lock_task(self, keys: list[Any], group_layout_descs: dict[int, Any]) -> int:
        """Look up one request's keys, which begin at the root, and lease what is there. A walk and a lease a rank."""
        for key in keys:
            described = (group_layout_descs or {}).get(key.object_group_id)
            if described is not None:
                self._layouts[_shape(key)] = _layout(described.shapes, described.dtypes)

        def work(task: int) -> None:
            parts = [(store, indices, _hashes(keys, indices)) for store, indices in self._by_store(keys, None)]
            for _, indices, chain in parts:
                self._chain_map(keys[indices[0]]).learn(chain)
            futures = [store.look_up_and_lease(chain, self._lease_s) for store, _, chain in parts]

            def then(results: Sequence[tuple[int, Lease | None] | None]) -> None:
                found: list[int] = []
                for (store, indices, _), result in zip(parts, results, strict=True):
                    count, lease = result or (0, None)
                    found += indices[:count]
                    if lease is not None:
                        self._hold([keys[i] for i in indices[:count]], store, lease)
                self._finish(self._found, task, keys, found, "looked_up", "found")

            when_all(futures, then)

        return self._begin(self._found, work, Bitmap(len(keys)))

    def query_lookup_and_lock_result(self, task_id: int) -> Any | None:
        """Which keys can be loaded; None while it is not known, and from the second time on."""
        return self._found.take(task_id)

    def submit_unlock(self, keys: list[Any]) -> None:
        """Give keys back: a lease ends with its last one, or by itself after ``lease_s``."""
        self._holds.give_back(keys)

    def submit_load_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Load keys into objects, each run of them that follow each other in one go."""

        def work(task: int) -> None:
            parts = list(self._runs(keys, objects, guess=False))
            buffers = [[_bytes(objects[i]) for i in indices] for _, indices, _, _ in parts]
            futures = [
                store.load(chain, into, first) for (store, _, chain, first), into in zip(parts, buffers, strict=True)
            ]

            def then(results: Sequence[int | None]) -> None:
                good = [i for (_, indices, _, _), n in zip(parts, results, strict=True) for i in indices[: n or 0]]
                self._finish(self._loaded, task, keys, good, "wanted", "loaded")

            when_all(futures, then)

        return self._begin(self._loaded, work, Bitmap(len(keys)))

    def query_load_result(self, task_id: int) -> Any | None:
        """Which keys are loaded; None while it is not known, and from the second time on."""
        return self._loaded.take(task_id)

    def submit_store_task(self, keys: list[Any], objects: list[Any]) -> int:
        """Store objects; behind one that is not there none is stored. It succeeded when all are there then."""

        def work(task: int) -> None:
            parts = list(self._runs(keys, objects, guess=True))
            futures: list[Future[int]] = []
            for store, indices, chain, first in parts:
                payloads: list[Buffer] = [_bytes(objects[i]) for i in indices]
                futures.append(store.store(chain, payloads, first))

            def then(results: Sequence[int | None]) -> None:
                there: list[int] = []
                for (_, indices, _, first), n in zip(parts, results, strict=True):
                    there += indices[: max(0, (n or 0) - first)]
                sizes = [int(objects[i].get_size()) for i in there]
                self._count("stored", len(there))
                try:
                    self._notify_keys_stored([keys[i] for i in there], sizes)
                finally:  # whatever a listener met, LMCache waits for this
                    self._stored.finish(task, L2StoreResult(len(there) == len(keys), sum(sizes)))

            when_all(futures, then)

        return self._begin(self._stored, work, L2StoreResult(success=False, bytes_transferred=0))

    def pop_completed_store_tasks(self) -> dict[int, Any]:
        """What became of the stores that are done, once."""
        return self._stored.take_all()

    def report_status(self) -> dict[str, Any]:
        """Counts of this adapter and of its caches, added up. No Redis call."""
        counts = Counter(self._counts)
        for store in self._stores.all():
            counts.update({name: n for name, n in store.metrics().items() if isinstance(n, int)})
        return {"is_healthy": True, "type": type(self).__name__, "locked_key_count": len(self._holds), **counts}

    def close(self) -> None:
        """Finish what was begun, and close. May be called again."""
        self._stores.close()
        for event in self._events:
            event.close()

    # How

    def _begin(self, tasks: Tasks[Any], work: Callable[[int], None], failed: Any) -> int:
        task = next(self._numbers)
        try:
            work(task)
        except Exception:  # noqa: BLE001 - LMCache's controllers must go on, whatever we met
            self._count("errors", 1)
            _log.exception("a task of LMCache's failed")
            tasks.finish(task, failed)
        return task

    def _finish(
        self, tasks: Tasks[Any], task: int, keys: Sequence[Any], good: Sequence[int], asked: str, got: str
    ) -> None:
        bits = Bitmap(len(keys))
        bits.batched_set(sorted(good))
        self._count(f"keys_{asked}", len(keys))
        self._count(f"keys_{got}", len(good))
        try:
            if good:
                self._notify_keys_accessed([keys[i] for i in good])
        finally:
            tasks.finish(task, bits)

    def _hold(self, keys: Sequence[Any], store: LeasingStore, lease: Lease) -> None:
        self._holds.add(keys, lambda: store.release(lease))

    def _by_store(self, keys: Sequence[Any], objects: Sequence[Any] | None) -> list[tuple[LeasingStore, list[int]]]:
        """Indices of the keys by the store they belong to, in their order."""
        spaces: dict[_Space, list[int]] = {}
        for i, key in enumerate(keys):
            layout = self._layouts.get(_shape(key))
            if layout is None and objects is not None:
                layout = _layout(objects[i].get_shapes(), objects[i].get_dtypes())
            space = _Space(key.model_name, key.kv_rank, key.object_group_id, key.cache_salt, layout or "")
            spaces.setdefault(space, []).append(i)
        found = [(self._stores.get(space), indices) for space, indices in spaces.items()]
        return [(store, indices) for store, indices in found if store is not None]

    def _runs(
        self, keys: Sequence[Any], objects: Sequence[Any], *, guess: bool
    ) -> list[tuple[LeasingStore, list[int], bytes, int]]:
        """The keys in runs: where they belong, which they are, their chain from the root, where they begin in it."""
        runs: list[tuple[LeasingStore, list[int], bytes, int]] = []
        for store, indices in self._by_store(keys, objects):
            chains, own = self._chain_map(keys[indices[0]]), _hashes(keys, indices)
            for start, stop in chains.runs(own, guess=guess):
                part = own[start * HASH_BYTES : stop * HASH_BYTES]
                before = chains.before(part[:HASH_BYTES])
                if before is None:
                    self._count("keys_without_chain", stop - start)
                else:
                    runs.append((store, indices[start:stop], before + part, len(before) // HASH_BYTES))
        return runs

    def _chain_map(self, key: Any) -> ChainsOfKeys:
        """Chains are the same for all ranks and groups, but hashes need not be the same for all models."""
        with self._lock:
            return self._chains.setdefault((key.model_name, key.object_group_id), ChainsOfKeys())

    def _make(self, space: _Space) -> LeasingStore:
        return LeasingStore(config_for(self._identity(space), self._settings))

    def _identity(self, space: _Space) -> Identity:
        return Identity(
            engine=f"lmcache {metadata.version('lmcache')}",
            model=space.model,
            weights=weights_soon(space.model),
            dtype="",
            layout=space.layout,
            chunk_size=self._chunk,
            ranks=f"rank {space.rank:08x} group {space.group:x}",
            hashing="lmcache",
            request_salt=space.salt,
        )

    def _count(self, name: str, count: int) -> None:
        with self._lock:
            self._counts[name] += count


def _shape(key: Any) -> tuple[str, int, int]:
    return key.model_name, key.kv_rank, key.object_group_id


def _layout(shapes: Sequence[Any], dtypes: Sequence[Any]) -> str:
    return " ".join(f"{list(shape)} {dtype}" for shape, dtype in zip(shapes, dtypes, strict=True))


def _bytes(item: Any) -> memoryview:
    return memoryview(item.byte_array).cast("B")


def _hashes(keys: Sequence[Any], indices: Sequence[int]) -> bytes:
    return packed(keys[i].chunk_hash for i in indices)
