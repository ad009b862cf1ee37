"""The payloads of one tier: one server's values, sealed and opened by one codec. Knows keys and parts, not the tree.

A payload of up to 8 MiB is one value, written only where there is none. A longer one is several, and all of them are of
one upload: the parts are written first, under names that no other upload has, and the first value, which names the
upload, last and only where there is none. So a reader that has the first value reads the parts of its writer; what a
writer left half done hinders no other and expires; and the writer that comes second removes its own parts.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

from distprefix.errors import (
    ConfigError,
    DamagedPayloadError,
    InvalidInputError,
    UnavailableError,
    UnreadablePayloadError,
)
from distprefix.redis.data import DataPool
from distprefix.redis.keys import Keys
from distprefix.redis.transfers import REFUSED, Buffer
from distprefix.tiers.codecs import RAW, Codec, codec_named
from distprefix.tiers.encryption import KeyRing
from distprefix.tiers.envelope import (
    HEADER_BYTES,
    PART_BYTES,
    UPLOAD_BYTES,
    Header,
    longest_stored,
    open_into,
    read_header,
    seal,
)

__all__ = ["UNFIT", "Flaw", "PayloadStore", "Want", "groups"]

T = TypeVar("T")
_FIRST_TTL_MS = 600_000
"""What the tree does not come to name expires after so long: no process has to search for it."""
_PART_TTL_MS = _FIRST_TTL_MS + 60_000
"""Parts outlive the value that names them, however long it takes to write that: a first value never stands alone."""
_GROUP_BYTES = 64 * 1024 * 1024
_MAX_DIGEST_BYTES = 1024 * 1024
"""Longer values are compared by their header and length alone: a script must not read them."""


class Want(NamedTuple):
    """One payload to be read."""

    chunk: bytes
    size: int
    """As stored, header included."""
    target: memoryview | None = None
    """Where it is wanted; None for memory of its own."""


@dataclass(frozen=True, slots=True)
class Flaw:
    """Why a payload cannot be used, and what was seen of it."""

    reason: str
    """missing, damaged, unreadable, unfit or unavailable."""
    header: bytes = b""
    """Of a value that came whole and failed its check."""
    digest: str = ""
    """SHA-1 of that value; empty where it is long."""


_MISSING = Flaw("missing")
_DAMAGED = Flaw("damaged")
_UNREADABLE = Flaw("unreadable")
_UNAVAILABLE = Flaw("unavailable")
UNFIT = Flaw("unfit")
"""The payload has another length than the caller's buffer."""


@dataclass(slots=True)
class _Reading:
    """A payload while it is being read."""

    want: Want
    header: memoryview
    body: memoryview
    flaw: Flaw | None = None

    def views(self, part: int) -> Sequence[memoryview]:
        """Where a part is received."""
        if self.want.size <= PART_BYTES:
            return (self.header, self.body)
        at = part * PART_BYTES - HEADER_BYTES
        size = self.length(part)
        return (self.body[at : at + size],) if part else (self.header, self.body[: size - HEADER_BYTES])

    def length(self, part: int) -> int:
        """How long a part has to be."""
        return min(PART_BYTES, self.want.size - part * PART_BYTES)

    def seen(self) -> Flaw:
        """That the payload came whole and failed its check."""
        digest = ""
        if self.want.size <= _MAX_DIGEST_BYTES:
            value = hashlib.sha1(self.header, usedforsecurity=False)
            value.update(self.body)
            digest = value.hexdigest()
        return Flaw("damaged", bytes(self.header), digest)


