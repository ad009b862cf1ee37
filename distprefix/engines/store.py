"""A cache as engines need it: nothing here blocks their threads, nothing raises, and Redis may come and go."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import fields, replace
from typing import Any, TypeVar

from distprefix.chunking import HASH_BYTES, Chain
from distprefix.config import PrefixCacheConfig, settings_of_environment, settings_of_toml
from distprefix.engines.identity import Identity, await_weights, is_pending
from distprefix.errors import ConfigError, DistPrefixError, NamespaceError, UnavailableError
from distprefix.optimizer import PrefixCacheOptimizer
from distprefix.redis.transfers import Buffer

__all__ = ["REST_S", "EngineStore", "config_for", "each_chunk", "load_alone", "rest", "size_of", "store_alone"]

T = TypeVar("T")
_log = logging.getLogger("distprefix")
_ALONE = b"alone"
_REOPEN_S = 5.0
REST_S = 0.002
"""So much later an engine may see that it has something to compute after all."""
_DEFAULTS: dict[str, Any] = {"publish_timeout_s": 1.0, "lookup_timeout_s": 0.25, "feed_interval_s": 0.0}
"""No engine waits for publishes; L1 is not asked what is stored."""


def config_for(identity: Identity, settings: Mapping[str, Any]) -> PrefixCacheConfig:
    """The cache of an identity: settings as an engine's own configuration has them, over a TOML file, or DISTPREFIX_*.

    `settings`: fields of PrefixCacheConfig, and ``config``, the path of a TOML file. ``namespace`` is what the name
    begins with, ``kv`` by default; with ``exact_namespace`` it is the name, and another identity there is refused.
    Raises ConfigError for unknown and wrong settings.
    """
    given = dict(settings)
    path, is_exact = given.pop("config", None), bool(given.pop("exact_namespace", False))
    known = {spec.name for spec in fields(PrefixCacheConfig)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise ConfigError(
            f"unknown setting {unknown[0]!r}: there are config, exact_namespace, {', '.join(sorted(known))}"
        )
    said = (settings_of_toml(path) if path else settings_of_environment()) | given
    config = PrefixCacheConfig.from_mapping({**_DEFAULTS, **said, **_merged(identity, said)})
    prefix = config.namespace if "namespace" in said else "kv"
    return config if is_exact else replace(config, namespace=config.identity.namespace(prefix))


def _merged(identity: Identity, said: Mapping[str, Any]) -> dict[str, Any]:
    """The identity's parts as settings: what the engine tells, and what it leaves open as the user says it.

    Of weights the user's word counts. Raises ConfigError where the two differ in anything else.
    """
    merged: dict[str, Any] = {}
    for spec in fields(Identity):
        name = "fingerprint" if spec.name == "other" else spec.name
        told = getattr(identity, spec.name)
        value = said.get(name)
        is_open = not told or name == "weights"
        if value and not is_open and value != told:
            shown = "" if "salt" in name else f": {value!r} and {told!r}"
            raise ConfigError(
                f"{name} differs between the settings and the engine{shown}; leave it out of the settings"
            )
        if name != "chunk_size" or told:
            merged[name] = value if value and is_open else told
    return merged


def completed(config: PrefixCacheConfig, is_cancelled: Callable[[], bool]) -> PrefixCacheConfig | None:
    """The settings with the digest of weights that were left for later, and the namespace's name that follows from it.

    Reads the files. None when cancelled.
    """
    weights = await_weights(config.weights, is_cancelled)
    if not weights:
        return None
    identity = replace(config.identity, weights=weights)
    named = "-" + config.identity.namespace("")
    namespace = config.namespace
    if namespace.endswith(named):  # else the user gave the exact name
        namespace = identity.namespace(namespace.removesuffix(named))
    return replace(config, weights=weights, namespace=namespace)


_warned: set[str | None] = set()
"""Servers that were warned of: an engine has a store for its scheduler and one for each worker."""


class EngineStore:
    """Looks up, loads and stores chains of an engine's block hashes on threads of its own. Thread-safe.

    Redis that cannot be reached is tried again every few seconds, on these threads; until then everything is a miss.
    There is one warning for it, and `counts` has what was not done: ``unavailable``, ``stores_dropped``. The same holds
    while weights are being digested.
    Chunks are named by keyed hashes of the engine's own, so that who reads Redis confirms no guess at a prompt.
    """

    def __init__(self, config: PrefixCacheConfig, *, threads: int = 2, max_waiting_bytes: int = 1 << 30) -> None:
        if config.url is None:
            raise ConfigError("url is None: engines share a Redis, give them its url")
        self.config = config
        self.counts: Counter[str] = Counter()
        self._max_waiting_bytes = max_waiting_bytes
        self._waiting_bytes = 0
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._opened: PrefixCacheOptimizer | None = None
        self._next_try = 0.0
        self._closed = False
        self._preparing: threading.Thread | None = None
        if is_pending(config.weights):
            self._preparing = threading.Thread(target=self._prepare, name="distprefix-weights", daemon=True)
            self._preparing.start()
        self._lookups = ThreadPoolExecutor(1, "distprefix-lookup")
        self._loads = ThreadPoolExecutor(threads, "distprefix-load")
        self._stores = ThreadPoolExecutor(1, "distprefix-store")
        """One thread: what goes behind other chunks of its chain must not overtake them."""

    # What engines call

    def look_up(self, chain: bytes, *, is_counted: bool = True) -> Future[int]:
        """How many leading chunks of a chain, 16 bytes each, can be loaded. One Redis call.

        Not `is_counted`: the engine says with `count_lookup` what it makes of the answer.
        """
        return self._submit(
            self._lookups, lambda cache: cache.find_stored(cache.chain_of_hashes(chain), is_counted=is_counted), 0
        )

    def count_lookup(self, chunks: int, chunks_hit: int) -> None:
        """Count a look-up: chunks that the engine lacked, and those that it takes. Nothing while Redis is absent."""
        cache = self._opened
        if cache is not None:
            cache.count_lookup(chunks, chunks_hit)

    def load(self, chain: bytes, into: Sequence[Buffer], first: int) -> Future[int]:
        """Load chunks from `first` on into buffers. How many of them are good, from the first on.

        The look-up before it, in whichever process, counted as the hit.
        """

        def work(cache: PrefixCacheOptimizer) -> int:
            loaded = cache.load(cache.chain_of_hashes(chain), into, first=first, was_looked_up=True).chunks
            self._count("chunks_loaded", loaded)
            return loaded

        return self._submit(self._loads, work, 0)

    def store(self, chain: bytes, payloads: Sequence[Buffer], first: int) -> Future[int]:
        """Store chunks from `first` on; those before have to be there. How many leading chunks of the chain are then.

        While too many bytes wait already, nothing is stored, and it is counted.
        """
        return self.store_later(chain, len(payloads), size_of(payloads), lambda: payloads, first)

    def store_later(
        self, chain: bytes, count: int, size: int, payloads: Callable[[], Sequence[Buffer]], first: int
    ) -> Future[int]:
        """As `store`, for payloads that are made when it is their turn: so many, and so many bytes in all."""

        def work(cache: PrefixCacheOptimizer) -> int:
            stored = 0
            try:
                stored = cache.store(cache.chain_of_hashes(chain), [*([None] * first), *payloads()])
            finally:
                self._count("stores_dropped", min(count, max(0, first + count - stored)))
            return stored

        return self._store(work, count, size, 0)

    # Chunks that are wanted without those before them, as of a sliding window: chains of one chunk each

    def look_up_each(self, hashes: bytes) -> Future[list[bool]]:
        """Which chunks can be loaded, each by itself. One Redis call for 500."""
        none = [False] * (len(hashes) // HASH_BYTES)
        return self._submit(
            self._lookups,
            lambda cache: [*map(bool, cache.find_stored_batch(each_chunk(cache, hashes), as_one=True))],
            none,
        )

    def load_each(self, hashes: bytes, into: Sequence[Buffer]) -> Future[list[bool]]:
        """Load chunks, each by itself. Which of them are good."""

        def work(cache: PrefixCacheOptimizer) -> list[bool]:
            good = load_alone(cache, hashes, into)
            self._count("chunks_loaded", sum(good))
            return good

        return self._submit(self._loads, work, [False] * len(into))

    def store_each(self, hashes: bytes, payloads: Sequence[Buffer]) -> Future[list[bool]]:
        """Store chunks, each by itself. Which of them are there then; none while too many bytes wait already."""

        def work(cache: PrefixCacheOptimizer) -> list[bool]:
            good = store_alone(cache, hashes, payloads)
            self._count("stores_dropped", good.count(False))
            return good

        return self._store(work, len(payloads), size_of(payloads), [False] * len(payloads))

    def metrics(self) -> dict[str, Any]:
        """What happened so far, the cache's own metrics included. No Redis call."""
        cache = self._opened
        return {**(cache.get_metrics() if cache else {}), **self.counts, "connected": int(cache is not None)}

    def close(self) -> None:
        """Finish what was begun, drop what was not, and close."""
        self._closed = True
        for pool in (self._lookups, self._loads, self._stores):
            pool.shutdown(wait=True, cancel_futures=True)
        if self._preparing is not None:
            self._preparing.join()
        with self._opening:
            if self._opened is not None:
                self._opened.close()
                self._opened = None

    # On the threads

    def has_room(self, count: int, size: int) -> bool:
        """Whether so many bytes may wait to be stored now; their chunks are counted as dropped if not."""
        return self._reserve(count, size, 0)

    def _reserve(self, count: int, size: int, taken: int) -> bool:
        """As `has_room`; so many of the bytes wait from now on, if they may."""
        with self._lock:
            if self._waiting_bytes and self._waiting_bytes + size > self._max_waiting_bytes:
                self.counts["stores_dropped"] += count
                return False
            self._waiting_bytes += taken
        return True

    def _store(self, work: Callable[[PrefixCacheOptimizer], T], count: int, size: int, otherwise: T) -> Future[T]:
        if not self._reserve(count, size, size):
            return _done(otherwise)
        future = self._submit(self._stores, work, otherwise)
        future.add_done_callback(lambda _: self._add_waiting(-size))
        return future

    def _submit(self, pool: ThreadPoolExecutor, work: Callable[[PrefixCacheOptimizer], T], otherwise: T) -> Future[T]:
        def run() -> T:
            try:
                cache = self._cache()
                if cache is not None:
                    return work(cache)
                self._count("unavailable", 1)
            except DistPrefixError as error:
                self._count("unavailable", 1)
                self._warn(error)
            except Exception:  # noqa: BLE001 - an engine must go on, whatever we met
                self._count("errors", 1)
                _log.exception("a cache operation of an engine failed")
            return otherwise

        try:
            return pool.submit(run)
        except RuntimeError:  # closed
            return _done(otherwise)

    def _cache(self) -> PrefixCacheOptimizer | None:
        """The cache, opened with the first use; None while Redis cannot be reached, or refuses."""
        if is_pending(self.config.weights):
            return None
        with self._opening:
            if self._opened is None and not self._closed and time.monotonic() >= self._next_try:
                try:
                    self._opened = PrefixCacheOptimizer(self.config)
                    _log.info("KV is shared in namespace %s by %s", self.config.namespace, self._opened.config.holder)
                except (ConfigError, UnavailableError, NamespaceError) as error:
                    self._next_try = time.monotonic() + _REOPEN_S
                    self._warn(error)
            return self._opened

    def _prepare(self) -> None:
        """Digest the weights; until then the engine goes on without a cache."""
        try:
            config = completed(self.config, lambda: self._closed)
        except OSError as error:
            self._warn(ConfigError(f"the model's weights cannot be read: {error}"))
            return
        if config is not None:
            self.config = config

    def _warn(self, error: Exception) -> None:
        """Once a process and server: an engine that goes on without a cache needs no second line."""
        if self.config.url not in _warned:
            _warned.add(self.config.url)
            _log.warning("KV is not shared for now, the engine goes on without: %s", error)

    def _count(self, name: str, count: int) -> None:
        with self._lock:
            self.counts[name] += count

    def _add_waiting(self, size: int) -> None:
        with self._lock:
            self._waiting_bytes += size


