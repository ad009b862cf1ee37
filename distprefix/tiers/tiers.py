"""The tiers of one cache, put together: where payloads lie, how they are packed, and what is done in the background."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from distprefix.budget import maintain_cold
from distprefix.errors import DistPrefixError
from distprefix.redis.breaker import new_breakers
from distprefix.redis.client import Client
from distprefix.redis.connections import connect
from distprefix.redis.data import DataPool
from distprefix.redis.endpoint import Endpoint
from distprefix.tiers.elsewhere import Elsewhere
from distprefix.tiers.encryption import KeyRing
from distprefix.tiers.moving import demote, promote
from distprefix.tiers.payloads import Payloads
from distprefix.tiers.store import PayloadStore

if TYPE_CHECKING:
    from distprefix.chunking import Prompt
    from distprefix.state import State

__all__ = ["Tiers"]

_DEMOTE_TIMEOUT_S = 60.0


class Tiers:
    """The tiers of one cache. Opens no connection before the first payload. Thread-safe.

    Each server of payloads has breakers of its own, one for reads and one for writes.
    """

    def __init__(self, state: State) -> None:
        config = state.config
        link = state.link
        ring = KeyRing.from_text(config.encryption_keys) if config.encryption_keys else None
        self._state = state
        warm_pool = self._new_pool(link.url, link.endpoint)
        warm = self._new_store(config.payload_codec, ring, warm_pool, cold=False)
        cold = None
        self._elsewhere: Elsewhere | None = None
        if config.cold_url:
            endpoint = Endpoint("cold_url")
            pool = self._new_pool(config.cold_url, endpoint)
            cold = self._new_store(config.cold_codec, ring, pool, cold=True)
            server = connect(config.cold_url, config.payload_timeout_s, endpoint)
            client = Client(server, pool.breakers, pool.failures, endpoint)
            self._elsewhere = Elsewhere(link.admin, link.keys, client, config.payload_timeout_s)
        elif not link.cold_is_elsewhere:
            pool = self._new_pool(link.url, link.endpoint)
            cold = self._new_store(config.cold_codec, ring, pool, cold=True)
        self.payloads = Payloads(state, warm, cold)

    @property
    def pools(self) -> dict[str, DataPool]:
        """The connections of each tier, by its name."""
        stores = {"warm": self.payloads.warm, "cold": self.payloads.cold}
        return {name: store.pool for name, store in stores.items() if store is not None}

    def probe_servers(self) -> None:
        """Ask the servers of payloads that are off whether they are back. Never raises."""
        for pool in self.pools.values():
            pool.probes_itself = False
            pool.abort_overdue()
            pool.probe()

    def demote(self, idle_s: float | None, timeout_s: float) -> int:
        """See `PrefixCacheOptimizer.demote`."""
        deadline = time.monotonic() + timeout_s
        moved = demote(self.payloads, deadline, idle_s)
        self._tidy(deadline)
        if self._state.config.cold_max_bytes is not None:
            maintain_cold(self._state, deadline)
        return moved

    def promote(self, prompt: Prompt, timeout_s: float) -> int:
        """See `PrefixCacheOptimizer.promote`."""
        return promote(self.payloads, self._state.chain(prompt), time.monotonic() + timeout_s)

    def demote_idle(self) -> None:
        """As `demote`, in the background: never raises on a server failing."""
        try:
            self.demote(None, _DEMOTE_TIMEOUT_S)
        except DistPrefixError:
            self._state.counts["demotions_failed"] += 1

    def promote_waiting(self) -> None:
        """Promote what loads found cold. Never raises on a server failing: the next load finds it again."""
        waiting = self.payloads.to_promote
        try:
            while waiting:
                promote(self.payloads, waiting.popleft(), self.payloads.deadline())
        except DistPrefixError:
            self._state.counts["promotions_failed"] += 1

    def close(self) -> None:
        """Close the connections."""
        self.payloads.close()
        if self._elsewhere is not None:
            self._elsewhere.close()

    def _context(self) -> bytes:
        return self._state.link.hasher.payload_context

    def _new_store(self, codec: str, ring: KeyRing | None, pool: DataPool, *, cold: bool) -> PayloadStore:
        return PayloadStore(
            self._state.link.keys,
            codec,
            ring,
            pool,
            cold=cold,
            context=self._context,
            max_payload_bytes=self._state.config.max_payload_bytes,
        )

    def _new_pool(self, url: str, endpoint: Endpoint) -> DataPool:
        config = self._state.config
        breakers = new_breakers(config.breaker_failures, config.breaker_reset_s)
        return DataPool(url or None, timeout_s=config.payload_timeout_s, endpoint=endpoint, breakers=breakers)

    def _tidy(self, deadline: float) -> None:
        if self._elsewhere is not None:
            while self._elsewhere.settle(deadline) + self._elsewhere.empty_trash(deadline):
                pass
