"""Events that name a block before it was told of: they wait, in order, until it is. Pure."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from distprefix.events.frames import Removed, Stored

__all__ = ["Parking"]

_EVENT_BYTES = 500
_KEY_BYTES = 150
"""With its entry among the places."""
_TEXT_BYTES = 50


class Parking:
    """Bounded in blocks and bytes; what waits longest is dropped first, and is counted as `parked_dropped`.

    An event that is larger than all that may wait is dropped at once, and nothing for it.
    """

    def __init__(self, max_blocks: int, counts: Counter[str], max_bytes: int = 128 << 20) -> None:
        self.blocks = 0
        self.bytes = 0
        self._max_blocks = max_blocks
        self._max_bytes = max_bytes
        self._counts = counts
        self._waiting: OrderedDict[int, list[Stored | Removed]] = OrderedDict()
        """By the block that they wait for; longest waiting first."""
        self._place: dict[int, int] = {}
        """Block that waits to the one that it waits for."""

    def park(self, event: Stored) -> None:
        """Keep blocks whose parent is unknown."""
        if event.parent is None:
            return
        if len(event.keys) > self._max_blocks or _bytes_of(event) > self._max_bytes:
            self._counts["parked_dropped"] += len(event.keys)
            return
        for key in event.keys:
            self._place.setdefault(key, event.parent)
        self._add(event.parent, event)  # last: it may be dropped at once, and its places with it

    def remove(self, key: int, event: Removed) -> bool:
        """Whether the block waits: then its removal waits behind it."""
        parent = self._place.get(key)
        if parent is None:
            return False
        self._add(parent, event._replace(keys=(key,)))
        return True

    def take(self, keys: Iterable[int]) -> list[Stored | Removed]:
        """What waited for these blocks, in the order in which it came for each."""
        taken: list[Stored | Removed] = []
        for key in keys:
            events = self._waiting.pop(key, None)
            if events:
                self._free(events)
                taken += events
        return taken

    def void(self, medium: str) -> None:
        """What waits to be held there does not wait any more; it is counted."""
        for parent, events in list(self._waiting.items()):
            dropped = [event for event in events if event.medium == medium]
            if not dropped:
                continue
            self._free(events)
            self._counts["parked_dropped"] += sum(len(event.keys) for event in dropped)
            del self._waiting[parent]
            for event in events:
                if event.medium != medium:
                    for key in event.keys:
                        self._place.setdefault(key, parent)
                    self._add(parent, event)

    def clear(self) -> None:
        """Nothing waits any more."""
        self.blocks = 0
        self.bytes = 0
        self._waiting.clear()
        self._place.clear()

    def _add(self, parent: int, event: Stored | Removed) -> None:
        self._waiting.setdefault(parent, []).append(event)
        self.blocks += len(event.keys)
        self.bytes += _bytes_of(event)
        while self.blocks > self._max_blocks or self.bytes > self._max_bytes:
            _, events = self._waiting.popitem(last=False)
            self._free(events)
            self._counts["parked_dropped"] += sum(len(dropped.keys) for dropped in events)

    def _free(self, events: list[Stored | Removed]) -> None:
        for event in events:
            self.blocks -= len(event.keys)
            self.bytes -= _bytes_of(event)
            for key in event.keys:
                self._place.pop(key, None)


def _bytes_of(event: Stored | Removed) -> int:
    """What it takes in memory, about."""
    size = _EVENT_BYTES + _KEY_BYTES * len(event.keys)
    if isinstance(event, Stored):
        size += len(event.tokens) + sum(map(len, event.extras)) + sum(map(len, event.names))
        size += _TEXT_BYTES * (len(event.extras) + len(event.names))
    return size
