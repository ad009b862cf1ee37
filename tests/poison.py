"""What a foreign writer may put into Redis: every key of a namespace, changed in every way that could mislead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import msgpack
import redis

from tests.servers import Backend

__all__ = ["Change", "Stored", "changes"]

_NUMBERS = (
    *(b"", b"-1", b"0", b"1", b"1.5", b"nan", b"inf", b"-inf", b"1e309", b"0x10", b" 7", b"1_0"),
    *(b"9007199254740993", b"9223372036854775808", b"-9223372036854775808", b"9" * 25, b"9" * 5000),
)
_COVERAGE = (
    b":",
    b"1:",
    b":1",
    b"1:0",
    b"1:-1",
    b"1:1:1",
    b"0:1",
    b"1:1.5",
    b"1:999999999",
    b"1:" + b"9" * 30,
    b"9" * 20,
)
_BYTES = (
    *(b"\0", b"\xff\xfe\xfd", b"abc", b"A" * 16, b"A" * 17, b"B" * (16 * 300), b"C" * (1 << 19), b"\xff" * 160),
    *("\u202e[/red]\x1b]0;x\x07".encode(), b"a\nb\r\n{}*?: %s"),
)


def _packed(value: object) -> bytes:
    packed = msgpack.packb(value)
    assert packed is not None
    return packed


_PACKED = (
    *(b"\x91" * 100_000 + b"\xc0", b"\x81" * 50_000, b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff"),
    *(b"\xc6\xff\xff\xff\xff", b"\xc7\x05\x01hello", b"\xd4\xff\x00", _packed([1, 2]), _packed({1: 2})),
    _packed({"load": {"x": []}, "lookups": "x", "hits": 1e308, "hit_rate": None}),
    b"99999999999999:" + _packed({"lookups": float("nan"), "hits": {"x": 1}}),
)
_VALUES = (*_NUMBERS, *_COVERAGE, *_BYTES, *_PACKED)
_HOLDERS = (b"@warm", b"@cold", b"a/0@gpu", b"z/0@gpu", b"\xff\xfe", b"", b"x" * 50_000)
_SCORES = ("-inf", "inf", "-1", "0", "1e300", "99999999999999999")
_KINDS = ("string", "list", "zset", "hash", "set", "stream")


class Change(NamedTuple):
    """Commands that make one change; each begins with its name."""

    key: bytes
    commands: tuple[tuple[Any, ...], ...]

    def apply(self, admin: redis.Redis) -> None:
        """Make it. Raises redis-py's ResponseError where the server does not take it."""
        for command in self.commands:
            admin.execute_command(*command)


class Stored:
    """Everything on a server as it is now, to be put back."""

    def __init__(self, admin: redis.Redis) -> None:
        self._admin = admin
        self.dumps: dict[bytes, tuple[Any, int]] = {}
        for key in sorted(admin.scan_iter(count=1000)):
            self.dumps[key] = (admin.dump(key), max(0, int(admin.pttl(key))))

    def restore(self) -> None:
        """Have the server hold just that."""
        pipeline = self._admin.pipeline(transaction=False)
        pipeline.flushall()
        for key, (dump, ttl_ms) in self.dumps.items():
            pipeline.restore(key, ttl_ms, dump)
        pipeline.execute()


def changes(backend: Backend) -> Iterator[Change]:
    """Every change of every key that is there, and of the lists that are not."""
    admin: Any = backend.admin
    heads = sorted(key.rpartition(b":")[2] for key in admin.scan_iter(match=f"{backend.keys.base}n:*", count=1000))
    for key in sorted(admin.scan_iter(count=1000)):
        kind = admin.type(key).decode()
        yield Change(key, (("DEL", key),))
        for other in _KINDS:
            if other != kind:
                yield Change(key, (("DEL", key), _made(key, other)))
        yield from _OF_KIND[kind](admin, key, heads)
    keys = backend.keys
    for name in (keys.trash, keys.kept, keys.unsettled, keys.swept, keys.voided, keys.sweeping, keys.forgetting):
        for kind in _KINDS:
            yield Change(name.encode(), (("DEL", name), _made(name.encode(), kind)))
    for member in (b"zz", b"AB" * 16, b"ab", b"\xff", b"ab" * 8, b""):
        yield Change(keys.trash.encode(), (("SADD", keys.trash, member),))
    for chunks in (b"a" * 17, b"", b"B" * 160_000, b"\xff"):
        yield Change(keys.unsettled.encode(), (("HSET", keys.unsettled, "x", chunks),))
    yield from _circles(keys, heads, admin)


