"""The namespaces of a server as the server-wide budget sees them: who there is, what each holds, when it was used."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distprefix.errors import UnavailableError
from distprefix.operations import SCHEMA
from distprefix.redis.client import Client
from distprefix.redis.keys import REGISTRY, Keys
from distprefix.redis.replies import clock_ms, count_of, text
from distprefix.shares import Standing

__all__ = ["Enrolled", "Memory", "enroll", "read_enrolled", "read_memory", "strike_out", "take_turn"]

_PAGE = 200
_META = ("schema", "bytes", "cold", "elsewhere", "used", "created", "tenant", "share", "ttl_ms")


@dataclass(frozen=True, slots=True)
class Memory:
    """What a server uses, in bytes."""

    used: int
    limit: int
    """Its maxmemory; 0 for none."""


@dataclass(frozen=True, slots=True)
class Enrolled:
    """A namespace of the registry, with what its shard says of it."""

    standing: Standing
    ttl_ms: int
    """How long it stays without use; 0 for ever."""
    cold_is_elsewhere: bool
    is_known: bool
    """Whether this version can read it; its bytes are 0 otherwise."""


def enroll(client: Client, keys: Keys, namespace: str, deadline: float) -> None:
    """Note that a namespace is used now, in its shard and among the namespaces of the server. Two script calls.

    Raises what a call raises.
    """
    client.call("used", keys.meta, (SCHEMA,), deadline)
    client.call("enroll", REGISTRY, (namespace,), deadline)


def strike_out(client: Client, namespace: str, deadline: float) -> None:
    """A namespace is no more. One call."""
    client.command("ZREM", REGISTRY, namespace, deadline=deadline)


def take_turn(client: Client, key: str, lasts_s: float, deadline: float) -> bool:
    """Whether this process has the turn that `key` stands for; for so long no other one has it. One call."""
    return bool(client.call("turn", key, (int(1000 * lasts_s),), deadline))


def read_memory(client: Client, deadline: float) -> Memory:
    """What the server uses and may use. One call."""
    reply: Any = client.command("INFO", "memory", deadline=deadline)
    text = reply.decode(errors="replace") if isinstance(reply, bytes) else str(reply)
    found = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    try:
        return Memory(int(found["used_memory"]), int(found.get("maxmemory", "0")))
    except (KeyError, ValueError):
        raise UnavailableError("the server does not say how much memory it uses") from None


def read_enrolled(client: Client, deadline: float) -> tuple[list[Enrolled], int]:
    """Every namespace of the registry, used longest ago first, and the server's clock in ms.

    A call for 200 of them, and one for each. What another hand wrote is read as good as it can be.
    """
    now_ms = clock_ms(client.command("TIME", deadline=deadline))
    return [_read_one(client, name, used_ms, deadline) for name, used_ms in _pages(client, deadline)], now_ms


def _pages(client: Client, deadline: float) -> Iterator[tuple[str, int]]:
    """Names and last uses."""
    names: list[tuple[str, int]] = []
    start = 0
    while time.monotonic() < deadline:
        reply: Any = client.command(
            "ZRANGE", REGISTRY, start, start + _PAGE - 1, "WITHSCORES", deadline=deadline, reads=True
        )
        flat = _flat(reply)
        names += [(text(name), _score(score)) for name, score in zip(flat[::2], flat[1::2], strict=True)]
        if len(flat) < 2 * _PAGE:
            break
        start += _PAGE
    yield from names


def _read_one(client: Client, name: str, used_ms: int, deadline: float) -> Enrolled:
    reply: Any = client.command("HMGET", Keys(name).meta, *_META, deadline=deadline, reads=True)
    values: dict[str, Any] = dict(zip(_META, reply if isinstance(reply, list) else [None] * len(_META), strict=True))
    is_known = values["schema"] == SCHEMA
    is_elsewhere = values["elsewhere"] == b"1"
    held = count_of(values["bytes"]) + (0 if is_elsewhere else count_of(values["cold"]))
    standing = Standing(
        name,
        text(values["tenant"]),
        held if is_known else 0,
        _created_ms(values["created"]),
        max(count_of(values["used"]), 0) or used_ms,
        min(1e6, max(1e-3, _fraction(values["share"]))),
    )
    return Enrolled(standing, count_of(values["ttl_ms"]), is_elsewhere, is_known)


def _flat(reply: Any) -> Sequence[Any]:
    """A reply with scores, flat in RESP2 and in pairs in RESP3."""
    if isinstance(reply, list) and reply and isinstance(reply[0], list):
        return [part for pair in reply for part in pair]
    return reply if isinstance(reply, list) else []


def _fraction(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 1.0
    return number if number == number else 1.0  # noqa: PLR0124 - no NaN


def _score(value: Any) -> int:
    """A score, as RESP2 and RESP3 have it; 0 for what is no time."""
    number = _fraction(value)
    return int(number) if 0 <= number < 1e15 else 0


def _created_ms(value: Any) -> int:
    """From seconds and microseconds with a dot between, as `attach` writes them."""
    return count_of(value.partition(b".")[0]) * 1000 if isinstance(value, bytes) else 0
