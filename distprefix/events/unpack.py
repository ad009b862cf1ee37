"""Messages of engines, from bytes to plain values. Pure.

Nothing of a message is trusted. Before anything is allocated, one pass that builds nothing proves that every list, map
and string is as long as it claims; what is built afterwards is at most a fixed multiple of the message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import Any, cast

from msgpack import Unpacker, UnpackException, unpackb

from distprefix.errors import EventFormatError

__all__ = ["PAYLOAD_LIMIT", "unpack_batch"]

PAYLOAD_LIMIT = 64 << 20
"""Bytes in a message; a longer one is refused."""
_AT_ONCE = 1 << 20  # up to here a message is unpacked as a whole: at worst 80 times as much memory
_EVENT_LIMIT = 8 << 20  # an event in a longer message: two million tokens
_BYTES_PER_CONTAINER = 8  # in a longer message; real events have 14 and more
_EVENTS = 1 << 18  # in a message: engines send hundreds, a hostile one must not take minutes
_NO_BATCH = "a batch is an array of a time, an array of events and a rank, or a map of ts, events and a rank"
_EVENTS_PLACE = 1
_PLACES = {
    key: place
    for place, names in enumerate((("ts",), ("events",), ("data_parallel_rank", "attn_dp_rank", "dp_rank")))
    for name in names
    for key in (name, name.encode())
}
_LONGEST_NAME = 24
_FIXMAP = 0x80


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
    if type(batch) is dict:
        batch = _listed(cast("dict[Any, Any]", batch))
    if type(batch) is not list or len(batch) < 2 or type(batch[1]) is not list:
        raise EventFormatError(_NO_BATCH)
    _check_count(len(batch[1]))
    return batch[0], batch[1], batch[2] if len(batch) > 2 else None


def _listed(fields: dict[Any, Any]) -> list[Any]:
    """A batch that came as a map, as the array that it stands for."""
    found: list[Any] = [None, None, None]
    for name, value in fields.items():
        place = _PLACES.get(name)
        if place is not None and found[place] is None:
            found[place] = value
    return found


def _one_by_one(payload: bytes) -> tuple[Any, Iterable[Any], Any]:
    reader, whole = _reader(payload), memoryview(payload)
    is_map = _is_map(payload)
    length: int = reader.read_map_header() if is_map else reader.read_array_header()
    scalars: dict[int, Any] = {}
    start = claimed = -1
    for i in range(length):
        place = _PLACES.get(_scalar(_next(reader, whole), _LONGEST_NAME)) if is_map else i
        if place != _EVENTS_PLACE or start >= 0:
            part = _next(reader, whole)
            if place is not None:
                scalars.setdefault(place, _scalar(part))
            continue
        claimed = reader.read_array_header()
        _check_count(claimed)
        start = reader.tell()
        for _ in range(claimed):
            reader.skip()
    if start < 0 or (not is_map and length < 2):
        raise EventFormatError(_NO_BATCH)
    return scalars.get(0), _parts(_reader(payload), whole, start, claimed), scalars.get(2)


def _is_map(payload: bytes) -> bool:
    return payload[:1] in (b"\xde", b"\xdf") or payload[0] & 0xF0 == _FIXMAP


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


def _scalar(part: memoryview, longest: int = 9) -> Any:
    value = _build(part) if len(part) <= longest else _EXTENSION
    return _EXTENSION if type(value) in (list, dict) else value


def _counter(left: int) -> Callable[[Any], Any]:
    def count(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError("too many lists and maps")
        return container

    return count
