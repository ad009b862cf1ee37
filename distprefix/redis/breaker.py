"""Circuit breakers: after failures in a row no call is sent for a while, then one caller probes. Pure but for a lock.

What fails is what is off: a server that refuses or delays writes still answers reads, so each has a breaker of its own.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Breaker", "BreakerState", "Breakers", "new_breakers"]

_MAX_RESET_S = 5.0
"""A server that is well again is used again within seconds; a probe so often costs it nothing."""
_NEVER = 1 << 30


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

    @property
    def is_closed(self) -> bool:
        """Whether calls go through without a probe."""
        return self.state is BreakerState.CLOSED

    def succeed(self) -> None:
        """A call went well."""
        if self._failed or self.state is not BreakerState.CLOSED:
            with self._lock:
                self.state = BreakerState.CLOSED
                self._failed = 0
                self._reset_s = self._first_reset_s

    def fail(self, *, at_once: bool = False) -> None:
        """A call failed; `at_once` opens without waiting for more failures, as each would cost a whole deadline."""
        if self._limit >= _NEVER:
            return
        with self._lock:
            self._failed += self._limit if at_once else 1
            if self.state is BreakerState.HALF_OPEN:
                self._reset_s = max(self._first_reset_s, min(self._reset_s * 2, _MAX_RESET_S))
            elif self._failed < self._limit:
                return
            if self.state is not BreakerState.OPEN:
                self.opened += 1
            self.state = BreakerState.OPEN
            self._retry_at = self._clock() + self._reset_s * self._jitter()


@dataclass(frozen=True, slots=True)
class Breakers:
    """One breaker for what reads and one for what writes, of one server."""

    reads: Breaker
    writes: Breaker

    def of(self, *, reads: bool) -> Breaker:
        """The one that a call of this kind goes through."""
        return self.reads if reads else self.writes

    @property
    def opened(self) -> int:
        """How many times either opened."""
        return self.reads.opened + self.writes.opened


def new_breakers(failures: int = _NEVER, reset_s: float = 1.0) -> Breakers:
    """Breakers on the real clock, with probes spread by a quarter; by default they never open."""
    spread = random.Random()  # noqa: S311 - not for secrets

    def new() -> Breaker:
        return Breaker(failures, reset_s, time.monotonic, lambda: spread.uniform(0.75, 1.25))

    return Breakers(new(), new())
