"""The subscription to what one engine publishes, over ZMQ. Needs ``distprefix[events]``.

Whoever receives reads ZMQ's socket himself. A thread does it for him while he is busy, so that ZMQ's own queue, which
is bounded in messages and not in bytes, stays short; what it reads waits in an `Inbox`, which is bounded in bytes.
"""

from __future__ import annotations

import itertools
import math
import re
import socket
import struct
import threading
import time
from collections import Counter
from contextlib import suppress

import zmq

from distprefix.errors import ConfigError
from distprefix.events.answer import END
from distprefix.events.frames import Frame
from distprefix.events.inbox import Arrival, Connected, Disconnected, Inbox
from distprefix.events.intake import Intake
from distprefix.events.limits import EngineLimits

__all__ = [
    "INCOMPLETE_BYTES",
    "OPENED",
    "Subscription",
    "host_of",
    "next_change",
    "port_of",
    "read_message",
    "watched",
    "zmq_socket",
]

OPENED = zmq.Event.CONNECTED | zmq.Event.ACCEPTED
INCOMPLETE_BYTES = 64 << 20
"""Of a message that is not complete, besides its longest part."""
_QUEUED = 128  # messages; short, as ZMQ bounds no bytes: the engine's own queue and the inbox are the long ones
_MAX_PEERS = 64  # that connect to a socket which listens
_PUMP_S = 0.1
_PUMPED = 1000
_ROUNDS = 16  # of at most `message_bytes`: what ZMQ keeps is bounded in messages only, so it is read to its end
_CONNECT_MS = 5000
_REVIVE_S = 0.3  # ZMQ says at once that it will connect again, and never does after a message that it refused
_TCP = re.compile(r"tcp://(?:\[([0-9A-Fa-f:.]+(?:%[^\]\s]+)?)\]|([^\s/;:\[\]]+)):(\d{1,5})")
_IPC = re.compile(r"ipc://\S+")
_CHANGE = struct.Struct("=Hi")  # kind, and a file descriptor where it is about one
_FAILED = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH
_RETRIED = zmq.Event.CONNECT_RETRIED
_WATCHED = OPENED | _RETRIED | _FAILED | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
_SHORT_PART = 255  # up to here ZMTP takes 2 bytes for a part's header, beyond 9
_monitors = itertools.count()


