"""Publishing again what this worker holds, after the server lost it: in the background, a little at a time."""

from __future__ import annotations

import time
from collections import deque

from distprefix.errors import DistPrefixError, UnavailableError
from distprefix.own import Node
from distprefix.publisher import Publisher
from distprefix.state import State

__all__ = ["Republisher"]

_SLICE_S = 0.05
"""How long a round of the background may take for this: the log is to be read in between."""


class Republisher:
    """What of this worker's own list has to be published under its new epoch. One thread at a time calls `work`."""

    def __init__(self, state: State, publisher: Publisher) -> None:
        self._state = state
        self._publisher = publisher
        self._renewed = 0
        """Of the epochs that the link took anew: what has to be published under the newest is in the queue."""
        self._nodes: deque[Node] = deque()
        self._chains: deque[bytes] = deque()
        """Chains that the worker named no blocks for."""

    @property
    def waiting(self) -> int:
        """Chains that are to be published again."""
        return len(self._nodes) + len(self._chains)

    def work(self) -> None:
        """Publish for a while what the server has lost. One call a chain; what fails for now is tried again."""
        renewed = self._state.link.renewed
        if renewed != self._renewed:
            self._renewed = renewed
            self._begin()
        if not self.waiting:
            return
        until = time.monotonic() + _SLICE_S
        while self.waiting and time.monotonic() < until and self._state.link.attached:
            is_taken = self._publish_next()
            self._state.counts["republish_waiting"] = self.waiting
            if not is_taken:
                return
        if self.waiting:
            self._state.wake()

    def _begin(self) -> None:
        state = self._state
        with state.lock:
            self._nodes = deque(reversed(state.own.leaves()))
            self._chains = deque(state.unnamed)
            state.counts["republish_waiting"] = self.waiting
        for lease in state.reservations.active():
            lease.protect_again()

    def _publish_next(self) -> bool:
        """Whether Redis is there: then the next one may follow."""
        state = self._state
        queue: deque[Node] | deque[bytes] = self._nodes or self._chains
        first = queue[0]
        with state.lock:
            hashes, blocks = (first, b"") if isinstance(first, bytes) else state.own.chain_to(first)
        try:
            if hashes:
                self._publisher.publish_again(hashes, blocks)
                state.counts["republished"] += 1
        except UnavailableError:
            return False
        except DistPrefixError:
            state.counts["republish_failed"] += 1
        queue.popleft()
        return True
