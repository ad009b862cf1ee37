"""The stream of one engine over ZMQ. The only module that knows ZMQ: needs ``distprefix[events]``."""

from __future__ import annotations

import itertools
import math
import os
import re
import socket
import struct
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import NamedTuple

import zmq

from distprefix.errors import ConfigError, ForkedProcessError, ReplayError
from distprefix.events.frames import Frame

__all__ = ["Arrival", "Connected", "Disconnected", "EngineSocket"]

_MIB = 1 << 20
_QUEUED = 100_000  # messages; as many as an engine keeps, and a replay must fit: its ROUTER drops what finds no room
_END = b"\xff" * 8
_FIRST_ANSWER_S = 5.0
_REPLAY_FRAMES = 1_000_000
_REPLAY_BYTES = 1 << 30
_CONNECT_MS = 5000
_REVIVE_S = 0.3  # ZMQ says at once that it will connect again, and never does after a message that it refused
_TCP = re.compile(r"tcp://(?:\[([0-9A-Fa-f:.]+(?:%[^\]\s]+)?)\]|([^\s/;:\[\]]+)):(\d{1,5})")
_IPC = re.compile(r"ipc://\S+")
_CHANGE = struct.Struct("=Hi")  # kind, and a file descriptor where it is about one
_FAILED = zmq.Event.HANDSHAKE_FAILED_NO_DETAIL | zmq.Event.HANDSHAKE_FAILED_PROTOCOL | zmq.Event.HANDSHAKE_FAILED_AUTH
_OPENED = zmq.Event.CONNECTED | zmq.Event.ACCEPTED
_RETRIED = zmq.Event.CONNECT_RETRIED
_WATCHED = _OPENED | _RETRIED | _FAILED | zmq.Event.HANDSHAKE_SUCCEEDED | zmq.Event.DISCONNECTED
_monitors = itertools.count()


class Connected(NamedTuple):
    """The engine's publisher is there, for the first time or again: what it sent in between is lost."""


class Disconnected(NamedTuple):
    """The engine's publisher is gone, or does not even answer ZMQ's own heartbeats."""


Arrival = Frame | Connected | Disconnected