class Subscription:
    """One SUB socket with its monitor, its inbox and the thread that empties it while its owner is busy.

    Raises ConfigError for an endpoint that cannot be used.
    """

    def __init__(
        self, endpoint: str, topic: str, limits: EngineLimits, heartbeat_s: float, dropped: Counter[str]
    ) -> None:
        host = host_of("endpoint", endpoint)
        self._dropped = dropped
        self._inbox = Inbox(limits.queue_bytes, dropped)
        self._max_bytes = limits.message_bytes
        self._told: list[Connected | Disconnected] = []
        self._peers = self._failed = 0
        self._endpoint = endpoint
        self._binds = host == "*"
        self._intake = Intake(port_of(endpoint))
        self._revive_at = math.inf
        self._taken_at = time.monotonic()
        self._checked_at = 0.0
        self._lock = threading.RLock()  # a finalizer may close in the middle of all else
        self._closed = threading.Event()
        self._sub = zmq_socket(zmq.SUB, host, limits.message_bytes, _QUEUED)
        self._monitor = zmq.Context.instance().socket(zmq.PAIR)
        try:
            watched(self._sub, self._monitor)
            self._open(topic, round(heartbeat_s * 1000))
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"endpoint is {endpoint!r}; it cannot be used: {error}") from error
        self._poller = zmq.Poller()
        self._poller.register(self._sub, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._thread = threading.Thread(target=self._pump, name="distprefix-engine", daemon=True)
        self._thread.start()

    def receive(self, timeout_s: float, most: int) -> list[Arrival]:
        """Wait for something to arrive, and take all that is there, up to `most` arrivals."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            while not self._closed.is_set():
                self._empty(most)
                arrived = self._inbox.take(most, self._max_bytes)
                left = deadline - time.monotonic()
                if arrived or left <= 0:
                    return arrived
                wait_s = min(left, _PUMP_S, self._revive_at - time.monotonic())
                self._poller.poll(math.ceil(1000 * max(0.0, wait_s)))
        return []

    def close(self) -> None:
        """Disconnect. Closing again does nothing."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            self._sub.monitor(None, 0)  # first: ZMQ's thread hangs when nobody takes what it tells
            self._sub.close(0)
            self._monitor.close(0)

    def _open(self, topic: str, beat_ms: int) -> None:
        self._sub.setsockopt(zmq.HEARTBEAT_IVL, beat_ms)
        self._sub.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2 * beat_ms)
        self._sub.setsockopt(zmq.HEARTBEAT_TTL, max(100, 3 * beat_ms))
        self._sub.setsockopt(zmq.SUBSCRIBE, topic.encode())
        if self._binds:
            self._sub.bind(self._endpoint)
        else:
            self._sub.connect(self._endpoint)

    def _pump(self) -> None:
        """Read for a receiver that is busy. Who waits in receive() has the lock, and needs no help."""
        while not self._closed.wait(_PUMP_S):
            if not self._lock.acquire(blocking=False):
                continue
            try:
                if not self._closed.is_set() and time.monotonic() - self._taken_at >= _PUMP_S:
                    self._empty(_PUMPED)
            except zmq.ZMQError:
                if not self._closed.is_set():
                    raise
            finally:
                self._lock.release()

    def _empty(self, most: int) -> None:
        """Put into the inbox what is there, in rounds of `most` frames."""
        for _ in range(_ROUNDS):
            if self._collect(most):
                break
        self._taken_at = time.monotonic()

    def _collect(self, most: int) -> bool:
        """Put some of what is there into the inbox. Returns whether it was all."""
        frames, emptied = self._take(most)
        self._watch()  # after the frames: the Connected that they followed is there now
        gone = [self._told.pop()] if self._told and isinstance(self._told[-1], Disconnected) else []
        before = self._told
        self._told = []
        if gone and emptied:
            more, emptied = self._take(most - len(frames))  # what came between the two
            frames += more
        if not emptied:
            self._told = [*gone]
            gone = []
        elif time.monotonic() >= self._revive_at:
            self._revive()
        self._inbox.put([*before, *frames, *gone])
        if emptied:
            self._check_incomplete()
        return emptied

    def _check_incomplete(self) -> None:
        """Cut the connections where a message has more parts than memory should hold."""
        now = time.monotonic()
        if now - self._checked_at < _PUMP_S:
            return
        self._checked_at = now
        if self._intake.pending() > self._max_bytes + INCOMPLETE_BYTES:
            self._dropped["incomplete"] += 1
            self._intake.cut()

    def _take(self, most: int) -> tuple[list[Frame], bool]:
        """Frames, and whether there are no more."""
        frames: list[Frame] = []
        size = 0
        for _ in range(most):
            try:
                parts, number, payload, taken = read_message(self._sub)
            except zmq.Again:
                return frames, True
            if not 2 <= parts <= 3:
                self._dropped["frames"] += 1
            elif len(number) != 8 or number == END:
                self._dropped["sequence"] += 1
            else:
                frames.append(Frame(int.from_bytes(number, "big"), payload))
            self._intake.deliver(taken)
            size += len(payload)
            if size > self._max_bytes:
                break
        return frames, False

    def _watch(self) -> None:
        """Note who has come and gone."""
        while True:
            change = next_change(self._monitor)
            if change is None:
                return
            kind, descriptor = change
            if kind & (OPENED | _RETRIED):
                self._revive_at = math.inf
            if kind & OPENED:
                self._opened(descriptor)
            elif kind & _FAILED:
                self._failed += 1
            elif kind == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._peers += 1
                self._tell(Connected())
            elif kind == zmq.Event.DISCONNECTED:
                self._disconnected(descriptor)

    def _opened(self, descriptor: int) -> None:
        self._intake.open(descriptor)
        if len(self._intake) > _MAX_PEERS:
            self._dropped["peers"] += 1
            self._intake.cut(descriptor)

    def _disconnected(self, descriptor: int) -> None:
        was = self._peers
        self._revive_at = math.inf if self._binds else time.monotonic() + _REVIVE_S
        self._intake.close(descriptor)
        if self._failed:  # it never got as far as being connected
            self._failed -= 1
        else:
            self._peers -= 1
        self._peers = max(0, min(self._peers, len(self._intake)))
        if was and not self._peers:
            self._tell(Disconnected())

    def _tell(self, notice: Connected | Disconnected) -> None:
        self._told = [*self._told[-1:], notice]  # of a storm of connections the last two say it all

    def _revive(self) -> None:
        """Do what ZMQ leaves undone after an error in the protocol: connect again."""
        self._revive_at = math.inf
        with suppress(zmq.ZMQError):
            self._sub.disconnect(self._endpoint)
        self._sub.connect(self._endpoint)


