"""Values on their way over one connection: how far ahead they are asked for and sent, and where they go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Protocol

from distprefix import errors
from distprefix.redis.resp import LONGEST_VALUE, RefusedError, Wire, bulk
from distprefix.redis.runs import read_run

__all__ = ["ABSENT", "REFUSED", "STOP", "Buffer", "Sink", "Value", "length_of", "read_values", "write_values"]

Buffer = bytes | bytearray | memoryview
Value = tuple[str, Sequence[Buffer]]
ABSENT = -1
"""Length of a value that is not there."""
REFUSED = -2
"""Length of a value that could not be read: the server answered with an error."""
STOP = -3
"""What is made of an error after which no other value can be read."""
_AHEAD_BYTES = 4 * 1024 * 1024
"""Bytes of values asked for before they are read, at most, as far as one can know: the server copies all of them before
it answers anybody else."""
_UNANSWERED_BYTES = 16 * 1024 * 1024
"""Bytes of values sent before replies are read."""
_SMALL = 256 * 1024
"""Of values no longer than this as much is asked for ahead as is best for the kind of connection."""
_SEND_BYTES = 256 * 1024
"""Bytes that are sent at once: while a socket's buffer is full the server has work, and we can prepare the next."""
_GET = b"*2\r\n$3\r\nGET\r\n$%d\r\n%s\r\n"
_FEWEST, _MOST = 2, 512
"""At least and at most so many commands are under way: replies to writes, of which a quarter is sent at once, fit into
any socket's buffer, so that neither side can get stuck writing to the other."""


class Sink(Protocol):
    """Tells where a value goes: gives writable views whose lengths add up to `length`, or None to skip the bytes.

    The views of different values must not overlap. Where lengths are expected it may be asked again for a value, or in
    vain for one that does not come.
    """

    def __call__(self, index: int, length: int, /) -> Sequence[memoryview] | None: ...  # noqa: D102 - the class tells


def read_values(
    wire: Wire, keys: Sequence[str], sink: Sink, expected: Sequence[int], refused: Callable[[RefusedError], int]
) -> list[int]:
    """Read values into what `sink` gives; their lengths, -1 where there is none. `expected`: their lengths, or nothing.

    `refused` gets an error in place of a value and gives the length that counts: ABSENT where it says that there is no
    such value, REFUSED where it says nothing of it, STOP where it says nothing of any: all that follow are REFUSED.
    """
    reading = _Reading(wire, keys, sink, expected)
    wanted = True
    while reading.ask():
        try:
            if not wanted or not reading.read_expected():
                reading.read_one(wanted=wanted)
            if not wanted:
                reading.lengths[-1] = REFUSED
        except RefusedError as error:
            length = refused(error) if wanted else REFUSED
            if length == STOP:
                wanted = False
                reading.stop()
            reading.lengths.append(max(length, REFUSED))
    return reading.lengths + [REFUSED] * (len(keys) - len(reading.lengths))


