"""Places in Redis that cannot be as they are: passed over, counted, and said once in a process."""

from __future__ import annotations

import logging

__all__ = ["Damage", "Progress"]

_log = logging.getLogger("distprefix")
_warned = False


class Damage:
    """How many such places one cache has met. A place that is met again counts again."""

    def __init__(self) -> None:
        self.count = 0

    def note(self, places: int = 1) -> None:
        """Count places. The first ones in this process are logged, with what to do."""
        global _warned  # noqa: PLW0603 - one word a process, however many caches and look-ups meet the place
        self.count += places
        if places and not _warned:
            _warned = True
            _log.warning(
                "the tree in Redis has places that cannot be as they are, as a damaged server or a foreign writer "
                "leaves them. They are passed over and counted in tree_damaged; `distprefix maintain --repair` finds "
                "and removes them. Said once in a process"
            )


class Progress:
    """Whether calls that resume one another get on, however many they are: a place that comes again is a circle.

    Remembers one place (Brent's algorithm), so that the longest chain of calls takes no more memory than the first.
    """

    def __init__(self) -> None:
        self._seen: object = None
        self._steps = 0
        self._power = 1

    def goes_on(self, place: object, *, has_changed: bool = False) -> bool:
        """Whether the next call may be sent from `place`. What changed something got on, wherever it is."""
        if has_changed:
            self._seen = None
            self._steps = 0
            self._power = 1
        if place == self._seen:
            return False
        self._steps += 1
        if self._steps >= self._power:
            self._seen = place
            self._steps = 0
            self._power *= 2
        return True
