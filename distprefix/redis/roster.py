"""The workers of a namespace in Redis: taking an epoch, holding a lease, ending it, reading who is there."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, cast

import msgpack

from distprefix.errors import InvalidInputError, ScriptError
from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.redis.replies import count_of, pairs
from distprefix.roster import Reading

__all__ = ["GRACE_S", "Member", "WorkerInfo", "heartbeat", "read_members", "read_roster", "register", "retire"]

_MEMBERS_A_PAGE = 500
_MAX_RESTARTS = 3
"""Of one reading: at its begin, and where data are lost meanwhile."""
_MAX_NUMBER = 1e15
"""No time in ms and no epoch is as large."""
GRACE_S = 60.0
"""How long after its lease a member may come back with all that it published."""


@dataclass(frozen=True, slots=True)
class WorkerInfo:
    """What a worker says of itself, for routers and people."""

    address: str = ""
    """Where requests go: host and port, or a URL."""
    model: str = ""
    media: tuple[str, ...] = ()
    """What its KV may lie in."""
    load: Mapping[str, float] = field(default_factory=dict[str, float])
    """Whatever a router weighs: requests running, blocks free, ..."""

    def __post_init__(self) -> None:
        for name, value in self.load.items():
            try:
                float(value)
            except (TypeError, ValueError):
                raise InvalidInputError(f"the load {name!r} is {value!r}: numbers are allowed") from None

    def fields(self) -> list[Any]:
        """As they lie in Redis, name after value."""
        load = cast("bytes", msgpack.packb({str(name): float(value) for name, value in self.load.items()}))
        return ["address", self.address, "model", self.model, "media", ",".join(self.media), "load", load]


@dataclass(frozen=True, slots=True)
class Member:
    """One rank of a worker as Redis knows it."""

    worker: str
    rank: int
    epoch: int
    lease_left_s: float | None
    """Until its lease ends, negative when it has ended; None when it holds none."""
    info: WorkerInfo
    started: float
    """When it took its epoch, seconds since 1970; 0 when it does not say."""

    @property
    def name(self) -> str:
        """As epochs and leases know it: ``worker/rank``."""
        return f"{self.worker}/{self.rank}"


def register(
    client: Client, keys: Keys, member: str, above: int, lease_s: float, info: WorkerInfo | None, deadline: float
) -> int:
    """A number that this member never had before, higher than `above`; a lease unless that is 0. One script call."""
    said = [*(info or WorkerInfo()).fields(), "started", f"{time.time():.3f}"]
    return int(client.call("register", keys.epochs, (member, above, int(lease_s * 1000), *said), deadline))


def heartbeat(
    client: Client, keys: Keys, member: str, epoch: int, lease_s: float, info: WorkerInfo, deadline: float
) -> None:
    """The member's lease lasts so long from now on. One script call. Raises StaleEpochError when it was voided."""
    args = (member, epoch, int(lease_s * 1000), int(GRACE_S * 1000), *info.fields())
    client.call("heartbeat", keys.epochs, args, deadline)


def retire(client: Client, keys: Keys, members: Mapping[str, int | None], deadline: float) -> int:
    """What these members published counts no more, if that is their epoch (None: whichever). One script call.

    Returns how many were there.
    """
    if not members:
        return 0
    args = [part for member, epoch in members.items() for part in (member, "" if epoch is None else epoch)]
    return int(client.call("retire", keys.epochs, tuple(args), deadline))


def read_roster(
    client: Client, keys: Keys, version: str, deadline: float, *, with_leases: bool = True, member: str = ""
) -> Reading:
    """Who counts: what changed since `version`, "" for all; with all leases when they are asked for.

    One script call for every 500 members that changed, or that hold a lease. With `member` also the epoch of that one.
    """
    pages = _Pages(version, with_leases=with_leases)
    while not pages.is_complete:
        pages.take(client.call("roster", keys.epochs, (*pages.place(), _MEMBERS_A_PAGE, member), deadline))
    return pages.reading()


