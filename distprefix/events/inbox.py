"""What arrived from an engine and was not asked for yet, bounded in bytes. Pure."""

from __future__ import annotations

from collections import Counter, deque
from typing import NamedTuple

from distprefix.events.frames import Frame

__all__ = ["Arrival", "Connected", "Disconnected", "Inbox"]

_FRAME_BYTES = 200
"""What a frame takes besides its payload."""
_MAX_NOTICES = 2


class Connected(NamedTuple):
    """The engine's publisher is there, for the first time or again, or messages were dropped: what it sent is lost."""


class Disconnected(NamedTuple):
    """The engine's publisher is gone, or does not even answer ZMQ's own heartbeats."""


Arrival = Frame | Connected | Disconnected


class Inbox:
    """A queue of arrivals. Not thread-safe.

    Beyond `max_bytes` frames are dropped and counted as "queue"; a Connected takes their place.
    """

    def __init__(self, max_bytes: int, dropped: Counter[str]) -> None:
        self.bytes = 0
        self._max_bytes = max_bytes
        self._dropped = dropped
        self._waiting: deque[Arrival] = deque()
        self._notices = 0
        """How many arrivals at the end are no frames."""

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, arrived: list[Arrival]) -> None:
        """Append arrivals, as far as there is room for them."""
        for each in arrived:
            if not isinstance(each, Frame):
                self._notify(each)
                continue
            size = len(each.payload) + _FRAME_BYTES
            if self.bytes + size > self._max_bytes and self._waiting:
                self._dropped["queue"] += 1
                if not self._notices:
                    self._notify(Connected())
                continue
            self.bytes += size
            self._notices = 0
            self._waiting.append(each)

    def take(self, count: int, max_bytes: int) -> list[Arrival]:
        """The next arrivals: at most so many, and one frame more than so many bytes."""
        taken: list[Arrival] = []
        size = 0
        while self._waiting and len(taken) < count and size <= max_bytes:
            each = self._waiting.popleft()
            taken.append(each)
            if isinstance(each, Frame):
                size += len(each.payload)
                self.bytes -= len(each.payload) + _FRAME_BYTES
        self._notices = min(self._notices, len(self._waiting))
        return taken

    def _notify(self, notice: Connected | Disconnected) -> None:
        """Append a notice. Where many follow each other, as in a storm of connections, the last two say it all."""
        if self._notices == _MAX_NOTICES:
            last = self._waiting.pop()
            self._waiting.pop()
            self._waiting.append(last)
            self._notices -= 1
        self._waiting.append(notice)
        self._notices += 1
