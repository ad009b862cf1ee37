"""The data path: KV payloads of 64 KiB to 512 MiB on connections of their own: look-ups never queue behind them.

Values are read straight into the caller's buffers and written straight from them. Nothing is written twice: a call that
fails has done part of its work, or all of it, and `WriteError.written` says what is known to be written. A read whose
connection leads nowhere any more is repeated once, on a new one.
"""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from distprefix import errors
from distprefix.redis.address import Address, address_of
from distprefix.redis.breaker import Breaker, Breakers, new_breakers
from distprefix.redis.causes import NOT_SERVING, cause_of_code, without_echo
from distprefix.redis.endpoint import IDENTITY, Endpoint, ReplicaError, read_identity
from distprefix.redis.keys import PROBE
from distprefix.redis.resp import RefusedError, Wire, WireError
from distprefix.redis.transfers import ABSENT, REFUSED, STOP, Sink, Value, length_of, read_values, write_values

__all__ = ["REFUSED", "DataPool", "WriteError"]

_HARMLESS = ("ERR", "OOM", "NOPERM")
"""Errors after which other calls may go well."""
_FIRST_BYTE_S = 0.3
"""A connection that was used before and brings nothing for so long is taken for one that leads nowhere."""
_STALE_S = 0.5
"""A connection that rested for so long is asked whether it leads anywhere before anything is written."""
_PROBE_S = 0.3
"""The longest that such a question may take, and what asks a server that is off."""
_PROBE_KEY = PROBE.encode()
"""Is removed, and never there: a write that needs no room."""
_UNLINK_KEYS = 512


class WriteError(errors.UnavailableError):
    """Not everything was written. Where `written` is False nobody knows, but for an OOM: then it is not there."""

    def __init__(self, message: str, written: list[bool]) -> None:
        super().__init__(message)
        self.written = written

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.written), self.__dict__


class _SilentError(errors.UnavailableError):
    """A connection that was used before leads nowhere: nothing came of the call."""


