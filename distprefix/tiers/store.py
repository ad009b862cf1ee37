"""Where payloads lie: one server's values, sealed and opened by one codec. Knows keys and parts, not the tree."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, TypeVar

from distprefix.errors import ConfigError, DamagedPayloadError, InvalidInputError
from distprefix.redis.data import DataPool
from distprefix.redis.keys import Keys
from distprefix.redis.transfers import Buffer
from distprefix.tiers.codecs import RAW, Codec, codec_named
from distprefix.tiers.encryption import KeyRing
from distprefix.tiers.envelope import HEADER_BYTES, open_into, read_header, seal

__all__ = ["PART_BYTES", "PayloadStore", "Want", "check_fits", "groups"]

T = TypeVar("T")
PART_BYTES = 8 * 1024 * 1024
"""Longer payloads lie in several values: a server that copies one of 512 MiB answers nobody else."""
_UNTOLD_MS = 600_000
"""What the tree was never told of goes by itself after so long: nobody has to search for it."""
_GROUP_BYTES = 64 * 1024 * 1024


class Want(NamedTuple):
    """One payload to be read."""

    chunk: bytes
    size: int
    """As stored, header included."""
    target: memoryview | None = None
    """Where it is wanted; None for memory of its own."""


class PayloadStore:
    """The payloads of one tier. Opens connections with the first of them. Thread-safe."""

    def __init__(self, url: str, keys: Keys, codec: str, ring: KeyRing | None, *, cold: bool, timeout_s: float) -> None:
        self.cold = cold
        self._url = url
        self._keys = keys
        self._codec = codec
        self._ring = ring
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._pool: DataPool | None = None

    @property
    def pool(self) -> DataPool:
        """The connections."""
        with self._lock:
            if self._pool is None:
                self._pool = DataPool(self._url, timeout_s=self._timeout_s)
            return self._pool

    @cached_property
    def _packer(self) -> Codec:
        """Looked for with the first payload: who stores none needs no library for it."""
        return codec_named(self._codec)

    def close(self) -> None:
        """Close the connections."""
        if self._pool is not None:
            self._pool.close()

    def write(self, payloads: Sequence[tuple[bytes, Buffer]], deadline: float) -> list[int]:
        """Write payloads, by chunk; they go by themselves unless the tree is told of them. Returns their sizes.

        What is there already stays. Raises UnavailableError and InvalidInputError.
        """
        return self._write(payloads, deadline)[0]

    def copy(self, payloads: Sequence[tuple[bytes, Buffer]], deadline: float) -> list[int] | None:
        """As `write`; None if something else was there and stays, as a copy packed otherwise."""
        sizes, written = self._write(payloads, deadline)
        if not all(written):
            wants = [Want(chunk, size) for (chunk, _), size in zip(payloads, sizes, strict=True)]
            if any(isinstance(read, str) for read in self.read(wants, deadline)):
                return None
        return sizes

    def read(self, wants: Sequence[Want], deadline: float) -> list[memoryview | str]:
        """For each a payload, or what is wrong with it: missing, damaged, unreadable. Raises UnavailableError.

        A payload that is stored as it is is received where it is wanted.
        """
        headers = [memoryview(bytearray(HEADER_BYTES)) for _ in wants]
        bodies = [_body_of(want) for want in wants]
        places = [(i, part) for i, want in enumerate(wants) for part in range(_parts_in(want.size))]

        def sink(index: int, length: int) -> Sequence[memoryview] | None:
            i, part = places[index]
            if length != expected[index]:
                return None
            at = part * PART_BYTES - HEADER_BYTES
            return (bodies[i][at : at + length],) if part else (headers[i], bodies[i][: length - HEADER_BYTES])

        keys = [self._keys.payload(wants[i].chunk.hex(), part, cold=self.cold) for i, part in places]
        expected = [_part_size(wants[i].size, part) for i, part in places]
        lengths = self.pool.get(keys, sink, deadline, expected)
        wrong: dict[int, str] = {}
        for (i, _), length, right in zip(places, lengths, expected, strict=True):
            if length != right:
                wrong[i] = "missing" if length < 0 else "damaged"
        return [wrong.get(i) or self._open(want, headers[i], bodies[i]) for i, want in enumerate(wants)]

    def _write(self, payloads: Sequence[tuple[bytes, Buffer]], deadline: float) -> tuple[list[int], list[bool]]:
        """Their sizes, and which of their parts were not there before."""
        sizes: list[int] = []
        written: list[bool] = []
        group: list[tuple[str, Sequence[Buffer]]] = []
        waiting = 0
        for chunk, payload in payloads:
            header, body = seal(chunk, payload, self._packer, self._ring)
            parts = list(self._parts(chunk.hex(), header, memoryview(body).cast("B")))
            group += reversed(parts)  # the first one last: where it is, all are
            sizes.append(len(header) + memoryview(body).nbytes)
            waiting += sizes[-1]
            if waiting >= _GROUP_BYTES:
                written += self.pool.set(group, deadline, ttl_ms=_UNTOLD_MS, only_new=True)
                group, waiting = [], 0
        if group:
            written += self.pool.set(group, deadline, ttl_ms=_UNTOLD_MS, only_new=True)
        return sizes, written

    def _parts(self, chunk: str, header: bytes, body: memoryview) -> Iterator[tuple[str, Sequence[Buffer]]]:
        at = PART_BYTES - len(header)
        yield self._keys.payload(chunk, cold=self.cold), (header, body[:at])
        for number in range(1, _parts_in(len(header) + len(body))):
            yield self._keys.payload(chunk, number, cold=self.cold), (body[at : at + PART_BYTES],)
            at += PART_BYTES

    def _open(self, want: Want, header: memoryview, body: memoryview) -> memoryview | str:
        try:
            told = read_header(want.chunk, header)
            if want.target is not None:
                check_fits(told.length, want.target)
            if told.key_id not in (self._ring.ids if self._ring else (0,)):
                return "unreadable"  # sealed with a key that others have: not damaged
            target = want.target
            if target is None:
                is_plain = told.codec is RAW and not told.key_id
                target = body if is_plain else memoryview(bytearray(told.length))
            open_into(want.chunk, header, body, target, self._ring, told)
        except DamagedPayloadError:
            return "damaged"
        except ConfigError:
            return "unreadable"
        return target


def check_fits(length: int, target: memoryview) -> None:
    """Raise InvalidInputError unless a payload of this length just fills the buffer."""
    if len(target) != length:
        raise InvalidInputError(f"a payload has {length} bytes, the buffer for it {len(target)}: give one that fits")


def groups(items: Iterable[T], size_of: Callable[[T], int], least: int) -> Iterator[list[T]]:
    """The items in groups, each ended by the item with which it has at least so many bytes."""
    group: list[T] = []
    size = 0
    for item in items:
        group.append(item)
        size += size_of(item)
        if size >= least:
            yield group
            group, size = [], 0
    if group:
        yield group


def _parts_in(size: int) -> int:
    return max(1, -(-size // PART_BYTES))


def _part_size(size: int, part: int) -> int:
    return min(PART_BYTES, size - part * PART_BYTES)


def _body_of(want: Want) -> memoryview:
    """Where to receive what follows the header: the caller's own buffer if it may fit."""
    size = max(0, want.size - HEADER_BYTES)
    if want.target is not None and len(want.target) == size:
        return want.target
    return memoryview(bytearray(size))