def each_chunk(cache: PrefixCacheOptimizer, hashes: bytes) -> list[Chain]:
    """Every chunk as a chain of its own, under a name of its own: a chunk that is also in a longer one is there twice.

    A node, a junction and a payload are named by a chunk, so two chains cannot both have it at different depths.
    """
    chunks = (hashes[at : at + HASH_BYTES] for at in range(0, len(hashes), HASH_BYTES))
    return [cache.chain_of_hashes(chunk, _ALONE) for chunk in chunks]


def load_alone(
    cache: PrefixCacheOptimizer, hashes: bytes, into: Sequence[Buffer], *, continues: bool = False
) -> list[bool]:
    """Load chunks that are each a chain of its own. Which of them are good. `continues`: as of `load_batch`."""
    wanted = [(chunk, [target]) for chunk, target in zip(each_chunk(cache, hashes), into, strict=True)]
    found = cache.load_batch(wanted, as_one=True, continues=continues, was_looked_up=True)
    return [bool(loaded.chunks) for loaded in found]


def store_alone(cache: PrefixCacheOptimizer, hashes: bytes, payloads: Sequence[Buffer]) -> list[bool]:
    """Store chunks, each as a chain of its own. Which of them are there then."""
    wanted = [(chunk, [payload]) for chunk, payload in zip(each_chunk(cache, hashes), payloads, strict=True)]
    return [bool(stored) for stored in cache.store_batch(wanted)]


def size_of(payloads: Sequence[Buffer]) -> int:
    """Bytes of all of them."""
    return sum(memoryview(payload).nbytes for payload in payloads)


def rest(futures: Iterable[Future[Any]]) -> None:
    """Let the threads work while an engine has nothing to compute: its loop would hold Python's lock against them."""
    wait(futures, timeout=REST_S, return_when=FIRST_COMPLETED)


def _done(value: T) -> Future[T]:
    future: Future[T] = Future()
    future.set_result(value)
    return future
