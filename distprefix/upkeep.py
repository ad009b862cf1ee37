"""What a cache does in the background: know what others did, let others know of it, and keep the tree in order."""

from __future__ import annotations

import contextlib
import logging
import secrets
import time
from random import random
from typing import TYPE_CHECKING

from distprefix.background import Schedule
from distprefix.budget import maintain
from distprefix.errors import DistPrefixError
from distprefix.forget import forget_members
from distprefix.metrics import metrics_of
from distprefix.prewarm import speculate
from distprefix.publisher import Publisher
from distprefix.redis.metrics import withdraw_metrics, write_metrics
from distprefix.relief import REMOVING_S
from distprefix.republish import Republisher
from distprefix.staleness import check_samples
from distprefix.sweep import sweep

if TYPE_CHECKING:
    from distprefix.operations import Swept
    from distprefix.state import State
    from distprefix.tiers.tiers import Tiers

__all__ = ["Upkeep"]

_log = logging.getLogger("distprefix")
_SWEEP_TIMEOUT_S = 60.0
_SWEEP_INTERVAL_S = 10.0
_ROLE_INTERVAL_S = 1.0
_FORGET_INTERVAL_S = 3600.0
_RELIEF_TIMEOUT_S = 30.0
_RELIEVE_INTERVAL_S = 5.0


class Upkeep:
    """The background of one cache. One thread at a time calls `work`."""

    def __init__(self, state: State, tiers: Tiers, publisher: Publisher) -> None:
        self._state = state
        self._republisher = Republisher(state, publisher)
        self._tiers = tiers
        self._schedule = Schedule()
        self._schedule.postpone("enroll", state.relief.enroll_interval_s)  # it was when the cache opened
        self._schedule.postpone("remove", random() * REMOVING_S)  # noqa: S311 - that not all look at once
        self._has_reported = False
        self._instance = secrets.token_hex(4)
        """Tells this cache from others of the same worker, as an engine's scheduler and its workers have one each."""

    @property
    def interval_s(self) -> float:
        """How often there may be something to do; 0 for never."""
        config = self._state.config
        lease_s = self._state.link.lease_s
        intervals = (config.feed_interval_s, config.touch_interval_s, config.maintain_interval_s, lease_s / 3)
        return min(filter(None, intervals), default=0.0)

    def work(self) -> None:
        """Do what is due. Never raises."""
        try:
            if not self._state.unusable:
                self._do_what_is_due()
        except Exception:  # noqa: BLE001 - the thread must go on, whatever it met
            if not self._state.unusable:
                self._state.counts["background_errors"] += 1
                _log.exception("the background of %s failed", self._state.config.holder)

    def flush(self) -> None:
        """Send what waits, and learn who counts. See `PrefixCacheOptimizer.flush`."""
        self._state.outbox.send()
        self._state.link.refresh()

    def sweep(self) -> Swept:
        """See `PrefixCacheOptimizer.sweep`."""
        link = self._state.link
        return sweep(link.admin, link.keys, time.monotonic() + _SWEEP_TIMEOUT_S)

    def end(self) -> None:
        """Send what waits and withdraw what was reported; a lease ends. Never raises on Redis failing."""
        self.flush()
        if self._has_reported:
            self._report(withdraw=True)
        if self._state.link.lease_s:
            self._state.link.end_lease()

    def _do_what_is_due(self) -> None:
        state = self._state
        config = state.config
        self._tiers.probe_servers()
        check_samples(state)
        speculate(state)
        self._tiers.promote_waiting()
        self._keep_in_touch()
        self._look_after_the_server()
        if state.link.attached:
            self._republisher.work()
        if self._schedule.is_due("demote", config.demote_interval_s):
            self._tiers.demote_idle()
        if self._schedule.is_due("maintain", config.maintain_interval_s):
            try:
                maintain(state)
            except DistPrefixError:
                state.counts["evictions_failed"] += 1

    def _look_after_the_server(self) -> None:
        """Note that the namespace is used, make room where the server is full, remove what nobody uses."""
        state = self._state
        deadline = time.monotonic() + _RELIEF_TIMEOUT_S
        if self._schedule.is_due("enroll", state.relief.enroll_interval_s):
            state.relief.enroll(deadline)
        if state.is_full or self._schedule.is_due("relieve", _RELIEVE_INTERVAL_S):
            is_full = state.is_full
            state.is_full = False
            state.relief.relieve(deadline, is_full=is_full)
        if self._schedule.is_due("remove", REMOVING_S):
            state.relief.remove_unused(deadline)

    def _keep_in_touch(self) -> None:
        """Know what others did, and let others know of this process."""
        config = self._state.config
        link = self._state.link
        if self._schedule.is_due("role", _ROLE_INTERVAL_S):
            link.check_role()
        if self._schedule.is_due("heartbeat", link.lease_s / 3):
            link.heartbeat()
        if self._schedule.is_due("feed", config.feed_interval_s):
            self._state.feed.poll()
            if link.roster.has_leases or not link.attached:
                link.refresh()
        if link.lease_s and self._schedule.is_due("sweep", _SWEEP_INTERVAL_S):
            self._sweep_quietly()
        if self._schedule.is_due("touch", config.touch_interval_s):
            if not config.feed_interval_s:
                self._state.feed.look()
            self.flush()
            self._report()

    def _sweep_quietly(self) -> None:
        with contextlib.suppress(DistPrefixError):
            swept = self.sweep()
            self._state.counts["swept_coverage"] += swept.coverage
            self._state.counts["swept_chunks"] += swept.chunks
            if self._schedule.is_due("forget", _FORGET_INTERVAL_S):
                link = self._state.link
                forget_members(link.admin, link.keys, time.monotonic() + _SWEEP_TIMEOUT_S)

    def _report(self, *, withdraw: bool = False) -> None:
        """Let everybody see how this cache is doing, or no longer."""
        link = self._state.link
        name = f"{self._state.config.holder} {self._instance}"
        with contextlib.suppress(DistPrefixError):
            if withdraw:
                withdraw_metrics(link.publishes, link.keys, name, link.publish_deadline())
            else:
                self._has_reported = True
                write_metrics(
                    link.publishes, link.keys, name, metrics_of(self._state, self._tiers), link.publish_deadline()
                )
