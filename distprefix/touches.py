"""Hits that Redis has not heard of yet. They go in batches, in the background, so that look-ups stay one call."""

from __future__ import annotations

import threading
import time

__all__ = ["Touches"]

_MOST_NODES = 20_000


class Touches:
    """Hits and last use by node head. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may close the cache in the middle of a call
        self._hits: dict[bytes, tuple[int, int]] = {}
        self.dropped = 0
        """Nodes whose touches were lost, because too many waited or Redis failed."""

    def add(self, head: bytes) -> None:
        """The node was used just now."""
        if not head:
            return
        with self._lock:
            known = self._hits.get(head)
            if known is None and len(self._hits) >= _MOST_NODES:
                self.dropped += 1
                return
            self._hits[head] = (known[0] + 1 if known else 1, int(time.time() * 1000))

    def take(self) -> list[tuple[bytes, int, int]]:
        """All of them, as (head, hits, last use in ms); they are the caller's now."""
        with self._lock:
            taken, self._hits = self._hits, {}
        return [(head, hits, used) for head, (hits, used) in taken.items()]
