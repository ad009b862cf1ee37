"""What SGLang's storage needs beside chains: keys that stand alone, and emptying everything."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, TimeoutError  # noqa: A004 - the same one since Python 3.11
from typing import TypeVar

from distprefix.chunking import HASH_BYTES, Chain
from distprefix.engines.store import EngineStore
from distprefix.optimizer import PrefixCacheOptimizer
from distprefix.redis.transfers import Buffer

__all__ = ["PoolStore", "settled"]

T = TypeVar("T")
_CLEAR_S = 60.0


class PoolStore(EngineStore):
    """A host pool's store. Pages behind a hole, as of a sliding window, are chains of one page each."""

    def find_each(self, hashes: bytes) -> Future[set[int]]:
        """Which of these pages can be loaded, each by itself; the last first, as far as a look-up's time goes.

        One Redis call for each.
        """

        def work(cache: PrefixCacheOptimizer) -> set[int]:
            deadline, found = time.monotonic() + self.config.lookup_timeout_s, set[int]()
            for at in range(len(hashes) - HASH_BYTES, -1, -HASH_BYTES):
                if time.monotonic() > deadline:
                    break
                if cache.find_stored(Chain.packed(hashes[at : at + HASH_BYTES])):
                    found.add(at // HASH_BYTES)
            return found

        return self._submit(self._lookups, work, set())

    def load_each(self, hashes: bytes, into: Sequence[Buffer]) -> Future[list[bool]]:
        """Load pages, each by itself. Which of them are good."""

        def work(cache: PrefixCacheOptimizer) -> list[bool]:
            wanted = [(chain, [target]) for chain, target in zip(_each(hashes), into, strict=True)]
            return [bool(loaded.chunks) for loaded in cache.load_batch(wanted)]

        return self._submit(self._loads, work, [False] * len(into))

    def store_each(self, hashes: bytes, payloads: Sequence[Buffer]) -> Future[list[bool]]:
        """Store pages, each by itself. Which of them are there then."""

        def work(cache: PrefixCacheOptimizer) -> list[bool]:
            wanted = [(chain, [payload]) for chain, payload in zip(_each(hashes), payloads, strict=True)]
            return [bool(stored) for stored in cache.store_batch(wanted)]

        return self._submit(self._stores, work, [False] * len(payloads))

    def open(self) -> Future[bool]:
        """Connect now, so that what is wrong is said at the start."""
        return self._submit(self._lookups, lambda _: True, otherwise=False)

    def clear(self) -> bool:
        """Empty the namespace, for everybody. Whether that was done."""

        def work(cache: PrefixCacheOptimizer) -> bool:
            cache.clear()
            return True

        return settled(self._submit(self._stores, work, otherwise=False), _CLEAR_S, False)


def settled(future: Future[T], timeout_s: float, otherwise: T, *, holds_buffers: bool = False) -> T:
    """What came of it by then, else `otherwise`.

    Who gave buffers gets them back only when nothing touches them any more: what has begun is awaited, and that ends
    by the cache's own deadlines.
    """
    try:
        return future.result(timeout_s)
    except TimeoutError:
        if future.cancel() or not holds_buffers:
            return otherwise
        return future.result()


def _each(hashes: bytes) -> list[Chain]:
    return [Chain.packed(hashes[at : at + HASH_BYTES]) for at in range(0, len(hashes), HASH_BYTES)]
