"""Who counts: the epochs of the workers' ranks, and until when their leases last. Pure; the clock is passed in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

__all__ = ["Reading", "Roster", "member_of", "members_of"]


def member_of(holder: str) -> str:
    """The rank of a worker that a holder belongs to, ``worker/rank``; empty for a shared tier."""
    return holder.partition("@")[0]


def members_of(worker: str, members: Iterable[str]) -> list[str]:
    """Those of the members that are ranks of this worker."""
    return [member for member in members if member.rpartition("/")[0] == worker]


class Reading(NamedTuple):
    """What Redis says of the workers."""

    server_ms: int
    """The server's clock when it was read."""
    version: str
    epochs: Mapping[str, int] | None
    """Member to epoch, of those that changed since the version that the caller knew; None when there is nothing new."""
    lease_ends_ms: Mapping[str, int]
    """Member to the end of its lease by the server's clock; members that hold none are not in it."""
    is_whole: bool = True
    """Whether `epochs` has all members: those that are not in it are unknown."""
    has_all_leases: bool = True
    """Whether `lease_ends_ms` has all leases, not only those of members in `epochs`."""
    own_epoch: int = 0
    """Epoch of the member that was asked for, 0 when it has none."""


class Roster:
    """What this process knows of the workers. Not thread-safe but for `is_live`, which may read an older state."""

    def __init__(self) -> None:
        self.version = ""
        """What to ask Redis with whether anything has changed; empty before the first reading."""
        self.read_at = float("-inf")
        """When the ends of the leases were read (time.monotonic)."""
        self._epochs: dict[str, int] = {}
        self._ends: dict[str, float] = {}
        self._members: dict[str, str] = {}

    @property
    def has_leases(self) -> bool:
        """Whether any member holds a lease, so that reading again matters although no epoch changes."""
        return bool(self._ends)

    def epoch(self, member: str) -> int:
        """The newest epoch known of a member, 0 when it is unknown."""
        return self._epochs.get(member, 0)

    def update(self, reading: Reading, asked_at: float) -> None:
        """Take over a reading that was asked for at `asked_at` (time.monotonic)."""
        if reading.epochs is None:
            return
        ends = {member: asked_at + (end - reading.server_ms) / 1000 for member, end in reading.lease_ends_ms.items()}
        self.version = reading.version
        if reading.is_whole:
            self._epochs = dict(reading.epochs)
        else:
            self._epochs |= reading.epochs
        if reading.has_all_leases:
            self._ends = ends
            self.read_at = asked_at
        else:  # a new dictionary: `is_live` may be reading the one before
            self._ends = {member: end for member, end in self._ends.items() if member not in reading.epochs} | ends

    def is_live(self, holder: str, epoch: int, now: float) -> bool:
        """Whether coverage under this epoch counts: a shared tier's always, a worker's until a newer epoch is known.

        Where the worker holds a lease, only while that lasts.
        """
        member = self._members.get(holder)
        if member is None:
            member = self._members[holder] = member_of(holder)
        if not member:
            return True
        known = self._epochs.get(member, 0)
        if epoch > known:
            # A reply told of it before the roster was read again; what is known of a lease is of an older process.
            self._epochs[member] = epoch
            self._ends.pop(member, None)
        return epoch >= known and self._ends.get(member, now) >= now
