"""What SGLang's storage needs of a store besides: to connect at once, to empty everything, to wait for what comes."""

from __future__ import annotations

from concurrent.futures import Future, TimeoutError  # noqa: A004 - the same one since Python 3.11
from typing import TypeVar

from distprefix.engines.store import EngineStore
from distprefix.optimizer import PrefixCacheOptimizer

__all__ = ["PoolStore", "settled"]

T = TypeVar("T")
_CLEAR_S = 60.0


class PoolStore(EngineStore):
    """A host pool's store."""

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
