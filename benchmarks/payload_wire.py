"""What the data path moves in a second, against redis-py and against a bare socket: python benchmarks/payload_wire.py.

Every side moves the same values between the same server and the same buffers, in turns. redis-py gives values of its
own, which are then copied to the caller's buffer, since that is what it takes. The bare socket sends the same commands,
all at once, and reads or writes without looking at a byte: nothing written in Python can be faster.
"""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import redis
from measure import Case, Figure, interleave, run_parts
from redis._parsers import _HiredisParser, _RESP2Parser

from distprefix.redis.data import DataPool

_KIB = 1024
_SIZES = {"64 KiB": (64 * _KIB, 128), "2 MiB": (2048 * _KIB, 16), "32 MiB": (32_768 * _KIB, 2)}
"""Length of a value and values in a call."""
_ROUNDS = {"64 KiB": 30, "2 MiB": 15, "32 MiB": 7}


def main() -> None:
    """Run what was asked for and print it."""
    run_parts(_PARTS, __doc__)


def unix(url: str, scale: float) -> list[Figure]:
    """Over the Unix socket."""
    return [figure for size in _SIZES for figure in _measure("Unix", url, size, scale)]


def tcp(url: str, scale: float) -> list[Figure]:
    """Over TCP, to the same server."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    with redis.Redis.from_url(url) as plain:
        plain.config_set("port", str(port))
    return [figure for size in _SIZES for figure in _measure("TCP", f"redis://127.0.0.1:{port}", size, scale)]


_PARTS = {"unix": unix, "tcp": tcp}


class _Bare:
    """A socket that moves the bytes of prepared commands and their replies, and counts them."""

    def __init__(self, url: str, keys: list[str], sources: list[memoryview], targets: list[memoryview]) -> None:
        if url.startswith("unix://"):
            self._socket = socket.socket(socket.AF_UNIX)
            self._socket.connect(url.removeprefix("unix://"))
        else:
            self._socket = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._gets = b"".join(b"*2\r\n$3\r\nGET\r\n" + _bulk(key) for key in keys)
        self._sets: list[Any] = []
        for key, source in zip(keys, sources, strict=True):
            self._sets += [b"*3\r\n$3\r\nSET\r\n" + _bulk(key) + b"$%d\r\n" % len(source), source, b"\r\n"]
        self._around = sum(len(b"$%d\r\n\r\n" % len(target)) for target in targets)
        self._targets = targets
        self._ok = 5 * len(keys)

    def get(self) -> None:
        """Read as many bytes as the replies have, into the buffers that the values belong to, off by the heads."""
        self._socket.sendall(self._gets)
        for target in self._targets:
            self._read(target)
        self._read(memoryview(bytearray(self._around)))

    def set(self) -> None:
        """Write all commands, gathered; then read as many bytes as the replies have."""
        parts = [memoryview(part) for part in self._sets]
        while parts:
            sent = self._socket.sendmsg(parts[:1000])
            while parts and sent >= len(parts[0]):
                sent -= len(parts.pop(0))
            if sent:
                parts[0] = parts[0][sent:]
        self._read(memoryview(bytearray(self._ok)))

    def close(self) -> None:
        """Close it."""
        self._socket.close()

    def _read(self, target: memoryview) -> None:
        while target:
            target = target[self._socket.recv_into(target) :]


def _measure(where: str, url: str, name: str, scale: float) -> Iterator[Figure]:
    size, count = _SIZES[name]
    noise = random.Random(7).randbytes(64 * _KIB)
    sources = [memoryview(bytearray(noise * (size // len(noise)))) for _ in range(count)]
    targets = [memoryview(bytearray(size)) for _ in range(count)]
    keys = [f"{name[:2]}:{index}" for index in range(count)]
    with contextlib.ExitStack() as stack:
        pool = DataPool(url, timeout_s=10)
        stack.callback(pool.close)
        bare = stack.enter_context(contextlib.closing(_Bare(url, keys, sources, targets)))
        clients: dict[str, redis.Redis] = {
            "redis-py": redis.Redis.from_url(url, protocol=2, parser_class=_RESP2Parser),
            "hiredis": redis.Redis.from_url(url, protocol=2, parser_class=_HiredisParser),
        }
        for client in clients.values():
            stack.callback(client.close)
        loads: dict[str, Callable[[], object]] = {
            "ours": lambda: pool.get(
                keys, lambda index, _: targets[index : index + 1], time.monotonic() + 60, [size] * count
            ),
            "bare": bare.get,
            **{kind: _load_with(client, keys, targets) for kind, client in clients.items()},
        }
        stores: dict[str, Callable[[], object]] = {
            "ours": lambda: pool.set([(key, [v]) for key, v in zip(keys, sources, strict=True)], time.monotonic() + 60),
            "bare": bare.set,
            **{kind: _store_with(client, keys, sources) for kind, client in clients.items()},
        }
        stores["ours"]()
        for kind in ("ours", *clients):
            for target in targets:
                target[:8] = bytes(8)
            loads[kind]()
            assert targets == sources, f"{kind} does not read what was written"
        rounds = max(5, int(_ROUNDS[name] * scale))
        load = interleave({kind: Case(run) for kind, run in loads.items()}, rounds)
        store = interleave({kind: Case(run) for kind, run in stores.items()}, rounds)
        with redis.Redis.from_url(url) as plain:
            plain.delete(*keys)
    total = size * count
    goals = (("redis-py", 3.0), ("hiredis", 1.5), ("bare", 0.85))
    for other, target in goals:
        yield _figure(f"load, {name}, {where}, against {_LONG[other]}", load, other, target, total)
    for other, target in (("redis-py", 0.0), ("hiredis", 0.0), ("bare", 0.85)):
        yield _figure(f"store, {name}, {where}, against {_LONG[other]}", store, other, target, total)


_LONG = {"redis-py": "redis-py without hiredis", "hiredis": "redis-py with hiredis", "bare": "a bare socket"}


def _figure(what: str, times: dict[str, float], other: str, target: float, total: int) -> Figure:
    ours, theirs = (f"{total / times[name] / 1000:.2f} GB/s" for name in ("ours", other))
    return Figure(what, ours, theirs, times[other] / times["ours"], ">=" if target else "", target, "x")


def _load_with(client: redis.Redis, keys: list[str], targets: list[memoryview]) -> Callable[[], object]:
    def load() -> None:
        pipeline: Any = client.pipeline(transaction=False)
        for key in keys:
            pipeline.get(key)
        for target, value in zip(targets, pipeline.execute(), strict=True):
            target[:] = value

    return load


def _store_with(client: redis.Redis, keys: list[str], sources: list[memoryview]) -> Callable[[], object]:
    def store() -> None:
        pipeline: Any = client.pipeline(transaction=False)
        for key, source in zip(keys, sources, strict=True):
            pipeline.set(key, source)
        pipeline.execute()

    return store


def _bulk(text: str) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(text), text.encode())


if __name__ == "__main__":
    main()
