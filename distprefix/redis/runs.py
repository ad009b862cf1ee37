"""Values whose lengths are known before they come: one system call reads many, each into its own buffers.

All that a server says between such values is known too: their heads and ends. It is received beside them and compared,
once a call. Where it says something else, as of a value that is not there, all that came from there on goes back to the
wire, to be read one by one: it lies in wrong places, which are filled anew.
"""

from __future__ import annotations

import socket
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from distprefix.redis.resp import Wire, WireError

__all__ = ["read_run"]

_AT_ONCE = 1024 * 1024
"""Bytes that a call is given room for: further buffers only cost time."""
_PARTS = 512
"""Buffers that a call is given."""
_END = b"\r\n"


def read_run(wire: Wire, lengths: Sequence[int], views: Sequence[Sequence[memoryview]]) -> int:
    """Read values into their views, none of them empty; how many came as expected, before the first that did not.

    That one, whatever it is, is what the wire reads next. Raises WireError.
    """
    return _Run(lengths, views).read(wire)


class _Run:
    """What is to come, part by part: what the server says before a value, the value's views, and so on."""

    def __init__(self, lengths: Sequence[int], views: Sequence[Sequence[memoryview]]) -> None:
        heads = {length: b"\r\n$%d\r\n" % length for length in set(lengths)}
        said = [heads[lengths[0]][len(_END) :], *(heads[length] for length in lengths[1:]), _END]
        self._said = b"".join(said)
        self._heard = bytearray(len(self._said))
        self._starts = [0, *accumulate(map(len, said))]
        """Where each begins of what the server says."""
        room = memoryview(self._heard)
        self._parts: list[memoryview] = []
        self._places: list[int] = []
        """The part in which each of it comes."""
        start = 0
        for stop, value in zip(self._starts[1:], (*views, ()), strict=True):
            self._places.append(len(self._parts))
            self._parts.append(room[start:stop])
            self._parts += value
            start = stop
        self._ends = [*accumulate(map(len, self._parts))]
        self._at_once = min(_PARTS, 4 + len(self._parts) * _AT_ONCE // self._ends[-1])

    def read(self, wire: Wire) -> int:
        parts, ends, places, starts = self._parts, self._ends, self._places, self._starts
        came = part = got = place = known = (
            0  # bytes, the part that they end in, how much of it, and what was said next
        )
        while came < ends[-1]:
            said = places[place]
            if said > part and ends[said - 1] - came > wire.at_once:
                rest, flags = parts[part:said], socket.MSG_WAITALL  # sure to come, as its head did
            else:
                rest, flags = parts[part : part + self._at_once], 0
            if got:
                rest[0] = rest[0][got:]
            came += wire.read(rest, flags)
            part = bisect_right(ends, came, part)
            got = came - ends[part - 1] if part else came
            place = bisect_left(places, part, place)
            before, known = known, starts[place] + (got if place < len(places) and places[place] == part else 0)
            if known > before and not self._said.startswith(self._heard[before:known], before):
                return self._give_back(wire, known, part, got)
        return len(places) - 1

    def _give_back(self, wire: Wire, known: int, part: int, got: int) -> int:
        """Find the first value that is not as expected, and let the wire have all from its head on.

        `known`: how much came of what the server says; `got`: how much of a part, behind all parts before it.
        """
        wrong = next(i for i in range(known) if self._heard[i] != self._said[i])
        index = bisect_right(self._starts, wrong) - 1
        end = len(_END) if index else 0
        if wrong < self._starts[index] + end:
            raise WireError("protocol", "a value is not as long as the server announced")
        came = [*self._parts[:part], *(each[:got] for each in self._parts[part : part + 1])]
        first = self._places[index]
        wire.unread(b"".join((came[first][end:], *came[first + 1 :])))
        return index
