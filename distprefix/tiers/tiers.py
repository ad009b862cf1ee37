"""The tiers of one cache, put together: where payloads lie, how they are packed, and what is done in the background."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from distprefix.budget import maintain_cold
from distprefix.errors import DistPrefixError
from distprefix.redis.client import connect
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
    """The tiers of one cache. Opens no connection before the first payload. Thread-safe."""

    def __init__(self, state: State) -> None:
        config, link = state.config, state.link
        ring = KeyRing.from_text(config.encryption_keys) if config.encryption_keys else None
        self._state = state
        warm = PayloadStore(
            link.url, link.keys, config.payload_codec, ring, cold=False, timeout_s=config.payload_timeout_s
        )
        cold = None
        if config.cold_url or not link.cold_is_elsewhere:
            url, codec = config.cold_url or link.url, config.cold_codec
            cold = PayloadStore(url, link.keys, codec, ring, cold=True, timeout_s=config.payload_timeout_s)
        self.payloads = Payloads(state, warm, cold)
        self._elsewhere: Elsewhere | None = None
        if config.cold_url:
            server = connect(config.cold_url, config.payload_timeout_s)
            self._elsewhere = Elsewhere(link.admin, link.keys, server)

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

    def _tidy(self, deadline: float) -> None:
        if self._elsewhere is not None:
            while self._elsewhere.settle(deadline) + self._elsewhere.empty_trash(deadline):
                pass
