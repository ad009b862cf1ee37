"""What Redis has not heard of yet: hits that L1 answered, and coverage to take back. Sent in the background."""

from __future__ import annotations

import threading
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

    def send_retractions(self) -> bool:
        """Whether Redis has taken all of them. One Redis call each. Never raises."""
        with self._sending:
            while self.retractions:
                chain = self.retractions[0]
                try:
                    self._link.publish(operations.trim(chain, self._holder, self._link.epoch))
                except NotAttachedError:
                    self.retractions.clear()  # flushed: there is nothing left to take back
                except DistPrefixError:
                    return False
                else:
                    self.retractions.popleft()
            return True

    def send(self) -> None:
        """Send all there is. Never raises."""
        self.send_retractions()
        batch = self.touches.take()
        if batch:
            try:
                self._link.publish(operations.touch(batch))
            except DistPrefixError:
                self.touches.dropped += len(batch)