class PayloadStore:
    """The payloads of one tier. Opens connections with the first of them. Thread-safe."""

    def __init__(
        self,
        keys: Keys,
        codec: str,
        ring: KeyRing | None,
        pool: DataPool,
        *,
        cold: bool,
        context: Callable[[], bytes],
        max_payload_bytes: int,
    ) -> None:
        """`context`: what payloads are bound to now. Longer ones than `max_payload_bytes` are not read."""
        self.cold = cold
        self._context = context
        self._max_payload_bytes = max_payload_bytes
        self.pool = pool
        """The connections."""
        self._keys = keys
        self._codec = codec
        self._ring = ring

    @cached_property
    def _packer(self) -> Codec:
        """Looked for with the first payload: who stores none needs no library for it."""
        return codec_named(self._codec)

    def close(self) -> None:
        """Close the connections."""
        self.pool.close()

    def write(self, payloads: Sequence[tuple[bytes, Buffer]], deadline: float) -> list[int]:
        """Write payloads, by chunk; they expire unless the tree comes to name them. Returns their sizes.

        What is there already stays. Raises UnavailableError and InvalidInputError.
        """
        return self._write(payloads, deadline)[0]

    def copy(self, payloads: Sequence[tuple[bytes, Buffer]], deadline: float) -> list[int] | None:
        """As `write`; None if something else was there and stays, as a copy packed otherwise."""
        sizes, written = self._write(payloads, deadline)
        if not all(written):
            wants = [Want(chunk, size) for (chunk, _), size in zip(payloads, sizes, strict=True)]
            if any(isinstance(read, Flaw) for read in self.read(wants, deadline)):
                return None
        return sizes

    def read(self, wants: Sequence[Want], deadline: float) -> list[memoryview | Flaw]:
        """For each a payload, or why there is none. Raises UnavailableError.

        A payload that is stored as it is is received where it is wanted.
        """
        readings = [self._reading(want) for want in wants]
        firsts = [
            (reading, self._keys.payload(reading.want.chunk.hex(), cold=self.cold), 0)
            for reading in readings
            if reading.flaw is None
        ]
        self._receive(firsts, deadline)
        long = [reading for reading in readings if reading.want.size > PART_BYTES and reading.flaw is None]
        if long:
            self._receive([place for reading in long for place in self._other_parts(reading)], deadline)
        return [reading.flaw or self._open(reading) for reading in readings]

    def _reading(self, want: Want) -> _Reading:
        """A payload to be read. One that the tree says to be longer than it can be gets no memory."""
        most = self._max_payload_bytes if want.target is None else len(want.target)
        reading = _Reading(want, memoryview(bytearray(HEADER_BYTES)), memoryview(b""))
        if HEADER_BYTES < want.size <= longest_stored(most):
            reading.body = _body_of(want)
        else:
            is_other = want.target is not None and want.size <= longest_stored(self._max_payload_bytes)
            reading.flaw = UNFIT if is_other else _DAMAGED
        return reading

    def confirms(self, want: Want, flaw: Flaw, deadline: float) -> bool:
        """Whether the server says of its own, as a primary of some standing, that a payload still is as it was seen.

        For a server whose values the tree's scripts cannot compare. A key of another type is no payload. Two short
        calls; a read of the payload if it came whole and failed its check. Raises UnavailableError.
        """
        first = self._keys.payload(want.chunk.hex(), cold=self.cold).encode()
        role, kind, header = self.pool.ask(
            [(b"ROLE",), (b"TYPE", first), (b"GETRANGE", first, b"0", b"%d" % (HEADER_BYTES - 1))], deadline
        )
        said = role[0] if isinstance(role, list) else self.pool.endpoint.identity.role.encode()
        is_owner = said in (b"", b"master") and self.pool.endpoint.is_settled
        if not is_owner or not isinstance(kind, bytes):
            return False
        if kind != b"string":
            return flaw.reason == "missing"
        if flaw.header:
            return self.read([want], deadline)[0] == flaw
        if not isinstance(header, bytes) or (flaw.reason == "missing" and want.size <= PART_BYTES):
            return False
        reading = _Reading(want, memoryview(header), memoryview(b""))
        parts = self._other_parts(reading) if want.size > PART_BYTES else []
        keys = [first, *(key.encode() for _, key, _ in parts)]
        replies = self.pool.ask([(word, key) for key in keys for word in (b"TYPE", b"STRLEN")], deadline)
        expected = [reading.length(0), *(reading.length(part) for _, _, part in parts)]
        return _lengths_of(replies) not in (None, expected)

    def _other_parts(self, reading: _Reading) -> list[tuple[_Reading, str, int]]:
        """The parts that follow the first, as its header names them."""
        chunk = reading.want.chunk
        try:
            upload = read_header(chunk, reading.header, context=self._context()).upload.hex()
        except DamagedPayloadError:
            reading.flaw = Flaw("damaged", bytes(reading.header))
            return []
        return [
            (reading, self._keys.part(chunk.hex(), upload, number, cold=self.cold), number)
            for number in range(1, -(-reading.want.size // PART_BYTES))
        ]

    def _receive(self, places: Sequence[tuple[_Reading, str, int]], deadline: float) -> None:
        """Receive parts of payloads, by key and number; one that is not as it has to be is a flaw of its payload."""
        expected = [reading.length(part) for reading, _, part in places]
        views = [reading.views(part) for reading, _, part in places]

        def sink(index: int, length: int) -> Sequence[memoryview] | None:
            return views[index] if length == expected[index] else None

        lengths = self.pool.get([key for _, key, _ in places], sink, deadline, expected)
        for (reading, _, _), length, right in zip(places, lengths, expected, strict=True):
            if length == REFUSED:
                reading.flaw = _UNAVAILABLE
            elif length != right and reading.flaw is None:
                reading.flaw = _MISSING if length < 0 else Flaw("damaged")

    def _write(self, payloads: Sequence[tuple[bytes, Buffer]], deadline: float) -> tuple[list[int], list[bool]]:
        """Their sizes, and which of them were not there before."""
        sizes: list[int] = []
        written: list[bool] = []
        for group in groups(self._seal(payloads), lambda each: each.size, _GROUP_BYTES):
            sizes += [each.size for each in group]
            written += self._write_group(group, deadline)
        return sizes, written

    def _seal(self, payloads: Sequence[tuple[bytes, Buffer]]) -> Iterator[_Sealed]:
        uploads = os.urandom(UPLOAD_BYTES * len(payloads))
        for i, (chunk, payload) in enumerate(payloads):
            upload = uploads[i * UPLOAD_BYTES : (i + 1) * UPLOAD_BYTES]
            size = memoryview(payload).nbytes
            if size > self._max_payload_bytes:
                raise InvalidInputError(
                    f"a payload has {size} bytes, and max_payload_bytes is {self._max_payload_bytes}: no reader would "
                    "take it; raise max_payload_bytes wherever the namespace is used"
                )
            header, body = seal(chunk, payload, self._packer, self._ring, upload, context=self._context())
            yield _Sealed(chunk, upload, header, memoryview(body).cast("B"))

    def _write_group(self, group: Sequence[_Sealed], deadline: float) -> list[bool]:
        """Write the parts, then the first values. What no first value comes to name is removed, or expires."""
        parts = [value for each in group for value in self._parts(each)]
        if parts:
            lasts_ms = _PART_TTL_MS + max(0, int(1000 * (deadline - time.monotonic())))
            try:
                self.pool.set(parts, deadline, ttl_ms=lasts_ms)
            except UnavailableError:
                self._discard(group, deadline)
                raise
        firsts = [(self._keys.payload(each.chunk.hex(), cold=self.cold), each.first) for each in group]
        written = self.pool.set(firsts, deadline, ttl_ms=_FIRST_TTL_MS, only_new=True)
        self._discard([each for each, is_new in zip(group, written, strict=True) if not is_new], deadline)
        return written

    def _discard(self, group: Sequence[_Sealed], deadline: float) -> None:
        """Remove the parts of uploads that no first value names. One call for 512 parts; without it they expire."""
        with suppress(UnavailableError):
            self.pool.delete([key for each in group for key, _ in self._parts(each)], deadline)

    def _parts(self, sealed: _Sealed) -> Iterator[tuple[str, Sequence[Buffer]]]:
        """Keys and bytes of all parts but the first."""
        at = PART_BYTES - len(sealed.header)
        number = 1
        while at < len(sealed.body):
            key = self._keys.part(sealed.chunk.hex(), sealed.upload.hex(), number, cold=self.cold)
            yield key, (sealed.body[at : at + PART_BYTES],)
            at += PART_BYTES
            number += 1

    def _open(self, reading: _Reading) -> memoryview | Flaw:
        want = reading.want
        try:
            context = self._context()
            header = read_header(want.chunk, reading.header, context=context)
            if HEADER_BYTES + header.stored != want.size or header.length > self._max_payload_bytes:
                return reading.seen()
            if want.target is not None and header.length != len(want.target):
                return UNFIT
            if header.key_id not in (self._ring.ids if self._ring else (0,)):
                return _UNREADABLE  # sealed with a key that others have: not damaged
            target = want.target if want.target is not None else self._memory_for(header, reading.body)
            open_into(want.chunk, reading.header, reading.body, target, self._ring, header, context=context)
        except DamagedPayloadError:
            return reading.seen()
        except (ConfigError, UnreadablePayloadError):
            return _UNREADABLE
        return target

    @staticmethod
    def _memory_for(header: Header, body: memoryview) -> memoryview:
        is_plain = header.codec is RAW and not header.key_id
        return body if is_plain else memoryview(bytearray(header.length))


class _Sealed(NamedTuple):
    """A payload as it is written."""

    chunk: bytes
    upload: bytes
    header: bytes
    body: memoryview

    @property
    def size(self) -> int:
        return len(self.header) + len(self.body)

    @property
    def first(self) -> Sequence[Buffer]:
        """The bytes of the first value."""
        return (self.header, self.body[: PART_BYTES - len(self.header)])


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


def _lengths_of(replies: Sequence[Any]) -> list[int] | None:
    """Lengths from replies to TYPE and STRLEN in turn, 0 for what is no string; None where one was refused."""
    lengths: list[int] = []
    for kind, length in zip(replies[::2], replies[1::2], strict=True):
        if not isinstance(kind, bytes) or (kind == b"string" and not isinstance(length, int)):
            return None
        lengths.append(length if kind == b"string" else 0)
    return lengths


def _body_of(want: Want) -> memoryview:
    """Where to receive what follows the header: the caller's own buffer if it may fit."""
    size = max(0, want.size - HEADER_BYTES)
    if want.target is not None and len(want.target) == size:
        return want.target
    return memoryview(bytearray(size))