class _Pages:
    """A reading of the roster as it comes, page by page. What a later page says of a member counts."""

    def __init__(self, version: str, *, with_leases: bool) -> None:
        self.is_complete = False
        self._with_leases = with_leases
        self._version = version
        self._is_whole = not version
        self._server_ms = 0
        self._own_epoch = 0
        self._is_changed = False
        self._epochs: dict[str, int] = {}
        self._ends: dict[str, int] = {}
        self._from = "-inf" if with_leases else ""
        self._skipped = 0
        self._restarts = 0

    def place(self) -> tuple[str, str, int]:
        """Where to go on."""
        return self._version, self._from, self._skipped

    def take(self, reply: Sequence[Any]) -> None:
        """The next page."""
        server_ms, version, own, *rest = reply
        self._server_ms = self._server_ms or int(server_ms)
        self._own_epoch = _whole_number(own)
        if not rest:
            self.is_complete = True
            return
        go_on, is_unknown, changed, leases = rest
        self._restarts += bool(is_unknown)
        if is_unknown and not self._is_whole:  # data were lost, or older ones restored
            self._is_whole = True
            self._epochs.clear()
        self._is_changed = True
        self._version = go_on.decode()
        self._take_changes(changed)
        for name, end in _numbers(leases).items():
            self._ends[name] = end
        full = len(leases) == 2 * _MEMBERS_A_PAGE
        if full:  # from the last end on: others may end at that very time
            last = leases[-1]
            same = sum(end == last for end in leases[1::2])
            self._skipped = self._skipped + same if last.decode() == self._from else same
            self._from = last.decode()
        else:
            self._from, self._skipped = "", 0
        # Changes of versions that were never given have each page begin anew: what has come by then is all there is.
        self.is_complete = (not full and go_on == version) or self._restarts > _MAX_RESTARTS

    def reading(self) -> Reading:
        """All that came."""
        epochs = self._epochs if self._is_changed else None
        return Reading(
            self._server_ms,
            self._version,
            epochs,
            self._ends,
            is_whole=self._is_whole,
            has_all_leases=self._with_leases,
            own_epoch=self._own_epoch,
        )

    def _take_changes(self, changed: Sequence[bytes]) -> None:
        for name, epoch, end in zip(changed[::3], changed[1::3], changed[2::3], strict=True):
            member, number = name.decode(errors="replace"), _whole_number(epoch)
            self._ends.pop(member, None)
            if number:
                self._epochs[member] = number
            if _whole_number(end):
                self._ends[member] = _whole_number(end)


def read_members(client: Client, keys: Keys, deadline: float) -> list[Member]:
    """Everybody who took an epoch and is not forgotten, with what they say of themselves.

    One call for 500, and one for each with a lease.
    """
    reading = read_roster(client, keys, "", deadline)
    members: list[Member] = []
    for name, epoch in sorted((reading.epochs or {}).items()):
        worker, _, rank = name.rpartition("/")
        end = reading.lease_ends_ms.get(name)
        left, said = None, dict[bytes, bytes]()
        if end is not None:
            left = (end - reading.server_ms) / 1000
            said = _said(client, keys.member(name), deadline)
        started = _float(said.get(b"started", b""))
        started = started if isfinite(started) else 0.0
        members.append(Member(worker, count_of(rank.encode(errors="replace")), epoch, left, _info(said), started))
    return members


def _said(client: Client, name: str, deadline: float) -> dict[bytes, bytes]:
    """What a member says of itself; nothing where a foreign writer put something else there."""
    try:
        return pairs(client.command("HGETALL", name, deadline=deadline))
    except ScriptError:
        client.damage.note()
        return {}


def _info(said: Mapping[bytes, bytes]) -> WorkerInfo:
    def text(name: bytes) -> str:
        return said.get(name, b"").decode(errors="replace")

    try:
        load = msgpack.unpackb(said.get(b"load", b"\x80"))
        load = {str(name): float(value) for name, value in load.items()}
        load = {name: value for name, value in load.items() if isfinite(value)}
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError):  # another hand wrote it
        load = {}
    return WorkerInfo(text(b"address"), text(b"model"), tuple(filter(None, text(b"media").split(","))), load)


def _whole_number(value: bytes) -> int:
    number = _float(value)
    return int(number) if abs(number) < _MAX_NUMBER else 0


def _numbers(flat: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, value in pairs(flat).items():
        number = _float(value)
        if number and abs(number) < _MAX_NUMBER:
            found[name.decode(errors="replace")] = int(number)
    return found


def _float(value: bytes) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0
