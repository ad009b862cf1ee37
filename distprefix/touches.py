"""Uses that Redis has not been sent yet. They go in batches, in the background, so that a request costs no call."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from distprefix.chunking import HASH_BYTES
from distprefix.l1 import Node

__all__ = ["Touches"]

_MAX_PATHS = 20_000


@dataclass(slots=True)
class _Use:
    """Uses of a path: of a node and of all its ancestors."""

    heads: tuple[bytes, ...]
    """From the root to the node."""
    hits: int
    used: float
    """When it was used last (time.monotonic)."""


class Touches:
    """Hits and last use by path. A use of a node is a use of every chunk that precedes it. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # a signal handler may close the cache in the middle of a call
        self._uses: dict[bytes | tuple[bytes, ...], _Use] = {}
        """By the last node of a path that L1 knows, else by all heads of the path: one node may end several paths."""
        self.dropped = 0
        """Paths and nodes whose uses were lost, because too many waited or Redis failed."""

    def add(self, path: Sequence[Node]) -> None:
        """Record a hit of a path that begins at a root, as far as Redis has its nodes."""
        last = path[-1].value
        head = last.head if last is not None else b""
        if not head:  # not published yet: the use is one of what precedes it
            heads = _heads_of(path)
            if not heads:
                return
            head = heads[-1]
        now = time.monotonic()
        with self._lock:
            known = self._uses.get(head)
            if known is not None:
                known.hits += 1
                known.used = now
                return
        self._add(head, _heads_of(path), 1, now)

    def add_chunks(self, chain: bytes, starts: Sequence[int], hits: int = 1) -> None:
        """Record uses of the nodes that begin at these chunks of a chain; 0 hits move the last use alone."""
        if starts:
            heads = tuple(chain[start * HASH_BYTES : (start + 1) * HASH_BYTES] for start in starts)
            self._add(heads, heads, hits, time.monotonic())

    def add_node(self, head: bytes) -> None:
        """Record a hit of one node, whose path is not known."""
        if head:
            self._add((head,), (head,), 1, time.monotonic())

    def take(self) -> list[tuple[bytes, int, int]]:
        """All of them, as (head, hits, ms since the last use), each node once; they are the caller's now."""
        with self._lock:
            taken = self._uses
            self._uses = {}
        hits: dict[bytes, int] = {}
        used: dict[bytes, float] = {}
        for use in taken.values():
            for head in use.heads:
                hits[head] = hits.get(head, 0) + use.hits
                used[head] = max(used.get(head, 0.0), use.used)
        now = time.monotonic()
        return [(head, count, int(1000 * (now - used[head]))) for head, count in hits.items()]

    def _add(self, key: bytes | tuple[bytes, ...], heads: tuple[bytes, ...], hits: int, used: float) -> None:
        with self._lock:
            known = self._uses.get(key)
            if known is not None:
                known.heads = heads  # nodes may have been split since
                known.hits += hits
                known.used = used
            elif len(self._uses) < _MAX_PATHS:
                self._uses[key] = _Use(heads, hits, used)
            else:
                self.dropped += 1


def _heads_of(path: Sequence[Node]) -> tuple[bytes, ...]:
    """Heads of the nodes in Redis that the nodes of L1 are parts of: several parts may belong to one."""
    return tuple(dict.fromkeys(node.value.head for node in path if node.value is not None and node.value.head))
