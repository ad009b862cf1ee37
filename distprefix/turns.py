"""Whose turn it is, among threads that wait for one another until a deadline. Pure but for a lock."""

from __future__ import annotations

import threading
import time

__all__ = ["Turn"]

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.0002, 0.005


class Turn:
    """One thread at a time, and a deadline for the others.

    A lock that is acquired with a time-out stays taken for ever when a signal handler raises between `acquire` and the
    `try` after it. A turn is taken within `try`, under an object of the caller's own, and given back by what no signal
    interrupts, an assignment::

        me = object()
        try:
            if turn.take(me, deadline):
                ...
        finally:
            if turn.holder is me:
                turn.holder = None
    """

    def __init__(self) -> None:
        self.holder: object | None = None
        """Who has the turn."""
        self._lock = threading.RLock()  # a signal handler may close the cache in the middle of a call

    def take(self, me: object, deadline: float) -> bool:
        """Whether the turn is the caller's before `deadline` (time.monotonic)."""
        pause = _FIRST_PAUSE_S
        while True:
            with self._lock:
                if self.holder is None:
                    self.holder = me
                    return True
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE_S)

    def wait(self) -> None:
        """Until nothing holds the turn; who holds it has a deadline."""
        while self.holder is not None:
            time.sleep(_FIRST_PAUSE_S)
