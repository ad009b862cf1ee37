"""The data path: KV payloads of 64 KiB to 512 MiB on connections of their own: look-ups never queue behind them.

Values are read straight into the caller's buffers and written straight from them. Nothing is sent twice: a call that
fails has done part of its work, or all of it, and `WriteError.written` says what is known to be written.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager

from distprefix import errors
from distprefix.redis.address import Address, address_of
from distprefix.redis.resp import RefusedError, Wire, WireError
from distprefix.redis.transfers import Sink, Value, length_of, read_values, write_values

__all__ = ["DataPool", "WriteError"]

_ONE_KEY = ("ERR", "WRONGTYPE")
"""Errors that say something of a key; all others say something of the server, or of what we may do there."""
_REASONS = {"OOM": "out of memory", "NOAUTH": "auth", "WRONGPASS": "auth", "NOPERM": "permission", "LOADING": "loading"}
_UNLINK_KEYS = 512


class WriteError(errors.UnavailableError):
    """Not everything was written. Where `written` is False nobody knows, but for an OOM: then it is not there."""

    def __init__(self, message: str, written: list[bool]) -> None:
        super().__init__(message)
        self.written = written


class DataPool:
    """Reads and writes values; opens connections when they are needed and keeps up to `size`. Thread-safe.

    Every call ends with its `deadline` (time.monotonic), but for the resolution of a host name; `timeout_s` is the
    longest that connecting may take. A call that fails closes its connection and raises UnavailableError.
    """

    def __init__(self, where: Address | str, *, timeout_s: float, size: int = 4) -> None:
        self.failures: Counter[str] = Counter()
        """Failed calls, and values that could not be read, by reason."""
        self.calls = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self._timeout_s = timeout_s
        self._size = size
        self._lock = threading.Lock()
        self._idle: list[Wire] = []
        self._process = os.getpid()
        self._address = address_of(where)

    def get(self, keys: Sequence[str], sink: Sink, deadline: float, expected: Sequence[int] | None = None) -> list[int]:
        """Read values into what `sink` gives for each; returns their lengths, -1 where there is none to be had.

        `expected`: lengths that the values should have. Those that have them come in fewer system calls. When it
        raises, the views may hold anything.
        """
        if not keys:
            return []
        if expected is not None and len(expected) != len(keys):
            raise errors.InvalidInputError(f"{len(expected)} lengths are expected of {len(keys)} values: one for each")
        with self._wire(deadline) as wire:
            return read_values(wire, keys, sink, expected or (), self._is_of_one_key)

    def set(
        self, values: Sequence[Value], deadline: float, *, ttl_ms: int | None = None, only_new: bool = False
    ) -> list[bool]:
        """Write values, each the concatenation of its buffers; returns which were written: with `only_new` not all are.

        After the first refusal no more is sent, what is under way is awaited, and WriteError raised.
        """
        if ttl_ms is not None and ttl_ms <= 0:
            raise errors.InvalidInputError(f"ttl_ms is {ttl_ms}: it must be above 0")
        options = [*([b"NX"] if only_new else []), *([] if ttl_ms is None else [b"PX", b"%d" % ttl_ms])]
        lengths = [length_of(key, buffers) for key, buffers in values]
        written = [False] * len(values)
        if not values:
            return written
        try:
            with self._wire(deadline) as wire:
                write_values(wire, values, lengths, options, written)
        except errors.UnavailableError as error:
            raise WriteError(str(error), written) from error
        return written

    def delete(self, keys: Sequence[str], deadline: float) -> int:
        """Remove keys; returns how many there were."""
        removed = 0
        for start in range(0, len(keys), _UNLINK_KEYS):
            with self._wire(deadline) as wire:
                wire.request(b"UNLINK", *(key.encode() for key in keys[start : start + _UNLINK_KEYS]))
                removed += wire.number()
        return removed

    def close(self) -> None:
        """Close the connections that rest; those in use close when their call ends."""
        with self._lock:
            idle, self._idle, self._size = self._idle, [], 0
        for wire in idle:
            wire.close()

    @contextmanager
    def _wire(self, deadline: float) -> Generator[Wire]:
        """A connection for one call; it goes back when all that was asked for has been read."""
        if os.getpid() != self._process:
            raise errors.ForkedProcessError
        wire: Wire | None = None
        in_order = False
        try:
            wire = self._take(deadline)
            bytes_in, bytes_out = wire.bytes_in, wire.bytes_out
            try:
                yield wire
                in_order = True
            finally:
                with self._lock:
                    self.calls += 1
                    self.bytes_in += wire.bytes_in - bytes_in
                    self.bytes_out += wire.bytes_out - bytes_out
        except WireError as error:
            self._count(error.reason)
            raise errors.UnavailableError(str(error)) from error
        except RefusedError as error:
            in_order = True
            self._count(_REASONS.get(error.code, "refused"))
            raise errors.UnavailableError(f"the server refused the call: {error}") from error
        finally:
            if wire is not None:
                self._put_back(wire, in_order=in_order)

    def _take(self, deadline: float) -> Wire:
        while True:
            with self._lock:
                if not self._idle:
                    break
                wire = self._idle.pop()
            if wire.is_quiet:
                wire.begin(deadline)
                return wire
            wire.close()
        wire = Wire(self._address, min(deadline, time.monotonic() + self._timeout_s))
        try:
            for command in self._address.greeting():
                wire.request(*command)
                wire.line()
        except BaseException:
            wire.close()
            raise
        wire.begin(deadline)
        return wire

    def _put_back(self, wire: Wire, *, in_order: bool) -> None:
        with self._lock:
            if in_order and len(self._idle) < self._size:
                self._idle.append(wire)
                return
        wire.close()

    def _is_of_one_key(self, error: RefusedError) -> bool:
        """Whether an error says something of a key alone; it is counted then."""
        if error.code not in _ONE_KEY:
            return False
        self._count(error.code.lower())
        return True

    def _count(self, reason: str) -> None:
        with self._lock:
            self.failures[reason] += 1
