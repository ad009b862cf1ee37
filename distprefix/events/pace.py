"""How often something may be done: several times at once, and then at a steady rate."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["Pace"]


class Pace:
    """A token bucket of `burst` tokens, which `per_s` a second fill again. Not thread-safe."""

    def __init__(self, burst: int, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._burst = burst
        self._per_s = per_s
        self._clock = clock
        self._left = float(burst)
        self._at = clock()

    @property
    def is_open(self) -> bool:
        """Whether it may be done now."""
        now = self._clock()
        self._left = min(self._burst, self._left + (now - self._at) * self._per_s)
        self._at = now
        return self._left >= 1.0

    def spend(self) -> None:
        """It is done now, allowed or not."""
        self._left = max(0.0, self._left - 1.0)

    def take(self) -> bool:
        """Whether it may be done now; then it counts as done."""
        if not self.is_open:
            return False
        self.spend()
        return True