def host_of(field: str, endpoint: str) -> str:
    """The host, without brackets; empty for a path."""
    match = _TCP.fullmatch(endpoint)
    if match is not None and 1 <= int(match[3]) <= 65535:
        return match[1] or match[2]
    if _IPC.fullmatch(endpoint):
        return ""
    raise ConfigError(f"{field} is {endpoint!r}; it must be 'tcp://host:port', 'tcp://[IPv6]:port' or 'ipc://path'")


def _speaks_ipv6(host: str) -> bool:
    """Whether ZMQ may use IPv6: when it may, it tries no IPv4 address of a name that has both, as engines often do."""
    if host == "*" or ":" in host:
        return True
    try:
        socket.getaddrinfo(host, None, socket.AF_INET)
    except OSError:
        return True
    return False


def zmq_socket(kind: int, host: str, max_bytes: int, queued: int) -> zmq.Socket[bytes]:
    """A socket with the bounds and times that all have."""
    made = zmq.Context.instance().socket(kind)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.RCVHWM, queued)
    made.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    made.setsockopt(zmq.RECONNECT_IVL, 100)
    made.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    made.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
    made.setsockopt(zmq.HANDSHAKE_IVL, _CONNECT_MS)
    made.setsockopt(zmq.IPV6, host != "" and _speaks_ipv6(host))
    return made


def watched(source: zmq.Socket[bytes], monitor: zmq.Socket[bytes]) -> None:
    """Have a PAIR socket told of a socket's connections. To be ended, by ``monitor(None, 0)``, before either closes."""
    monitor.setsockopt(zmq.RCVHWM, 0)  # ZMQ's own thread would wait here, and every socket with it
    where = f"inproc://distprefix-{next(_monitors)}"
    source.monitor(where, _WATCHED)
    monitor.connect(where)


def next_change(monitor: zmq.Socket[bytes]) -> tuple[int, int] | None:
    """Kind and file descriptor of the next thing that happened to a connection; None when there is none yet."""
    try:
        return _CHANGE.unpack(monitor.recv_multipart(zmq.NOBLOCK)[0])
    except zmq.Again:
        return None


def read_message(source: zmq.Socket[bytes]) -> tuple[int, bytes, bytes, int]:
    """Number of parts, the last two, and bytes on the wire, of the next message. Of very many parts none is kept."""
    before = b""
    part = source.recv(zmq.NOBLOCK)
    parts = 1
    size = _wire_bytes(part)
    while source.getsockopt(zmq.RCVMORE):
        before = part
        part = source.recv(zmq.NOBLOCK)
        parts += 1
        size += _wire_bytes(part)
    return parts, before, part, size


def _wire_bytes(part: bytes) -> int:
    return len(part) + (2 if len(part) <= _SHORT_PART else 9)


def port_of(endpoint: str) -> int:
    """The TCP port; -1 for a path."""
    match = _TCP.fullmatch(endpoint)
    return int(match[3]) if match is not None else -1
