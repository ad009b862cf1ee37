"""Messages of engines, from bytes to plain values. Pure.

Nothing of a message is trusted. Before anything is allocated, one pass that builds nothing proves that every list, map
and string is as long as it claims; what is built afterwards is at most a fixed multiple of the message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any

from msgpack import Unpacker, UnpackException, unpackb

from distprefix.errors import EventFormatError

__all__ = ["PAYLOAD_LIMIT", "unpack_batch"]

PAYLOAD_LIMIT = 64 << 20
"""Bytes in a message; a longer one is refused."""
_AT_ONCE = 1 << 20  # up to here a message is unpacked as a whole: at worst 80 times as much memory
_EVENT_LIMIT = 8 << 20  # an event in a longer message: two million tokens
_BYTES_PER_CONTAINER = 8  # in a longer message; real events have 14 and more
_EVENTS = 1 << 18  # in a message: engines send hundreds, a hostile one must not take minutes


def unpack_batch(payload: bytes) -> tuple[Any, Iterable[Any], Any]:
    """Time, events and rank as they came; an event that cannot be built is something that no event is.

    Raises EventFormatError, at the latest while the events are gone through.
    """
    if len(payload) > PAYLOAD_LIMIT:
        raise EventFormatError(f"a message has at most {PAYLOAD_LIMIT} bytes, not {len(payload)}")
    try:
        reader = _reader(payload)
        reader.skip()  # builds nothing: afterwards every length is known to be true
        if reader.tell() != len(payload):
            raise EventFormatError(f"{len(payload) - reader.tell()} bytes follow the batch")
        if len(payload) <= _AT_ONCE and (batch := _whole(payload)) is not None:
            return batch
        return _one_by_one(payload)
    except (UnpackException, ValueError, TypeError, RecursionError) as error:
        if isinstance(error, EventFormatError):
            raise
        raise EventFormatError(f"no batch of events: {error or type(error).__name__}") from None


def _reader(payload: bytes) -> Any:
    size = max(len(payload), 1)
    reader = Unpacker(read_size=size, max_buffer_size=size)
    reader.feed(payload)
    return reader


_EXTENSION = object()  # stands for every msgpack extension: no event has one


def _refuse(_code: int, _data: bytes) -> object:
    return _EXTENSION


def _build(data: bytes | memoryview, hook: Callable[[Any], Any] | None = None) -> Any:
    return unpackb(
        data,
        strict_map_key=False,
        unicode_errors="surrogateescape",
        max_map_len=256,  # more keys could be made to collide
        ext_hook=_refuse,
        list_hook=hook,
        object_hook=hook,
    )


def _whole(payload: bytes) -> tuple[Any, Iterable[Any], Any] | None:
    try:
        batch = _build(payload)
    except (ValueError, TypeError):
        return None  # some part cannot be built; the others may
    if type(batch) is not list or len(batch) < 2 or type(batch[1]) is not list:
        raise EventFormatError("a batch is an array of a time, an array of events and a rank")
    _check_count(len(batch[1]))
    return batch[0], batch[1], batch[2] if len(batch) > 2 else None


def _one_by_one(payload: bytes) -> tuple[Any, Iterable[Any], Any]:
    reader, whole = _reader(payload), memoryview(payload)
    length = reader.read_array_header()
    if length < 2:
        raise EventFormatError("a batch is an array of a time, an array of events and a rank")
    at = _scalar(_next(reader, whole))
    claimed: int = reader.read_array_header()
    _check_count(claimed)
    start = reader.tell()
    rank: Any = None
    if length > 2:
        for _ in range(claimed):
            reader.skip()
        rank = _scalar(_next(reader, whole))
    return at, _parts(_reader(payload), whole, start, claimed), rank


def _check_count(claimed: int) -> None:
    if claimed > _EVENTS:
        raise EventFormatError(f"a batch has at most {_EVENTS} events, not {claimed}")


def _parts(reader: Any, whole: memoryview, start: int, claimed: int) -> Iterator[Any]:
    reader.read_bytes(start)
    for _ in range(claimed):
        part = _next(reader, whole)
        event: Any = _EXTENSION
        if len(part) <= _EVENT_LIMIT:
            with suppress(ValueError, TypeError):
                event = _build(part, _counter(64 + len(part) // _BYTES_PER_CONTAINER))
        yield event


def _next(reader: Any, whole: memoryview) -> memoryview:
    start = reader.tell()
    reader.skip()
    return whole[start : reader.tell()]


def _scalar(part: memoryview) -> Any:
    return _build(part) if len(part) <= 9 else _EXTENSION


def _counter(left: int) -> Callable[[Any], Any]:
    def count(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("too many lists and maps")
        return container

    return count
