"""SGLang's host pools, each with a store of its own, and the chains that its page keys belong to."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from distprefix.chunking import HASH_BYTES
from distprefix.engines.chains_of_keys import ChainsOfKeys, packed
from distprefix.engines.sglang_pages import Page, identity_of, is_replicated, pages_of
from distprefix.engines.sglang_stores import PoolStore, settled
from distprefix.engines.store import config_for

__all__ = ["KV", "HostPools", "Stats"]

_log = logging.getLogger("distprefix")
KV = "kv"
_ALL, _GROUPS = "all_pages", "block_groups"
_ANY = 1 << 62
"""SGLang waits for every store, so its own limits hold."""


@dataclass
class Stats:
    """As SGLang's StorageMetrics, since it was last asked for; `counts` are since the start."""

    prefetch_pgs: list[int] = field(default_factory=list[int])
    backup_pgs: list[int] = field(default_factory=list[int])
    prefetch_bandwidth: list[float] = field(default_factory=list[float])
    """GB/s."""
    backup_bandwidth: list[float] = field(default_factory=list[float])
    counts: dict[str, int] = field(default_factory=dict[str, int])


class HostPools:
    """What SGLang registered, and where its pages go. Thread-safe."""

    def __init__(self, config: Any, settings: Mapping[str, Any]) -> None:
        self._config = config
        self._settings = dict(settings)
        self._chains = ChainsOfKeys()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._stats = Stats()
        self._pools: dict[str, Any] = {}
        self._stores: dict[str, PoolStore] = {}
        self._apart: set[str] = set()
        """Pools whose pages stand alone."""
        self._said = False

    def register(self, name: str, pool: Any) -> None:
        """This pool's pages are to be had from now on; connects."""
        with self._lock:
            if self._pools.get(name) is pool:
                return
            self._pools[name] = pool
            old = self._stores.pop(name, None)
        if old is not None:
            old.close()
        self._store(name).open()

    # Look up

    def find(self, name: str, keys: Sequence[str], extra_info: Any) -> int:
        """How many leading pages of these can be loaded, as a part of their chain. One Redis call."""
        if not keys:
            return 0
        chain, first = self._chain(keys, extra_info) or (packed(keys), 0)
        self._chains.learn(chain, is_from_root=getattr(extra_info, "prefix_keys", None) is not None)
        store = self._store(name)
        found = max(0, settled(store.look_up(chain), 2 * store.config.lookup_timeout_s, 0) - first)
        self.count("pages_looked_up", len(keys))
        self.count("pages_found", found)
        return found

    def able(self, transfer: Any, keys: Sequence[str], extra_info: Any) -> set[int]:
        """With how many leading pages a pool can go on: every such number, from 1 on."""
        name, policy, own = str(transfer.name), str(transfer.hit_policy.value), list(transfer.keys or [])
        if not self._stands_alone(name, policy):
            return set(range(1, self.find(name, keys, extra_info) + 1))
        store, wanted = self._store(name), own if policy == _GROUPS else keys
        found = settled(store.look_up_each(packed(wanted)), 2 * store.config.lookup_timeout_s, list[bool]())
        there = {at for at, is_there in enumerate(found) if is_there}
        if policy == _GROUPS:
            group, groups = max(1, transfer.group_pages), 0
            while (groups + 1) * group <= len(own) and there.issuperset(range(groups * group, (groups + 1) * group)):
                groups += 1
            return {min(groups * max(1, transfer.block_pages), len(keys))} - {0}
        least = len(keys) if policy == _ALL else max(1, len(own))
        return {end for end in range(1, len(keys) + 1) if there.issuperset(range(max(0, end - least), end))}

    # Load and store

    def load(self, name: str, keys: Sequence[str], indices: Any, extra_info: Any, policy: Any = None) -> list[bool]:
        """Load pages into a pool. Which of them are good."""
        self._stands_alone(name, policy)
        return self.transfer_in(name, keys, pages_of(self._pools[name], indices, len(keys)), extra_info)

    def store(self, name: str, keys: Sequence[str], indices: Any, extra_info: Any, policy: Any = None) -> list[bool]:
        """Store pages of a pool. Which of them are there then."""
        self._stands_alone(name, policy)
        pool = self._pools[name]
        is_writer = getattr(self._config, "is_storage_writer", self._config.tp_rank == 0)  # SGLang 0.5.22 has no such
        if not is_writer and is_replicated(self._config, name, pool):
            return [True] * len(keys)  # another rank writes the very same
        if getattr(extra_info, "prefix_keys", None) is None:
            self.say_no_prefix_keys()
        return self.transfer_out(name, keys, pages_of(pool, indices, len(keys)), extra_info)

    def transfer_in(self, name: str, keys: Sequence[str], pages: Sequence[Page], extra_info: Any) -> list[bool]:
        """Load pages, wherever they are wanted. Which are good: of a chain, those before the first that is not."""
        store, targets, began = self._store(name), [page.target() for page in pages], time.perf_counter()
        if name in self._apart:
            future, none = store.load_each(packed(keys), targets), [False] * len(keys)
            good = settled(future, store.config.payload_timeout_s, none, holds_buffers=True)
        else:
            chain, first = self._chain(keys, extra_info) or (packed(keys), 0)
            future = store.load(chain, targets, first)
            loaded = settled(future, store.config.payload_timeout_s, 0, holds_buffers=True)
            good = [at < loaded for at in range(len(keys))]
        for page, target, is_good in zip(pages, targets, good, strict=True):
            if is_good:
                page.keep(target)
        size = sum(len(target) for target, is_good in zip(targets, good, strict=True) if is_good)
        with self._lock:
            self._stats.prefetch_pgs.append(sum(good))
            self._stats.prefetch_bandwidth.append(size / 1e9 / max(1e-9, time.perf_counter() - began))
        self.count("pages_loaded", sum(good))
        return good

    def transfer_out(self, name: str, keys: Sequence[str], pages: Sequence[Page], extra_info: Any) -> list[bool]:
        """Store pages, from wherever they are. Which of them are there then."""
        known = None if name in self._apart else self._chain(keys, extra_info)
        if known is None and name not in self._apart:
            self.count("pages_without_chain", len(keys))
            return [False] * len(keys)
        store, payloads, began = self._store(name), [page.read() for page in pages], time.perf_counter()
        if known is None:
            future, none = store.store_each(packed(keys), payloads), [False] * len(keys)
            good = settled(future, store.config.payload_timeout_s, none, holds_buffers=True)
        else:
            chain, first = known
            self._chains.learn(chain)
            stored = settled(store.store(chain, payloads, first), store.config.payload_timeout_s, 0, holds_buffers=True)
            good = [first + at < stored for at in range(len(keys))]
        size = sum(memoryview(payload).nbytes for payload in payloads)
        with self._lock:
            self._stats.backup_pgs.append(sum(good))
            self._stats.backup_bandwidth.append(size / 1e9 / max(1e-9, time.perf_counter() - began))
        self.count("pages_stored", sum(good))
        return good

    # Look after it

    def say_no_prefix_keys(self) -> None:
        """Warn once that we are not told what came before a page."""
        if not self._said:
            self._said = True
            _log.warning(
                "SGLang does not tell what comes before a page: set hicache_storage_pass_prefix_keys to true in the "
                "extra config, else only what this server looked up itself is shared"
            )

    def count(self, name: str, count: int) -> None:
        """Count what happened."""
        with self._lock:
            self._counts[name] += count

    def stats(self) -> Stats:
        """What happened. No Redis call."""
        with self._lock:
            counts, stores = Counter(self._counts), list(self._stores.values())
            stats, self._stats = self._stats, Stats()
        for store in stores:
            counts.update({name: count for name, count in store.metrics().items() if isinstance(count, int)})
        stats.counts = dict(counts)
        return stats

    def clear(self) -> bool:
        """Empty the namespaces of all pools, for everybody. Whether that was done."""
        self._chains.clear()
        with self._lock:
            stores = list(self._stores.values())
        return sum(store.clear() for store in stores) == len(stores)

    def close(self) -> None:
        """Finish what was begun, and close. May be called again."""
        with self._lock:
            stores, self._stores, self._pools = list(self._stores.values()), {}, {}
        for store in stores:
            store.close()

    def _store(self, name: str) -> PoolStore:
        with self._lock:
            store = self._stores.get(name)
            if store is None:
                identity = identity_of(self._config, self._pools[name], name)
                settings = dict(self._settings)
                if settings.get("exact_namespace") and name != KV:
                    settings["namespace"] = f"{settings.get('namespace', 'kv')}-{name}"
                store = self._stores[name] = PoolStore(config_for(identity, settings), max_waiting_bytes=_ANY)
            return store

    def _stands_alone(self, name: str, policy: Any) -> bool:
        """Whether a pool's pages are there without those before; once said, it holds."""
        if policy is not None and getattr(policy, "value", policy) != _ALL:
            self._apart.add(name)
        return name in self._apart

    def _chain(self, keys: Sequence[str], extra_info: Any) -> tuple[bytes, int] | None:
        """The whole chain, from the root, and where these keys begin in it; None when nobody said."""
        own, prefix = packed(keys), getattr(extra_info, "prefix_keys", None)
        before = self._chains.before(own[:HASH_BYTES]) if prefix is None else packed(prefix)
        return None if before is None else (before + own, len(before) // HASH_BYTES)
