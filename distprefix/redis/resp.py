"""One connection that carries large values: bytes go from the socket to the caller's buffers and back, untouched.

Plain sockets block in the kernel with its own time-outs, so that one call moves a whole value;
TLS moves a record a call.
"""

from __future__ import annotations

import select
import signal
import socket
import ssl
import struct
import threading
import time
from contextlib import suppress
from typing import Any

from distprefix.printable import printable
from distprefix.redis.address import KEEPALIVE, Address

__all__ = ["LONGEST_VALUE", "RefusedError", "Wire", "WireError", "bulk"]

LONGEST_VALUE = 512 * 1024 * 1024
_BUFFER = 4096
"""For replies that are not values. What it catches of a value is copied, so it is small."""
_SCRATCH = 256 * 1024
_KIB = 1024
_TCP, _UNIX = (256 * _KIB, 2048 * _KIB), (4096 * _KIB, 8192 * _KIB)
"""Above the first the kernel is to wait for all of a value; below, one call may bring it and the next reply's head. The
second is asked for ahead. Through a Unix socket, whose buffer is small, server and reader take turns: it hands over
what has been written so far faster than it waits, and what is made ready while the server works on many requests costs
nothing. TCP has them work at the same time: what is small then lies in the processors' caches when it is read."""
_DOLLAR, _NONE, _OK = 36, (b"$-1", b"_", b"*-1"), b"+OK\r\n"
_PARTS = 512
"""Buffers that one system call takes; the kernel's limit is 1024."""
_EXACT_S = 0.001
"""How far a time-out in the kernel may be off before it is set anew, which is a system call."""

_LONGEST_WAIT_S = 1e6
_TIMERS = (signal.ITIMER_REAL, signal.ITIMER_PROF, signal.ITIMER_VIRTUAL)
_GRACE_S = 0.05
"""How long after its deadline a call may end by itself."""
_LONGEST_ERROR = 1000
_MAX_DEPTH = 4
"""Levels of a small reply, as of ROLE."""


class WireError(Exception):
    """The connection cannot be used any more; `reason` is what failures are counted by."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class RefusedError(Exception):
    """The server answered a command with an error; the connection is in order. `code` is its first word."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.code = message.partition(" ")[0]