def _made(key: bytes, kind: str) -> tuple[Any, ...]:
    return {
        "string": ("SET", key, "x"),
        "list": ("RPUSH", key, "x"),
        "zset": ("ZADD", key, 1, "x"),
        "hash": ("HSET", key, "x", "y"),
        "set": ("SADD", key, "x"),
        "stream": ("XADD", key, "*", "x", "y"),
    }[kind]


def _of_hash(admin: Any, key: bytes, heads: list[bytes]) -> Iterator[Change]:
    for field in sorted(admin.hkeys(key))[:16]:
        yield Change(key, (("HDEL", key, field),))
        for value in _VALUES:
            yield Change(key, (("HSET", key, field, value),))
    for holder in _HOLDERS if b":n:" in key else ():
        for kind in (b"h:", b"b:", b"e:", b"l:"):
            for value in (b"", b"1:5", b"1:999999", b"abc", b"\xff" * 160, b"9" * 400):
                yield Change(key, (("HSET", key, kind + holder, value),))
    for field in (b"", b"root", b"o", b"*", b"\xff\xfe", b"a" * 32, b"g" * 32, b"A" * 50_000, *heads):
        yield Change(key, (("HSET", key, field, b""),))
        yield Change(key, (("HSET", key, b"o", field),))


def _of_string(admin: Any, key: bytes, _: list[bytes]) -> Iterator[Change]:
    value = admin.get(key)
    for other in (*_VALUES, value + b"x", *(value[:at] for at in (1, 16, 32, 33))):
        yield Change(key, (("SET", key, other),))


def _of_zset(admin: Any, key: bytes, heads: list[bytes]) -> Iterator[Change]:
    for member in (b"", b"x", b"\xff", b"root", b"g" * 32, b"A" * 50_000, *heads[:3], *admin.zrange(key, 0, 2)):
        for score in _SCORES:
            yield Change(key, (("ZADD", key, score, member),))


def _of_set(_: Any, key: bytes, heads: list[bytes]) -> Iterator[Change]:
    for member in (b"", b"x", b"\xff", b"zz" * 16, b"AB" * 16, b"ab" * 50_000, *heads[:2]):
        yield Change(key, (("SADD", key, member),))


def _of_stream(_: Any, key: bytes, heads: list[bytes]) -> Iterator[Change]:
    last = b"18446744073709551615-18446744073709551615"
    yield Change(key, (("XADD", key, last, "n", "1"),))
    for fields in (
        *((b"n", b"abc"), (b"x", b"y"), (b"n", b"9" * 40, b"removed", b"zz"), (b"n", b"\xff\xfe", b"removed", b"\xff")),
        *((b"n", b"100", b"split", heads[0], b"lower", b""), (b"n", b"100", b"trimmed", heads[0], b"size", b"-5")),
        *((b"n", b"100", b"trimmed", heads[0]), (b"n", b"100", b"changed", b"")),
    ):
        yield Change(key, (("XADD", key, "*", *fields),))
        meta = key[: -len(b"log")] + b"meta"
        if fields[0] == b"n" and fields[1] == b"100":
            yield Change(key, (("HSET", meta, "log", 100), ("XADD", key, "*", *fields)))


def _circles(keys: Any, heads: list[bytes], admin: Any) -> Iterator[Change]:
    """Each node hung below each other one, or itself, wholly or by one of the three links alone."""
    runs: dict[bytes, bytes] = {head: admin.hget(keys.node(head.decode()), "r") for head in heads}
    for head in heads:
        for below in heads:
            last = runs[below][-16:].hex()
            junction = keys.junction(last)
            parent = ("HSET", keys.node(head.decode()), "p", last)
            child = ("HSET", junction, head, "")
            owner = ("HSET", junction, "o", below)
            yield Change(head, (parent,))
            yield Change(head, (child,))
            yield Change(head, (parent, child, owner))
            yield Change(head, (parent, child, owner, ("HSET", keys.node(head.decode()), "d", 10**14)))
            yield Change(head, (("HSET", keys.node(head.decode()), "r", runs[below]),))


_OF_KIND = {
    "hash": _of_hash,
    "string": _of_string,
    "zset": _of_zset,
    "set": _of_set,
    "stream": _of_stream,
}