class DataPool:
    """Reads and writes values; opens connections when they are needed and keeps up to `size`. Thread-safe.

    Every call ends with its `deadline` (time.monotonic), but for the resolution of a host name; `timeout_s` is the
    longest that connecting may take. A call that fails closes its connection and raises UnavailableError.
    A server that is silent is off after one call, for reads or for writes; `probe` turns it on again.
    """

    def __init__(
        self,
        where: Address | str | None,
        *,
        timeout_s: float,
        size: int = 4,
        endpoint: Endpoint | None = None,
        breakers: Breakers | None = None,
    ) -> None:
        self.endpoint = endpoint or Endpoint()
        self._admits = endpoint is not None
        """Whether each new connection is asked what it leads to."""
        self.breakers = breakers or new_breakers()
        self.probes_itself = True
        """Whether a call that meets a server that is off probes it when the time has come; else the background does."""
        self.failures: Counter[str] = Counter()
        """Failed calls, and values that could not be read, by reason."""
        self.calls = 0
        self.bytes_in = 0
        self.bytes_out = 0
        self._timeout_s = timeout_s
        self._size = size
        self._lock = threading.RLock()  # a signal handler may close the cache in the middle of a call
        self._idle: list[Wire] = []
        self._busy: set[Wire] = set()
        self._process = os.getpid()
        self._address = None if where is None else address_of(where)

    def get(self, keys: Sequence[str], sink: Sink, deadline: float, expected: Sequence[int] | None = None) -> list[int]:
        """Read values into what `sink` gives for each; returns their lengths, -1 where there is none.

        Where the server answers with an error, the length is REFUSED.

        `expected`: lengths that the values should have. Those that have them come in fewer system calls. When it
        raises, the views may hold anything.
        """
        if not keys:
            return []
        if expected is not None and len(expected) != len(keys):
            raise errors.InvalidInputError(f"{len(expected)} lengths are expected of {len(keys)} values: one for each")
        try:
            with self._wire(deadline, reads=True) as wire:
                return read_values(wire, keys, sink, expected or (), self._note_refusal)
        except _SilentError:
            with self._wire(deadline, reads=True) as wire:
                return read_values(wire, keys, sink, expected or (), self._note_refusal)

    def ask(self, commands: Sequence[Sequence[bytes]], deadline: float) -> list[Any]:
        """Send short commands and read their small replies; an error is a RefusedError in its place."""
        replies: list[Any] = []
        with self._wire(deadline, reads=True) as wire:
            for command in commands:
                wire.request(*command)
            for _ in commands:
                try:
                    replies.append(wire.reply())
                except RefusedError as error:
                    replies.append(error)
        return replies

    def abort_overdue(self) -> None:
        """End calls whose deadline is over and that signals have kept from noticing. No call to the server."""
        now = time.monotonic()
        for wire in list(self._busy):
            wire.abort_overdue(now)

    def probe(self) -> None:
        """Ask a server that is off, when its time has come, whether it is back. Two short calls; never raises."""
        for reads, command in ((True, (b"PING",)), (False, (b"UNLINK", _PROBE_KEY))):
            breaker = self.breakers.of(reads=reads)
            if breaker.is_closed or not breaker.allow():
                continue
            with suppress(errors.UnavailableError):
                deadline = time.monotonic() + min(_PROBE_S, self._timeout_s)
                with self._wire(deadline, reads=reads, is_probe=True) as wire:
                    wire.request(*command)
                    wire.reply()

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
            with self._wire(deadline, reads=False) as wire:
                write_values(wire, values, lengths, options, written)
        except errors.UnavailableError as error:
            failed = WriteError(str(error), written)
            failed.is_full = error.is_full
            raise failed from error
        return written

    def delete(self, keys: Sequence[str], deadline: float) -> int:
        """Remove keys; returns how many there were."""
        removed = 0
        for start in range(0, len(keys), _UNLINK_KEYS):
            with self._wire(deadline, reads=False) as wire:
                wire.request(b"UNLINK", *(key.encode() for key in keys[start : start + _UNLINK_KEYS]))
                removed += wire.number()
        return removed

    def close(self) -> None:
        """Close the connections that rest; those in use close when their call ends."""
        self._size = 0
        self._drop_idle()

    def _drop_idle(self) -> None:
        """Close the connections that rest."""
        with self._lock:
            idle = self._idle
            self._idle = []
        for wire in idle:
            wire.close()

    @contextmanager
    def _wire(self, deadline: float, *, reads: bool, is_probe: bool = False) -> Generator[Wire]:
        """A connection for one call; it is kept when all that was asked for has been read."""
        if os.getpid() != self._process:
            raise errors.ForkedProcessError
        breaker = self.breakers.of(reads=reads)
        if not is_probe:
            self._check_on(breaker)
        wire: Wire | None = None
        in_order = False
        bytes_in = bytes_out = 0
        generation = self.endpoint.generation
        try:
            wire = self._take(deadline, reads=reads)
            self._busy.add(wire)
            bytes_in = wire.bytes_in
            bytes_out = wire.bytes_out
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
            if error.reason == "silent":
                self._drop_idle()
                raise _SilentError(str(error)) from error
            self._note_failure(breaker, error.reason, has_begun=wire is not None and wire.bytes_in > bytes_in)
            raise errors.UnavailableError(str(error)) from error
        except RefusedError as error:
            in_order = True
            self._note_refusal(error, breaker=breaker, generation=generation)
            refused = errors.UnavailableError(f"the server refused the call: {error}")
            refused.is_full = error.code == "OOM"
            raise refused from error
        except ReplicaError as error:
            self._count("replica")
            breaker.fail()
            raise errors.UnavailableError(str(error)) from error
        else:
            breaker.succeed()
        finally:
            if wire is not None:
                self._busy.discard(wire)
                self._put_back(wire, in_order=in_order)

    def _check_on(self, breaker: Breaker) -> None:
        """Raise UnavailableError while the server is off."""
        if not breaker.is_closed and self.probes_itself:
            self.probe()
        if not breaker.is_closed:
            self._count("off")
            raise errors.UnavailableError("the server failed and is left alone for a moment")

    def _take(self, deadline: float, *, reads: bool) -> Wire:
        while True:
            with self._lock:
                if not self._idle:
                    break
                wire = self._idle.pop()
            if wire.generation == self.endpoint.generation and wire.is_quiet and (reads or self._answers(wire)):
                wire.is_alone = self.probes_itself
                wire.begin(deadline, _FIRST_BYTE_S if reads else 0.0)
                return wire
            wire.close()
        if self._address is None:
            raise errors.ConfigError("payloads need a url: a client that was passed in carries none")
        wire = Wire(self._address, min(deadline, time.monotonic() + self._timeout_s))
        try:
            for command in self._address.greeting():
                _say(wire, command, self._address.password)
            if self._admits:
                self._admit(wire)
        except BaseException:
            wire.close()
            raise
        wire.generation = self.endpoint.generation
        wire.is_alone = self.probes_itself
        wire.begin(deadline)
        return wire

    def _admit(self, wire: Wire) -> None:
        """Ask what a new connection leads to. Raises ReplicaError for a replica."""
        for command in IDENTITY:
            wire.request(*map(str.encode, command))
        replies: list[Any] = []
        for _ in IDENTITY:
            try:
                replies.append(wire.reply())
            except RefusedError:  # not permitted, or renamed
                replies.append(None)
        self.endpoint.admit(read_identity(*replies))

    def _answers(self, wire: Wire) -> bool:
        """Whether a connection leads anywhere, asked only of one that rested; if not, none that rests does."""
        now = time.monotonic()
        if now - wire.used_at < _STALE_S:
            return True
        wire.begin(now + _PROBE_S)
        try:
            wire.request(b"PING")
            wire.reply()
        except WireError:
            self._count("silent")
            self._drop_idle()
            return False
        except RefusedError:
            return True
        return True

    def _put_back(self, wire: Wire, *, in_order: bool) -> None:
        wire.used_at = time.monotonic()
        with self._lock:
            if in_order and len(self._idle) < self._size:
                self._idle.append(wire)
                return
        wire.close()

    def _note_failure(self, breaker: Breaker, reason: str, *, has_begun: bool) -> None:
        """Count a call that failed; a server that took its whole deadline and brought nothing is off at once."""
        if reason == "timeout" and has_begun:
            return  # slow, but at work
        if reason == "connect":
            self.breakers.reads.fail()
            self.breakers.writes.fail()
            return
        breaker.fail(at_once=reason == "timeout")

    def _note_refusal(self, error: RefusedError, breaker: Breaker | None = None, generation: int | None = None) -> int:
        """Count an error that the server answered with in place of a value. Returns the length that counts for it."""
        self._count(cause_of_code(error.code))
        if error.code in NOT_SERVING:
            self.endpoint.renew(error.code.lower(), generation)
        if error.code == "WRONGTYPE":
            return ABSENT  # so it says; whoever relies on that has to ask the owner again
        if error.code in _HARMLESS:
            return REFUSED
        (breaker or self.breakers.reads).fail()
        return STOP

    def _count(self, reason: str) -> None:
        with self._lock:
            self.failures[reason] += 1


def _say(wire: Wire, command: tuple[bytes, ...], password: str) -> None:
    """Send a command of the greeting. Raises RefusedError that does not repeat the password."""
    wire.request(*command)
    refusal: RefusedError | None = None
    try:
        wire.line()
    except RefusedError as error:
        refusal = error
    if refusal is not None:
        raise RefusedError(without_echo(str(refusal), password))