class _Reading:
    def __init__(self, wire: Wire, keys: Sequence[str], sink: Sink, expected: Sequence[int]) -> None:
        self.lengths: list[int] = []
        self._wire, self._keys, self._sink, self._expected = wire, keys, sink, expected
        self._ends = [0, *accumulate(expected)]
        self._longest = max(expected, default=_AHEAD_BYTES // _FEWEST)  # until the first reply tells
        self._asked, self._most = 0, len(keys)

    def ask(self) -> bool:
        """Ask for more when little is on its way. Whether anything is."""
        index, coming = len(self.lengths), self._coming(self._asked)
        ahead = self._ahead()
        if self._asked < self._most and (coming <= ahead // 2 or self._asked - index < _FEWEST):
            until = self._asked
            while until < self._most and until - index < _MOST:
                if until - index >= _FEWEST and self._coming(until) >= ahead:
                    break
                until += 1
            asked = b"".join([_GET % (len(key), key) for key in map(str.encode, self._keys[self._asked : until])])
            if asked:
                self._wire.send([memoryview(asked)])
            self._asked = until
        return index < self._asked

    def stop(self) -> None:
        """Ask for nothing more."""
        self._most = self._asked

    def read_expected(self) -> bool:
        """Read values that have the lengths which they should have. False when the next one does not, or may not."""
        if not self._expected or not self._wire.is_drained:
            return False
        first, views, left = len(self.lengths), list[Sequence[memoryview]](), self._ahead() // 2
        for index in range(first, self._asked):
            length = self._expected[index]
            given = self._sink(index, length) if length else None
            if given is None:
                break
            views.append(given if _is_one(given, length) else _checked(given, length))
            left -= length
            if left <= 0:
                break
        lengths = self._expected[first : first + len(views)]
        came = read_run(self._wire, lengths, views) if views else 0
        self.lengths += lengths[:came]
        return came > 0

    def read_one(self, *, wanted: bool) -> None:
        """Read one value, or that there is none."""
        index, length = len(self.lengths), self._wire.length()
        views = self._sink(index, length) if wanted and length >= 0 else None
        if views is not None:
            self._wire.fill([*views] if _is_one(views, length) else _checked(views, length), length)
        elif length >= 0:
            self._wire.skip(length)
        if not self._expected:
            self._longest = max(self._longest if index else 1, length)
        self.lengths.append(length)

    def _ahead(self) -> int:
        """Bytes to have on their way."""
        return self._wire.ahead if self._longest <= _SMALL else _AHEAD_BYTES

    def _coming(self, until: int) -> int:
        """Bytes of the values from the next one on, as far as one can know."""
        index = len(self.lengths)
        return self._ends[until] - self._ends[index] if self._expected else (until - index) * self._longest


def write_values(
    wire: Wire, values: Sequence[Value], lengths: Sequence[int], options: Sequence[bytes], written: list[bool]
) -> None:
    """SET values, each the concatenation of its buffers, with further words; notes in `written` which were.

    After the first refusal no more is sent; it is raised when what is under way has been answered.
    """
    head = b"*%d\r\n$3\r\nSET\r\n" % (3 + len(options))
    end = b"\r\n" + b"".join(b"$%d\r\n%s\r\n" % (len(word), word) for word in options)
    ends = [0, *accumulate(lengths)]
    failed: RefusedError | None = None
    sent = answered = 0
    while answered < sent or (sent < len(values) and not failed):
        before = sent
        if not failed:
            sent = _send(wire, values, lengths, head, end, before)
        if (
            before < sent < len(values)
            and sent - answered < _MOST // 2
            and ends[sent] - ends[answered] < _UNANSWERED_BYTES
        ):
            continue
        # Of what was sent last the server still takes in the end: answers to what came before are here by now.
        while answered < before:
            done = wire.count_ok(before - answered)
            try:
                written[answered : answered + (done or 1)] = [True] * done or [wire.is_ok()]
            except RefusedError as error:
                failed = failed or error
            answered += done or 1
    if failed:
        raise failed


def _send(wire: Wire, values: Sequence[Value], lengths: Sequence[int], head: bytes, end: bytes, first: int) -> int:
    """Send some values, from `first` on; which is the next."""
    parts: list[memoryview] = []
    size, index, before = 0, first, b""
    while index < len(values) and size < _SEND_BYTES and index - first < _MOST // 4:
        key, buffers = values[index]
        parts.append(memoryview(b"%s%s%s$%d\r\n" % (before, head, bulk(key), lengths[index])))
        parts += _flat(buffers)
        size += lengths[index]
        before = end
        index += 1
    if parts:
        parts.append(memoryview(end))
        wire.send(parts)
    return index


def length_of(key: str, buffers: Sequence[Buffer]) -> int:
    """How long a value is; raises InvalidInputError where it cannot be written."""
    length = 0
    for buffer in buffers:
        view = memoryview(buffer)
        if not view.c_contiguous:
            raise errors.InvalidInputError(f"a buffer of the value of {key!r} is not contiguous bytes")
        length += view.nbytes
    if length > LONGEST_VALUE:
        raise errors.InvalidInputError(f"the value of {key!r} has {length} bytes: {LONGEST_VALUE} are allowed")
    return length


def _flat(buffers: Sequence[Buffer]) -> list[memoryview]:
    """Where the bytes are, without what is empty."""
    try:
        return [view.cast("B") for view in map(memoryview, buffers) if view.nbytes]
    except TypeError as error:
        raise errors.InvalidInputError(f"a buffer is not contiguous bytes: {error}") from error


def _is_one(views: Sequence[memoryview], length: int) -> bool:
    """Whether there is one view, just as long: the common case, seen in few steps."""
    return len(views) == 1 and length == views[0].nbytes == len(views[0]) and not views[0].readonly


def _checked(views: Sequence[memoryview], length: int) -> list[memoryview]:
    flat = _flat(views)
    total = sum(map(len, flat))
    if total != length or any(view.readonly for view in flat):
        raise errors.InvalidInputError(f"the sink gave {total} bytes, for a value of {length}: they must be writable")
    return flat
