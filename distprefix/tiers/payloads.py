"""What storing, loading and moving the KV bytes of chunks share: both tiers, L1's payloads, and the tree's answers."""

from __future__ import annotations

import logging
import time
from array import array
from collections import deque
from collections.abc import Sequence

from distprefix.chunking import Prompt
from distprefix.errors import DistPrefixError, NotAttachedError
from distprefix.state import State
from distprefix.tiers import operations
from distprefix.tiers.cache import PayloadCache
from distprefix.tiers.operations import Places
from distprefix.tiers.store import PayloadStore

__all__ = ["ATTEMPTS", "COLD", "WARM", "Payloads"]

_log = logging.getLogger("distprefix")
WARM = "@warm"
COLD = "@cold"
ATTEMPTS = 3


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
        self._warned_of_unfit = False

    def close(self) -> None:
        """Close the connections."""
        for store in (self.warm, self.cold):
            if store is not None:
                store.close()

    def places(self, chains: Sequence[bytes], deadline: float) -> list[Places]:
        """Where the payloads of chains lie. One call for 4,096 chunks and 300 nodes. Raises UnavailableError."""
        link = self.state.link
        epoch = link.epoch
        try:
            return link.publish(operations.where(chains), deadline)
        except NotAttachedError:
            link.attach_again(epoch, deadline)
            return [Places(array("I"), array("I"), ()) for _ in chains]

    def find_stored(self, prompts: Sequence[Prompt], *, as_one: bool = False, is_counted: bool = True) -> list[int]:
        """How many leading chunks of each prompt have payloads, by the deadline of a look-up. 0 on failing."""
        state = self.state
        deadline = time.monotonic() + state.config.lookup_timeout_s
        chains = [state.chain(prompt) for prompt in prompts]
        found = [0] * len(chains)
        try:
            for i, places in enumerate(self.places(chains, deadline)):
                found[i] = places.chunks
                self.touch(prompts[i], chains[i], places)
        except DistPrefixError:
            self.count("loads_failed", 1)
            if state.config.strict:
                raise
        finally:
            if is_counted:
                self._count_lookups([prompt.chunks for prompt in prompts], found, as_one=as_one)
        return found

    def touch(self, prompt: Prompt, chain: bytes, places: Places, hits: int = 1) -> None:
        """Record a use of the nodes that have a chain's payloads, here and, with the next batch, in Redis. No call.

        A store is a use without `hits`. What has no payload is not used.
        """
        state = self.state
        state.outbox.touches.add_chunks(chain, [start for start in places.starts if start < places.chunks], hits)
        with state.lock:
            now = time.monotonic()
            found = state.l1.find(prompt, now)
            depth = min(places.chunks, found.chunks)
            if depth:
                state.l1.touch(found.path_to(depth)[-1], now, hits)

    def _count_lookups(self, asked: Sequence[int], found: Sequence[int], *, as_one: bool) -> None:
        if not asked:
            return
        lookups = len(asked)
        hits = sum(map(bool, found))
        chunks = sum(asked)
        if as_one:  # a chain, and perhaps some of its chunks once more, each by itself
            lookups = 1
            hits = min(hits, 1)
            chunks = max(*asked, len(asked))
        self.count_lookups(lookups, hits, chunks, min(chunks, sum(found)))

    def count_lookups(self, lookups: int, hits: int, chunks: int, chunks_hit: int) -> None:
        """Count look-ups of payloads: those that hit, the chunks asked for, and those that were found."""
        with self.state.lock:
            counts = self.state.counts
            counts["lookups"] += lookups
            counts["hits"] += hits
            counts["hits_stored"] += hits
            counts["chunks"] += chunks
            counts["chunks_hit"] += chunks_hit

    def warn_of_unfit(self, stored: int, wanted: int) -> None:
        """Say once that a buffer to load into has another length than its payload."""
        if not self._warned_of_unfit:
            self._warned_of_unfit = True
            _log.warning(
                "a payload of another length than the %d bytes of its buffer ended a load (it takes %d in Redis): give "
                "buffers as long as what was stored. Warned of once; payloads_unfit counts them all",
                wanted,
                stored,
            )

    def count(self, name: str, count: int) -> None:
        """Count what happened."""
        with self.state.lock:
            self.state.counts[name] += count

    def deadline(self) -> float:
        """When a call that begins now has to be done (time.monotonic)."""
        return time.monotonic() + self.state.config.payload_timeout_s
