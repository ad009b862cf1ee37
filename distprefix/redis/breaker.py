"""A circuit breaker: after failures in a row nobody asks for a while, then one caller probes. Pure but for a lock."""

from __future__ import annotations

import threading
from collections.abc import Callable
from enum import StrEnum

__all__ = ["Breaker", "BreakerState"]

_LONGEST_RESET_S = 30.0


class BreakerState(StrEnum):
    """Whether calls go through."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half-open"


class Breaker:
    """Thread-safe. `clock` gives monotonic seconds, `jitter` a factor around 1 that spreads the probes of a fleet."""

    def __init__(self, failures: int, reset_s: float, clock: Callable[[], float], jitter: Callable[[], float]) -> None:
        self._limit = failures
        self._first_reset_s = self._reset_s = reset_s
        self._clock = clock
        self._jitter = jitter
        self._lock = threading.RLock()  # a signal handler may close the cache in the middle of a call
        self._failed = 0
        self._retry_at = 0.0
        self.state = BreakerState.CLOSED
        self.opened = 0
        """How many times it opened."""

    def allow(self) -> bool:
        """Whether the caller may ask; exactly one gets True when a probe is due, and reports how it went."""
        if self.state is BreakerState.CLOSED:
            return True
        with self._lock:
            if self._clock() < self._retry_at:
                return False
            self.state = BreakerState.HALF_OPEN
            self._retry_at = self._clock() + self._reset_s  # a prober that never reports does not block for ever
            return True

    def succeed(self) -> None:
        """A call went well."""
        if self._failed or self.state is not BreakerState.CLOSED:
            with self._lock:
                self.state = BreakerState.CLOSED
                self._failed = 0
                self._reset_s = self._first_reset_s

    def fail(self) -> None:
        """A call failed."""
        with self._lock:
            self._failed += 1
            if self.state is BreakerState.HALF_OPEN:
                self._reset_s = min(self._reset_s * 2, _LONGEST_RESET_S)
            elif self._failed < self._limit:
                return
            if self.state is not BreakerState.OPEN:
                self.opened += 1
            self.state = BreakerState.OPEN
            self._retry_at = self._clock() + self._reset_s * self._jitter()
