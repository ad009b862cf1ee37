"""What storing, loading and moving the KV bytes of chunks share: both tiers, L1's payloads, and the tree's answers."""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Sequence

from distprefix.errors import DistPrefixError, NotAttachedError
from distprefix.state import State
from distprefix.tiers import operations
from distprefix.tiers.cache import PayloadCache
from distprefix.tiers.operations import Places
from distprefix.tiers.store import PayloadStore

__all__ = ["ATTEMPTS", "COLD", "GONE", "TIER_EPOCH", "WARM", "Payloads"]

WARM, COLD = "@warm", "@cold"
TIER_EPOCH = 1
ATTEMPTS = 3
GONE = ("missing", "damaged")
"""Why a payload counts for nothing."""


class Payloads:
    """The payloads of one cache. Thread-safe."""

    def __init__(self, state: State, warm: PayloadStore, cold: PayloadStore | None) -> None:
        self.cache = PayloadCache(state.config.l1_payload_bytes)
        self.warm = warm
        self.cold = cold
        """None when cold payloads lie on another server, and it was not said where."""
        self.to_promote: deque[bytes] = deque(maxlen=256)
        """Chains that were found cold."""
        self.state = state

    def close(self) -> None:
        """Close the connections."""
        for store in (self.warm, self.cold):
            if store is not None:
                store.close()

    def places(self, chains: Sequence[bytes], deadline: float) -> list[Places]:
        """Where the payloads of chains lie. One call for 4,096 chunks. Raises UnavailableError."""
        link = self.state.link
        try:
            return link.publish(operations.where(chains), deadline)
        except NotAttachedError:
            link.attach_again(link.epoch, deadline)
            return [Places(array("I"), array("I"), ()) for _ in chains]

    def find_stored(self, chains: Sequence[bytes]) -> list[int]:
        """How many leading chunks of each chain have payloads, by the deadline of a look-up. 0 on failing."""
        try:
            found = self.places(chains, time.monotonic() + self.state.config.lookup_timeout_s)
        except DistPrefixError:
            self.count("loads_failed", 1)
            if self.state.config.strict:
                raise
            return [0] * len(chains)
        return [places.chunks for places in found]

    def count(self, name: str, count: int) -> None:
        """Count what happened."""
        with self.state.lock:
            self.state.counts[name] += count

    def deadline(self) -> float:
        """When a call that begins now has to be done (time.monotonic)."""
        return time.monotonic() + self.state.config.payload_timeout_s
