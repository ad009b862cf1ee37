"""The stream of one engine over ZMQ: what it publishes, and what it sends again. Needs ``distprefix[events]``."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Self

import zmq

from distprefix.errors import ConfigError, ForkedProcessError, ReplayError
from distprefix.events.frames import Frame
from distprefix.events.inbox import Arrival, Connected, Disconnected
from distprefix.events.intake import Intake
from distprefix.events.limits import EngineLimits
from distprefix.events.wire import (
    END,
    INCOMPLETE_BYTES,
    OPENED,
    Subscription,
    host_of,
    next_change,
    port_of,
    read_message,
    watched,
    zmq_socket,
)

__all__ = ["Arrival", "Connected", "Disconnected", "EngineSocket"]

_QUEUED = 100_000  # messages; as many as an engine keeps, and a replay must fit: its ROUTER drops what finds no room
_FIRST_ANSWER_S = 5.0
_MAX_REPLAY_FRAMES = 1_000_000
_FRAME_BYTES = 200
"""What a frame takes besides its payload."""
_LOOK_S = 0.1


class EngineSocket:
    """Subscribes to what one engine publishes, and asks it for what was missed. Not thread-safe.

    `endpoint` is the engine's, or ``tcp://*:port`` when the engine connects and this side has to listen. Nobody has
    to be there yet, and whoever goes away is connected to again. Memory is bounded by `limits`.
    Raises ConfigError for an endpoint that cannot be.
    """

    def __init__(
        self,
        endpoint: str,
        replay: str | None = None,
        *,
        topic: str = "",
        limits: EngineLimits | None = None,
        heartbeat_s: float = 1.0,
    ) -> None:
        if not 0.01 <= heartbeat_s <= 600:
            raise ConfigError(f"heartbeat_s is {heartbeat_s}; it must be between 0.01 and 600")
        host_of("endpoint", endpoint)
        if replay is not None and host_of("replay", replay) == "*":
            raise ConfigError(f"replay is {replay!r}; replays are asked for at a host, not at '*'")
        self.dropped: Counter[str] = Counter()
        """Messages that make no sense or find no room, by cause: see docs/kv-events.md."""
        self.connected = False
        """Whether the engine's publisher was there at the last receive()."""
        self._replay = replay
        self._limits = limits or EngineLimits()
        self._pid = os.getpid()
        self._subscription = Subscription(endpoint, topic, self._limits, heartbeat_s, self.dropped)
        self._finalizer = weakref.finalize(self, _close, self._subscription, self._pid)

    def receive(self, timeout_s: float, most: int = 1000) -> list[Arrival]:
        """Wait for something to arrive, and take all that is there, up to `most` arrivals; nothing when nothing came.

        A Connected comes before the frames that follow it, a Disconnected after those that came before it. When both
        happened since the last call, the frames come after both: ZMQ does not tell on which side they belong.
        Raises ForkedProcessError in a child process.
        """
        if self._pid != os.getpid():
            raise ForkedProcessError("This engine socket was opened before a fork. Open one in the child.")
        arrived = self._subscription.receive(timeout_s, most)
        for each in arrived:
            if not isinstance(each, Frame):
                self.connected = isinstance(each, Connected)
        return arrived

    def replay(self, start: int, timeout_s: float) -> Iterator[Frame]:
        """Ask the engine for what it still has from `start` on, in order; it may begin later and have gaps.

        All of it is read before the first frame is given, up to `replay_bytes` and within `timeout_s`; the first answer
        has to come within five seconds. Raises ReplayError, after the frames that came, when there is nobody to ask, no
        answer in time, or what comes is not a replay.
        """
        if self._replay is None:
            raise ReplayError("No replay endpoint is configured for this engine")
        frames: list[Frame] = []
        problem: ReplayError | None = None
        try:
            with _Dealer(self._replay, self._limits.message_bytes) as dealer:
                dealer.send_multipart([b"", start.to_bytes(8, "big")])
                self._read_replay(dealer, start, timeout_s, frames)
        except zmq.ZMQError as error:
            problem = ReplayError(f"{self._replay} cannot be asked: {error}")
        except ReplayError as error:
            problem = error
        frames.reverse()
        while frames:
            yield frames.pop()  # each is forgotten when it is given
        if problem is not None:
            raise problem

    def close(self) -> None:
        """Disconnect; what has not been received is lost. Closing again, or in a child process, does nothing."""
        self._finalizer()

    def _read_replay(self, dealer: _Dealer, start: int, timeout_s: float, into: list[Frame]) -> None:
        """Read until the end of a replay. Raises ReplayError."""
        now = time.monotonic()
        deadline = now + timeout_s
        first = now + min(timeout_s, _FIRST_ANSWER_S)
        frames = size = 0
        last = start - 1
        while True:
            if not dealer.wait(deadline if frames else first):
                problem = f"did not finish within {timeout_s} s" if frames else "did not answer"
                raise ReplayError(f"{self._replay} {problem}; {frames} frames came")
            parts, number, payload = dealer.read()
            frames += 1
            size += len(payload) + _FRAME_BYTES
            if not 2 <= parts <= 4 or len(number) != 8:
                raise ReplayError(f"{self._replay} sent what is no replay: {parts} parts, sequence {number[:16]!r}")
            if number == END and not payload:
                return
            if frames > _MAX_REPLAY_FRAMES or size > self._limits.replay_bytes:
                raise ReplayError(f"{self._replay} sent too much: {frames} frames, {size} bytes, and no end")
            seq = int.from_bytes(number, "big")
            if seq < start:
                continue
            if seq <= last or number == END:
                raise ReplayError(f"{self._replay} sent sequence {seq} after {last}")
            last = seq
            into.append(Frame(seq, payload))


class _Dealer:
    """The connection to a replay endpoint. Raises ZMQError for one that cannot be used."""

    def __init__(self, endpoint: str, max_bytes: int) -> None:
        self._endpoint = endpoint
        self._max_bytes = max_bytes
        self._intake = Intake(port_of(endpoint))
        self._socket = zmq_socket(zmq.DEALER, host_of("replay", endpoint), max_bytes, _QUEUED)
        self._monitor = zmq.Context.instance().socket(zmq.PAIR)

    def __enter__(self) -> Self:
        watched(self._socket, self._monitor)
        self._socket.connect(self._endpoint)
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.monitor(None, 0)
        self._socket.close(0)
        self._monitor.close(0)

    def send_multipart(self, parts: list[bytes]) -> None:
        """Send a message, once there is a connection."""
        self._socket.send_multipart(parts, zmq.NOBLOCK)

    def wait(self, deadline: float) -> bool:
        """Whether a message is there before the deadline. Raises ReplayError for one that does not end."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._socket.poll(math.ceil(1000 * min(left, _LOOK_S))):
                return True
            while (change := next_change(self._monitor)) is not None:
                kind, descriptor = change
                if kind & OPENED:
                    self._intake.open(descriptor)
            if self._intake.pending() > self._max_bytes + INCOMPLETE_BYTES:
                raise ReplayError(f"{self._endpoint} sent a message of very many parts, and no end")

    def read(self) -> tuple[int, bytes, bytes]:
        """Number of parts and the last two of the next message."""
        parts, number, payload, size = read_message(self._socket)
        self._intake.deliver(size)
        return parts, number, payload


def _close(subscription: Subscription, pid: int) -> None:
    """Close, but not in a child process."""
    if pid == os.getpid():
        subscription.close()