class Wire:
    """A socket that speaks RESP2. Everything ends with the deadline (time.monotonic) of the last `begin`.

    Python repeats a system call that a signal interrupted, and the kernel begins its time-out anew. A wait by `poll`,
    which knows its end, costs a quarter of the speed, so it is done where signals are to be expected; else another
    thread calls `abort_overdue`. `is_alone`: there is none that does.
    """

    is_alone = True

    def __init__(self, address: Address, deadline: float) -> None:
        self.begin(deadline)
        self.bytes_in = 0
        self.bytes_out = 0
        self.is_aborted = False
        self.used_at = time.monotonic()
        """When a call ended on it last."""
        self.generation = 0
        """Of the connections to its server when it was made."""
        self._keep(b"")
        self.at_once, self.ahead = _UNIX if address.path else _TCP
        try:
            tls = address.tls_context()
            self._socket: socket.socket = self._connect(address.target)
            try:
                if tls is not None:
                    self._socket.settimeout(self._left())
                    self._socket = tls.wrap_socket(self._socket, server_hostname=address.host)
                else:
                    self._socket.settimeout(None)
            except BaseException:
                self._socket.close()
                raise
        except (OSError, UnicodeError) as error:
            raise _failure("connect", error) from error
        self._tls = tls is not None
        self._poll = select.poll()
        self._poll.register(self._socket, select.POLLIN)
        self._poll_out = select.poll()
        self._poll_out.register(self._socket, select.POLLOUT)

    def begin(self, deadline: float, first_byte_s: float = 0.0) -> None:
        """Set the deadline of what follows.

        `first_byte_s`: what follows is `silent` when no byte comes within that; 0 for until the deadline.
        """
        self._deadline = deadline
        self._polls = (self.is_alone and _may_be_interrupted()) or _is_timed()
        self._first_byte_by = time.monotonic() + first_byte_s if first_byte_s else 0.0
        self._armed = {socket.SO_RCVTIMEO: 0.0, socket.SO_SNDTIMEO: 0.0}

    def abort_overdue(self, now: float) -> None:
        """End a call whose deadline is over, from another thread: signals may have made its system call begin anew."""
        if now > self._deadline + _GRACE_S:
            self.is_aborted = True
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close it. Calling again does nothing."""
        self._socket.close()

    @property
    def is_drained(self) -> bool:
        """Whether all that was received has been read: what comes next may go elsewhere."""
        return self._start == self._end

    @property
    def is_quiet(self) -> bool:
        """Whether it is open with nothing left to read: only then may another call use it."""
        pending = isinstance(self._socket, ssl.SSLSocket) and self._socket.pending()
        return self._start == self._end and not pending and not self._poll.poll(0)

    def request(self, *args: bytes) -> None:
        """Send one short command."""
        parts = (b"$%d\r\n%s\r\n" % (len(arg), arg) for arg in args)
        self.send([memoryview(b"*%d\r\n%s" % (len(args), b"".join(parts)))])

    def send(self, parts: list[memoryview]) -> None:
        """Write all of the parts, none of them empty, gathering them in the kernel. Empties the list."""
        try:
            if self._tls:
                for part in parts:
                    self._send_tls(part)
                parts.clear()
            while parts:
                self._await(self._poll_out)
                self._arm(socket.SO_SNDTIMEO)
                sent = self._socket.sendmsg(parts[:_PARTS])
                self.bytes_out += sent
                _advance(parts, sent)
        except OSError as error:
            raise _failure("connection", error) from error

    def line(self) -> bytes:
        """One line of a reply without its end; raises RefusedError where it is an error."""
        found = self._buffer.find(b"\r\n", self._start, self._end)
        while found < 0:
            self._read_more()
            found = self._buffer.find(b"\r\n", self._start, self._end)
        line = bytes(self._view[self._start : found])
        self._start = found + 2
        if line.startswith(b"-"):
            raise RefusedError(printable(line[1:], _LONGEST_ERROR))
        return line

    def reply(self, depth: int = 0) -> Any:
        """A small reply of any kind, values as bytes; raises RefusedError where it is an error."""
        line = self.line()
        kind = line[:1]
        if kind == b"+":
            return line[1:]
        if kind == b"*" and depth < _MAX_DEPTH:
            return [self.reply(depth + 1) for _ in range(_to_int(line, b"*"))]
        if kind == b"$" and line not in _NONE:
            value = bytearray(min(_to_int(line, b"$"), LONGEST_VALUE))
            self.fill([memoryview(value)] if value else [], len(value))
            return bytes(value)
        return None if line in _NONE else _to_int(line, b":")

    def number(self) -> int:
        """A reply that is a whole number."""
        return _to_int(self.line(), b":")

    def is_ok(self) -> bool:
        """Whether a reply to SET says that it was done, and not that there was a value already."""
        line = self.line()
        if line not in (b"+OK", *_NONE):
            raise WireError("protocol", f"the server answered {line[:40]!r}")
        return line not in _NONE

    def length(self) -> int:
        """How many bytes of a value follow, to be read by `fill` or `skip`; -1 for none."""
        found = self._buffer.find(b"\r\n", self._start, self._end)
        if found > 0 and self._buffer[self._start] == _DOLLAR:  # the common case, in few steps
            digits = self._buffer[self._start + 1 : found]
            if digits.isdigit() and len(digits) < 9:
                self._start = found + 2
                return int(digits)
        line = self.line()
        if line in _NONE:
            return -1
        length = _to_int(line, b"$")
        if length > LONGEST_VALUE:
            raise WireError("protocol", f"the server announces a value of {length} bytes")
        return length

    def fill(self, views: list[memoryview], length: int) -> None:
        """Read a value into `views`, none of them empty, whose lengths add up to `length`. Empties the list."""
        while views and self._start < self._end:
            part = views[0][: self._end - self._start]
            taken = len(part)
            part[:] = self._view[self._start : self._start + taken]
            self._start += taken
            length -= taken
            _advance(views, taken)
        if length and len(self._buffer) > 2 * _BUFFER:
            self._keep(b"")  # what was left in it has been read
        while length:  # by what is left, as adding up the views takes longer
            if self._tls or length > self.at_once:
                got = self.read(views, socket.MSG_WAITALL)
            else:
                got = self.read([*views, self._view], 0)
                if got > length:
                    self._start, self._end, got = 0, got - length, length
            length -= got
            if length:
                _advance(views, got)
        self._read_end()

    def skip(self, length: int) -> None:
        """Read a value and forget it."""
        buffered = min(length, self._end - self._start)
        self._start += buffered
        length -= buffered
        scratch = memoryview(bytearray(min(length, _SCRATCH)))
        while length:
            length -= self.read([scratch[:length]], 0)
        self._read_end()

    def unread(self, data: bytes) -> None:
        """Have this read next; for what `read` brought. Nothing else may be left to read."""
        self._keep(data)

    def count_ok(self, most: int) -> int:
        """How many replies to SET that say it was done are here already, one after the other; they are read."""
        count = min(most, (self._end - self._start) // len(_OK))
        while count and not self._buffer.startswith(_OK * count, self._start):
            count //= 2
        self._start += count * len(_OK)
        return count

    def _keep(self, data: bytes) -> None:
        self._buffer = bytearray(data) + bytes(_BUFFER)
        self._view = memoryview(self._buffer)
        self._start, self._end = 0, len(data)

    def _read_end(self) -> None:
        while self._end - self._start < 2:
            self._read_more()
        if not self._buffer.startswith(b"\r\n", self._start):
            raise WireError("protocol", "a value is not as long as the server announced")
        self._start += 2

    def _read_more(self) -> None:
        """At least one more byte into the buffer."""
        if self._start:
            if len(self._buffer) > 2 * _BUFFER:
                self._keep(bytes(self._view[self._start : self._end]))
            kept = self._end - self._start
            self._buffer[:kept] = self._buffer[self._start : self._end]
            self._start, self._end = 0, kept
        if self._end == len(self._buffer):
            raise WireError("protocol", "the server's reply has no end")
        self._end += self.read([self._view[self._end :]], 0)

    def read(self, views: list[memoryview], flags: int) -> int:
        """Read at least a byte straight into views, none of them empty; how many came."""
        try:
            if self._tls:
                got = self._read_tls(views[0])
            else:
                self._await(self._poll, self._first_byte_by)
                self._arm(socket.SO_RCVTIMEO)
                got = self._socket.recvmsg_into(views[:_PARTS], 0, flags)[0]
        except OSError as error:
            raise _failure("connection", error) from error
        if not got:
            if self.is_aborted:
                raise WireError("timeout", "no answer in time")
            raise WireError("connection", "the server closed the connection")
        self.bytes_in += got
        self._first_byte_by = 0.0
        return got

    def _await(self, poll: select.poll, until: float = 0.0) -> None:
        """Wait until the socket is ready.

        Python repeats a system call that a signal interrupted, and the kernel begins its time-out anew: only a wait
        that knows its end, as this one, ends in time. What is ready moves at least a byte, whatever signals come.
        """
        if not until and not self._polls:
            return  # the kernel ends the wait, or `abort` does
        left = self._left()
        if until and until < self._deadline:
            if not poll.poll(max(0.0, 1000 * (until - time.monotonic()))):
                raise WireError("silent", "the connection leads nowhere any more")
        elif not poll.poll(1000 * min(left, _LONGEST_WAIT_S)):
            raise TimeoutError("the deadline passed")

    def _read_tls(self, view: memoryview) -> int:
        until = self._first_byte_by
        if not until or until >= self._deadline:
            self._arm(socket.SO_RCVTIMEO)
            return self._socket.recv_into(view)
        self._armed[socket.SO_RCVTIMEO] = 0.0
        self._socket.settimeout(max(0.001, until - time.monotonic()))
        try:
            return self._socket.recv_into(view)
        except TimeoutError as error:
            raise WireError("silent", "the connection leads nowhere any more") from error

    def _send_tls(self, part: memoryview) -> None:
        while part:
            self._arm(socket.SO_SNDTIMEO)
            sent = self._socket.send(part)
            self.bytes_out += sent
            part = part[sent:]

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("the deadline passed")
        return left

    def _arm(self, option: int) -> None:
        """Let the next call wait until the deadline. The kernel counts all waits of a call together."""
        now = time.monotonic()
        if now < self._armed[option]:
            return
        left = min(self._left(), _LONGEST_WAIT_S)
        if self._tls:
            self._socket.settimeout(left)
            return
        seconds = int(left)
        wait = struct.pack("ll", seconds, max(1, int((left - seconds) * 1e6)))
        self._socket.setsockopt(socket.SOL_SOCKET, option, wait)
        self._armed[option] = now + min(left, _EXACT_S)

    def _connect(self, address: tuple[str, int] | str) -> socket.socket:
        if isinstance(address, str):
            return self._reach(socket.AF_UNIX, address)
        failed: OSError | None = None
        for family, *_, found in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
            try:
                return self._reach(family, found)
            except OSError as error:
                failed = error
        raise failed or OSError(f"{address[0]} has no address")

    def _reach(self, family: int, address: object) -> socket.socket:
        reached = socket.socket(family, socket.SOCK_STREAM)
        try:
            if family != socket.AF_UNIX:
                reached.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                reached.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                for option, value in KEEPALIVE.items():
                    reached.setsockopt(socket.IPPROTO_TCP, option, value)
            reached.settimeout(self._left())
            reached.connect(address)  # pyright: ignore[reportArgumentType]
        except BaseException:
            reached.close()
            raise
        return reached


def bulk(word: str | int) -> bytes:
    """A word of a command."""
    data = str(word).encode()
    return b"$%d\r\n%s\r\n" % (len(data), data)


def _to_int(line: bytes, kind: bytes) -> int:
    if not line.startswith(kind) or not line[1:].isdigit() or len(line) > 20:
        raise WireError("protocol", f"the server answered {line[:40]!r}")
    return int(line[1:])


def _may_be_interrupted() -> bool:
    """Whether signals of the process come to this thread first."""
    return threading.get_ident() == threading.main_thread().ident


def _is_timed() -> bool:
    """Whether a timer interrupts this process, as those of sampling profilers do."""
    return any(signal.getitimer(timer)[0] for timer in _TIMERS)


def _failure(reason: str, error: Exception) -> WireError:
    if isinstance(error, TimeoutError | BlockingIOError):  # the latter where the kernel's time-out ended a call
        return WireError("timeout", "no answer in time")
    return WireError(reason, f"the connection failed: {error}")


def _advance(parts: list[memoryview], by: int) -> None:
    """Drop the first `by` bytes of what is still to be done."""
    done = 0
    for part in parts:
        if by < len(part):
            break
        by -= len(part)
        done += 1
    del parts[:done]
    if by:
        parts[0] = parts[0][by:]
