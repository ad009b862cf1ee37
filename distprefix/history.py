"""What a shard has acknowledged to this process: how a server that lost some of it is found out. Pure.

Every reply says of which generation the shard is, and how many of this worker's writes it has. Nobody else adds to that
number, so writes of others cannot hide that some of ours are missing, however many come after a restore.
"""

from __future__ import annotations

import threading
from enum import StrEnum

__all__ = ["History", "Loss"]


class Loss(StrEnum):
    """How it shows that history was lost."""

    GONE = "gone"
    """The namespace is not there: it was flushed, or the server came back empty."""
    GENERATION = "generation"
    """The shard is another one: it was made anew, or an operator said that it was restored."""
    POSITION = "position"
    """The shard has fewer of this worker's writes than it acknowledged."""


class History:
    """What was acknowledged under one epoch of this worker. Thread-safe."""

    def __init__(self, generation: bytes = b"", epoch: int = 0) -> None:
        self.generation = generation
        self.epoch = epoch
        self.acked = 0
        """How many of this worker's writes the shard has, by the highest reply."""
        self.is_lost = False
        """Whether the shard lost some of it: then all that was published under this epoch counts for nothing."""
        self._lock = threading.RLock()  # a signal handler may close the cache in the middle of a call

    def check(self, acked_before: int, generation: bytes, position: int) -> Loss | None:
        """Take note of a reply to a call that was sent when `acked_before` writes were acknowledged.

        Returns what the reply shows to be lost. Replies overtake each other, so it is compared with what was known when
        the call was sent.
        """
        if generation != self.generation:
            return Loss.GENERATION
        if position < acked_before:
            return Loss.POSITION
        if position > self.acked:
            with self._lock:
                self.acked = max(self.acked, position)
        return None

    def lose(self) -> bool:
        """History is lost. True for the one who says so first."""
        with self._lock:
            is_first = not self.is_lost
            self.is_lost = True
        return is_first
