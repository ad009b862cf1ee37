"""What a shard has acknowledged to this process: how a server that lost some of it is found out. Pure.

Every reply says of which generation the shard is, and how many writes of this worker under this epoch it has. No other
process adds to that number, and no epoch is given twice: writes that come after a restore, of others or of this worker,
cannot hide that some are missing.
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
    EPOCH = "epoch"
    """The server does not know this worker's epoch."""
    POSITION = "position"
    """The shard has fewer of this worker's writes than it acknowledged."""


class History:
    """What was acknowledged under one epoch of this worker. Thread-safe."""

    def __init__(self, generation: bytes = b"", epoch: int = 0, header: bytes = b"") -> None:
        self.generation = generation
        self.epoch = epoch
        self.header = header
        """What scripts are told of the caller: schema, epoch and member."""
        self.acked = 0
        """How many writes under this epoch the shard has, by the highest reply."""
        self.is_lost = False
        """Whether the shard lost some of it: then all that was published under this epoch counts for nothing."""
        self._lock = threading.RLock()  # a signal handler may close the cache in the middle of a call

    def check(self, acked: int, generation: bytes, had: int, has: int) -> Loss | None:
        """Take note of a reply to a call that was sent when `acked` writes were acknowledged.

        `had`, `has`: how many writes under this epoch the shard had before the call, and has now; negative where a
        newer process has this worker's name: then nothing is said. Returns what the reply shows to be lost. Replies
        overtake each other, so it is compared with what was known when the call was sent.
        """
        if generation != self.generation:
            return Loss.GENERATION
        if 0 <= had < acked:
            return Loss.POSITION
        if has > self.acked:
            with self._lock:
                self.acked = max(self.acked, has)
        return None

    def lose(self) -> bool:
        """History is lost. True for the one who says so first."""
        with self._lock:
            is_first = not self.is_lost
            self.is_lost = True
        return is_first
