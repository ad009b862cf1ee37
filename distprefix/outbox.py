"""What Redis has not heard of yet: hits that L1 answered, and coverage to take back. Sent in the background."""

from __future__ import annotations

import threading
import time
from collections import deque

from distprefix import operations
from distprefix.errors import DistPrefixError, NotAttachedError
from distprefix.redis.link import Link
from distprefix.touches import Touches

__all__ = ["Outbox"]


class Outbox:
    """Touches are sent once and may be lost; retractions are kept until Redis has taken them. Thread-safe."""

    def __init__(self, link: Link, holder: str) -> None:
        self.touches = Touches()
        self.retractions: deque[bytes] = deque()
        """Chains whose last chunk the holder no longer has, oldest first."""
        self._link = link
        self._holder = holder
        self._sending = threading.Lock()

    def send_retractions(self, deadline: float) -> bool:
        """Whether Redis has taken all of them by `deadline`; the rest waits. One Redis call each. Never raises."""
        if not self._sending.acquire(timeout=max(0.0, deadline - time.monotonic())):
            return False
        try:
            while self.retractions:
                chain = self.retractions[0]
                self._link.publish(operations.trim(chain, self._holder, self._link.epoch), deadline)
                self.retractions.popleft()
        except NotAttachedError:
            self.retractions.clear()  # flushed: there is nothing left to take back
        except DistPrefixError:
            return False
        finally:
            self._sending.release()
        return True

    def send(self) -> None:
        """Send all there is, each kind within the deadline of a publish. Never raises."""
        self.send_retractions(self._link.publish_deadline())
        batch = self.touches.take()
        if batch:
            try:
                self._link.publish(operations.touch(batch), self._link.publish_deadline())
            except DistPrefixError:
                self.touches.dropped += len(batch)
