"""What Redis has not heard of yet: hits that L1 answered, and coverage to take back. Sent in the background."""

from __future__ import annotations

from collections import deque

from distprefix import operations
from distprefix.config import PrefixCacheConfig
from distprefix.errors import DamagedNodeError, DistPrefixError, NotAttachedError, StaleEpochError
from distprefix.redis.link import Link
from distprefix.touches import Touches
from distprefix.turns import Turn

__all__ = ["Outbox"]

_MOST_RETRACTIONS = 10_000


class Outbox:
    """Touches are sent once and may be lost; retractions are kept until Redis has taken them. Thread-safe.

    More retractions than can be kept void everything at once instead: the worker takes a new epoch.
    """

    def __init__(self, link: Link, config: PrefixCacheConfig) -> None:
        self.touches = Touches()
        self.retractions_refused = 0
        """Taken back in vain: the node in Redis is damaged, or a newer process has this worker's id."""
        self.retractions_overrun = 0
        """How often so many waited that a new epoch was taken instead."""
        self._retractions: deque[bytes] = deque()
        self._link = link
        self._holder = config.holder
        self._candidate_hits = config.prewarm_threshold if config.enable_prewarm else 0
        self._sending = Turn()

    @property
    def waiting(self) -> int:
        """Retractions that Redis has not taken yet."""
        return len(self._retractions)

    def retract(self, chain: bytes) -> None:
        """The holder no longer has the chain's last chunk, nor what lies behind it. Sent later."""
        self._retractions.append(chain)
        if len(self._retractions) > _MOST_RETRACTIONS:
            self._link.detach()  # first: an interrupt before it must leave the retractions where they are
            self.retractions_overrun += 1
            self._retractions.clear()

    def send_retractions(self, deadline: float) -> bool:
        """Whether Redis has taken all of them by `deadline`; the rest waits. One Redis call each. Never raises."""
        if not self._retractions:
            return True
        me = object()
        try:
            if not self._sending.take(me, deadline):
                return False
            while self._retractions:
                chain = self._retractions[0]
                self._send(chain, deadline)
                if self._retractions and self._retractions[0] is chain:  # else given up meanwhile, for a new epoch
                    self._retractions.popleft()
        except IndexError:
            return True
        except NotAttachedError:
            self._retractions.clear()  # flushed: there is nothing left to take back
        except DistPrefixError:
            return False
        finally:
            if self._sending.holder is me:
                self._sending.holder = None
        return True

    def void(self) -> None:
        """Forget the retractions: the epoch that they are of is void, or about to be."""
        self._retractions.clear()

    def send(self) -> None:
        """Send all there is, each kind within the deadline of a publish. Never raises."""
        self.send_retractions(self._link.publish_deadline())
        batch = self.touches.take()
        if batch:
            try:
                self._link.publish(operations.touch(batch, self._candidate_hits), self._link.publish_deadline())
            except DistPrefixError:
                self.touches.dropped += len(batch)

    def _send(self, chain: bytes, deadline: float) -> None:
        try:
            self._link.publish(operations.trim(chain, self._holder, self._link.epoch), deadline)
        except (DamagedNodeError, StaleEpochError):
            self.retractions_refused += 1
