"""What an engine sends again when it is asked: put together, also from several answers. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from distprefix.errors import ReplayError
from distprefix.events.frames import Frame

__all__ = ["END", "Answer"]

END = b"\xff" * 8
_MAX_FRAMES = 1_000_000
_FRAME_BYTES = 200
"""What a frame takes besides its payload."""
_NUMBER_BYTES = 8
_PARTS = range(2, 5)


class Answer:
    """Messages from `start` on, of which none behind `until` is needed; at most `max_bytes`."""

    def __init__(self, start: int, until: int | None, max_bytes: int) -> None:
        self._start = start
        self._until = until
        self._max_bytes = max_bytes
        self._size = 0
        self._seen = 0
        self._frames: dict[int, bytes] = {}
        self._next = start
        """The first message that did not come behind one that did."""
        self._grown = 0
        self._last = start - 1

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def is_begun(self) -> bool:
        """Whether anything came."""
        return self._seen > 0

    @property
    def is_complete(self) -> bool:
        """Whether all that is needed is there."""
        return self._until is not None and self._start in self._frames and self._next >= self._until

    @property
    def has_grown(self) -> bool:
        """Whether something new came since it was asked for."""
        return len(self._frames) > self._grown

    def wanted(self) -> int:
        """What to ask for: the first message that lacks, or all that follows the last one."""
        self._grown = len(self._frames)
        return self._next

    def add(self, parts: int, number: bytes, payload: bytes) -> bool:
        """A message of the answer. Whether it is the end. Raises ReplayError for what is none, or too much."""
        self._seen += 1
        if parts not in _PARTS or len(number) != _NUMBER_BYTES:
            raise ReplayError(f"sent what is no replay: {parts} parts, sequence {number[:16]!r}")
        if number == END and not payload:
            return True
        seq = int.from_bytes(number, "big")
        if seq not in self._frames:
            self._size += len(payload) + _FRAME_BYTES
        if self._seen > _MAX_FRAMES or self._size > self._max_bytes:
            raise ReplayError(f"sent too much: {self._seen} frames, {self._size} bytes, and no end")
        if number == END or (seq <= self._last and self._grown == 0 and seq >= self._start):
            raise ReplayError(f"sent sequence {seq} after {self._last}")
        if seq >= self._start:
            self._last = max(self._last, seq)
            self._frames.setdefault(seq, payload)
            self._advance(seq)
        return False

    def may_be_filled(self) -> bool:
        """Whether messages lack between some that came, and asking for them brought some the last time."""
        return self._next <= self._last and self.has_grown

    def frames(self) -> Iterator[Frame]:
        """What came, in order; each is forgotten when it is given."""
        for seq in sorted(self._frames):
            yield Frame(seq, self._frames.pop(seq))

    def _advance(self, seq: int) -> None:
        if len(self._frames) == 1:
            self._next = seq  # the engine has nothing older
        while self._next in self._frames:
            self._next += 1