class EngineSocket:
    """Subscribes to what one engine publishes, and asks it for what was missed. Not thread-safe.

    `endpoint` is the engine's, or ``tcp://*:port`` when the engine connects and this side has to listen. Nobody has
    to be there yet, and whoever goes away is connected to again. Raises ConfigError for an endpoint that cannot be.
    """

    def __init__(
        self,
        endpoint: str,
        replay: str | None = None,
        *,
        topic: str = "",
        max_frame_bytes: int = 64 * _MIB,
        heartbeat_s: float = 1.0,
    ) -> None:
        if max_frame_bytes < 1:
            raise ConfigError(f"max_frame_bytes is {max_frame_bytes}; it must be at least 1")
        if not 0.01 <= heartbeat_s <= 600:
            raise ConfigError(f"heartbeat_s is {heartbeat_s}; it must be between 0.01 and 600")
        host = _host("endpoint", endpoint)
        if replay is not None and _host("replay", replay) == "*":
            raise ConfigError(f"replay is {replay!r}; replays are asked for at a host, not at '*'")
        self.dropped: Counter[str] = Counter()
        """Messages that make no sense, by what is wrong: the number of "frames", or the "sequence" number."""
        self._replay = replay
        self._max_bytes = max_frame_bytes
        self._pid = os.getpid()
        self._told: list[Connected | Disconnected] = []
        self._descriptors: set[int] = set()
        self._peers = self._failed = 0
        self._endpoint, self._binds = endpoint, host == "*"
        self._revive_at = math.inf
        self._sub = _socket(zmq.SUB, host, max_frame_bytes)
        self._monitor = zmq.Context.instance().socket(zmq.PAIR)
        self._finalizer = weakref.finalize(self, _close, self._sub, self._monitor, self._pid)
        beat_ms = round(heartbeat_s * 1000)
        try:
            self._sub.setsockopt(zmq.HEARTBEAT_IVL, beat_ms)
            self._sub.setsockopt(zmq.HEARTBEAT_TIMEOUT, 2 * beat_ms)
            self._sub.setsockopt(zmq.HEARTBEAT_TTL, max(100, 3 * beat_ms))
            self._sub.setsockopt(zmq.SUBSCRIBE, topic.encode())
            self._monitor.setsockopt(zmq.RCVHWM, 0)  # ZMQ's own thread would wait here, and every socket with it
            where = f"inproc://distprefix-{next(_monitors)}"
            self._sub.monitor(where, _WATCHED)
            self._monitor.connect(where)
            if self._binds:
                self._sub.bind(endpoint)
            else:
                self._sub.connect(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"endpoint is {endpoint!r}; it cannot be used: {error}") from error
        self._poller = zmq.Poller()
        self._poller.register(self._sub, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    @property
    def connected(self) -> bool:
        """Whether the engine's publisher was there at the last receive()."""
        return self._peers > 0

    def receive(self, timeout_s: float, most: int = 1000) -> list[Arrival]:
        """Wait for something to arrive, and take all that is there, up to `most` frames; nothing when nothing came.

        A Connected comes before the frames that follow it, a Disconnected after those that came before it. When both
        happened since the last call, the frames come after both: ZMQ does not tell on which side they belong.
        Raises ForkedProcessError in a child process.
        """
        if self._pid != os.getpid():
            raise ForkedProcessError("This engine socket was opened before a fork. Open one in the child.")
        deadline = time.monotonic() + timeout_s
        while True:
            arrived = self._collect(most)
            left = deadline - time.monotonic()
            if arrived or left <= 0:
                return arrived
            self._poller.poll(math.ceil(1000 * max(0, min(left, self._revive_at - time.monotonic()))))

    def replay(self, start: int, timeout_s: float) -> Iterator[Frame]:
        """Ask the engine for what it still has from `start` on, in order; it may begin later and have gaps.

        Asked when iteration begins. The time limit is for the engine, not for what the caller does with each frame;
        the first answer has to come within five seconds. Raises ReplayError, also after some frames, when there is
        nobody to ask, no answer in time, or what comes is not a replay.
        """
        if self._replay is None:
            raise ReplayError("No replay endpoint is configured for this engine")
        now = time.monotonic()
        deadline, first = now + timeout_s, now + min(timeout_s, _FIRST_ANSWER_S)
        frames = size = 0
        last = start - 1
        with closing(_socket(zmq.DEALER, _host("replay", self._replay), self._max_bytes)) as dealer:
            try:
                dealer.connect(self._replay)
                dealer.send_multipart([b"", start.to_bytes(8, "big")], zmq.NOBLOCK)
            except zmq.ZMQError as error:
                raise ReplayError(f"{self._replay} cannot be asked: {error}") from error
            while True:
                left = (deadline if frames else first) - time.monotonic()
                if left <= 0 or not dealer.poll(math.ceil(left * 1000)):
                    problem = f"did not finish within {timeout_s} s" if frames else "did not answer"
                    raise ReplayError(f"{self._replay} {problem}; {frames} frames came")
                parts, number, payload = _message(dealer)
                frames, size = frames + 1, size + len(payload)
                if not 2 <= parts <= 4 or len(number) != 8:
                    raise ReplayError(f"{self._replay} sent what is no replay: {parts} parts, sequence {number[:16]!r}")
                if number == _END and not payload:
                    return
                if frames > _REPLAY_FRAMES or size > _REPLAY_BYTES:
                    raise ReplayError(f"{self._replay} sent too much: {frames} frames, {size} bytes, and no end")
                seq = int.from_bytes(number, "big")
                if seq < start:
                    continue
                if seq <= last or number == _END:
                    raise ReplayError(f"{self._replay} sent sequence {seq} after {last}")
                last = seq
                paused = time.monotonic()
                yield Frame(seq, payload)
                deadline += time.monotonic() - paused

    def close(self) -> None:
        """Disconnect; what has not been received is lost. Closing again, or in a child process, does nothing."""
        self._finalizer()

    def _collect(self, most: int) -> list[Arrival]:
        frames, emptied = self._take(most)
        self._watch()  # after the frames: the Connected that they followed is there now
        gone = [self._told.pop()] if self._told and isinstance(self._told[-1], Disconnected) else []
        before, self._told = self._told, []
        if gone and emptied:
            more, emptied = self._take(most - len(frames))  # what came between the two
            frames += more
        if not emptied:
            gone, self._told = [], gone
        elif time.monotonic() >= self._revive_at:
            self._revive()
        return [*before, *frames, *gone]

    def _take(self, most: int) -> tuple[list[Frame], bool]:
        """Frames, and whether there are no more."""
        frames: list[Frame] = []
        size = 0
        for _ in range(most):
            try:
                parts, number, payload = _message(self._sub)
            except zmq.Again:
                return frames, True
            if not 2 <= parts <= 3:
                self.dropped["frames"] += 1
            elif len(number) != 8 or number == _END:
                self.dropped["sequence"] += 1
            else:
                frames.append(Frame(int.from_bytes(number, "big"), payload))
            size += len(payload)
            if size > self._max_bytes:
                break
        return frames, False

    def _watch(self) -> None:
        """Note who has come and gone."""
        while True:
            try:
                kind, descriptor = _CHANGE.unpack(self._monitor.recv_multipart(zmq.NOBLOCK)[0])
            except zmq.Again:
                return
            if kind & (_OPENED | _RETRIED):
                self._revive_at = math.inf
            if kind & _OPENED:
                self._descriptors.add(descriptor)
            elif kind & _FAILED:
                self._failed += 1
            elif kind == zmq.Event.HANDSHAKE_SUCCEEDED:
                self._peers += 1
                self._told.append(Connected())
            elif kind == zmq.Event.DISCONNECTED:
                self._disconnected(descriptor)

    def _disconnected(self, descriptor: int) -> None:
        was = self._peers
        self._revive_at = math.inf if self._binds else time.monotonic() + _REVIVE_S
        self._descriptors.discard(descriptor)
        if self._failed:  # it never got as far as being connected
            self._failed -= 1
        else:
            self._peers -= 1
        self._peers = max(0, min(self._peers, len(self._descriptors)))
        if was and not self._peers:
            self._told.append(Disconnected())

    def _revive(self) -> None:
        """Do what ZMQ leaves undone after an error in the protocol: connect again."""
        self._revive_at = math.inf
        with suppress(zmq.ZMQError):
            self._sub.disconnect(self._endpoint)
        self._sub.connect(self._endpoint)


def _host(field: str, endpoint: str) -> str:
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


def _socket(kind: int, host: str, max_bytes: int) -> zmq.Socket[bytes]:
    made = zmq.Context.instance().socket(kind)
    made.setsockopt(zmq.LINGER, 0)
    made.setsockopt(zmq.RCVHWM, _QUEUED)
    made.setsockopt(zmq.MAXMSGSIZE, max_bytes)
    made.setsockopt(zmq.RECONNECT_IVL, 100)
    made.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
    made.setsockopt(zmq.CONNECT_TIMEOUT, _CONNECT_MS)
    made.setsockopt(zmq.HANDSHAKE_IVL, _CONNECT_MS)
    made.setsockopt(zmq.IPV6, host != "" and _speaks_ipv6(host))
    return made


def _message(source: zmq.Socket[bytes]) -> tuple[int, bytes, bytes]:
    """Number of parts and the last two, of the next message; a message of very many parts is not kept."""
    before, part, parts = b"", source.recv(zmq.NOBLOCK), 1
    while source.getsockopt(zmq.RCVMORE):
        before, part, parts = part, source.recv(zmq.NOBLOCK), parts + 1
    return parts, before, part


def _close(sub: zmq.Socket[bytes], monitor: zmq.Socket[bytes], pid: int) -> None:
    """Close, but not in a child process. Monitoring stops first: ZMQ's thread hangs when nobody takes what it tells."""
    if pid == os.getpid():
        sub.monitor(None, 0)
        sub.close(0)
        monitor.close(0)
