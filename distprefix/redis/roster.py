"""The workers of a namespace in Redis: taking an epoch, holding a lease, ending it, reading who is there."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, cast

import msgpack

from distprefix.errors import InvalidInputError
from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.redis.replies import pairs
from distprefix.roster import Reading

__all__ = ["GRACE_S", "Member", "WorkerInfo", "heartbeat", "read_members", "read_roster", "register", "retire"]

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


def read_roster(client: Client, keys: Keys, version: str, deadline: float) -> Reading:
    """Who counts; short when nothing but the leases has changed since `version`, "" for all. One script call."""
    server_ms, now_version, *rest = client.call("roster", keys.epochs, (version,), deadline)
    if not rest:
        return Reading(int(server_ms), now_version.decode(), None, {})
    epochs, leases = rest
    return Reading(int(server_ms), now_version.decode(), _numbers(epochs), _numbers(leases))


def read_members(client: Client, keys: Keys, deadline: float) -> list[Member]:
    """Everybody who ever took an epoch, with what they say of themselves. One call, and one for each with a lease."""
    reading = read_roster(client, keys, "", deadline)
    members: list[Member] = []
    for name, epoch in sorted((reading.epochs or {}).items()):
        worker, _, rank = name.rpartition("/")
        end = reading.lease_ends_ms.get(name)
        left, said = None, dict[bytes, bytes]()
        if end is not None:
            left = (end - reading.server_ms) / 1000
            said = pairs(client.command("HGETALL", keys.member(name), deadline=deadline))
        started = _float(said.get(b"started", b""))
        members.append(Member(worker, int(rank) if rank.isdigit() else 0, epoch, left, _info(said), started))
    return members


def _info(said: Mapping[bytes, bytes]) -> WorkerInfo:
    def text(name: bytes) -> str:
        return said.get(name, b"").decode(errors="replace")

    try:
        load = msgpack.unpackb(said.get(b"load", b"\x80"))
        load = {str(name): float(value) for name, value in load.items()}
    except (ValueError, TypeError, AttributeError):  # another hand wrote it
        load = {}
    return WorkerInfo(text(b"address"), text(b"model"), tuple(filter(None, text(b"media").split(","))), load)


def _numbers(flat: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, value in pairs(flat).items():
        number = _float(value)
        if number and isfinite(number):
            found[name.decode(errors="replace")] = int(number)
    return found


def _float(value: bytes) -> float:
    try:
        return float(value)
    except ValueError:
        return 0.0
