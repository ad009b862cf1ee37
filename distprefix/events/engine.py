"""The stream of one engine over ZMQ: what it publishes, and what it sends again. Needs ``distprefix[events]``."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Self

import zmq

from distprefix.errors import ConfigError, ForkedProcessError, ReplayError
from distprefix.events.answer import Answer
from distprefix.events.frames import Frame
from distprefix.events.inbox import Arrival, Connected, Disconnected
from distprefix.events.intake import Intake
from distprefix.events.limits import EngineLimits
from distprefix.events.wire import (
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
_QUIET_S = 1.0
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
        self.counts: Counter[str] = Counter()
        """What replays took."""
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

    def replay(
        self, start: int, timeout_s: float, *, until: int | None = None, keep: Callable[[], object] | None = None
    ) -> Iterator[Frame]:
        """Ask the engine for what it still has from `start` on, in order; it may begin later and have gaps.

        All of it is read before the first frame is given, up to `replay_bytes` and within `timeout_s`; the first answer
        has to come within five seconds. An engine's queue drops what finds no room, be it the end: what lacks inside is
        asked for again while that brings some of it, and so is what follows when nothing came for a second. Once all
        before `until` is there, no more is waited for. `keep` is called meanwhile, at least every tenth of a second.
        Raises ReplayError, after the frames that came, when there is nobody to ask, no answer in time, or what comes is
        not a replay.
        """
        if self._replay is None:
            raise ReplayError("No replay endpoint is configured for this engine")
        answer = Answer(start, until, self._limits.replay_bytes)
        problem: ReplayError | None = None
        try:
            with _Dealer(self._replay, self._limits.message_bytes, keep) as dealer:
                self._read_replay(dealer, answer, timeout_s)
        except zmq.ZMQError as error:
            problem = ReplayError(f"{self._replay} cannot be asked: {error}")
        except ReplayError as error:
            problem = error
        yield from answer.frames()
        if problem is not None:
            raise problem

    def close(self) -> None:
        """Disconnect; what has not been received is lost. Closing again, or in a child process, does nothing."""
        self._finalizer()

    def _read_replay(self, dealer: _Dealer, answer: Answer, timeout_s: float) -> None:
        """Read until the end of a replay. Raises ReplayError."""
        now = time.monotonic()
        deadline = now + timeout_s
        wait_until = now + min(timeout_s, _FIRST_ANSWER_S)
        dealer.ask(answer.wanted())
        while not answer.is_complete:
            if dealer.wait(min(deadline, wait_until)):
                parts, number, payload = dealer.read()
                try:
                    is_end = answer.add(parts, number, payload)
                except ReplayError as error:
                    raise ReplayError(f"{self._replay} {error}") from None
                wait_until = time.monotonic() + _QUIET_S
                if not is_end:
                    continue
                if not answer.may_be_filled():
                    return
            elif not answer.has_grown or time.monotonic() >= deadline:
                problem = f"did not finish within {timeout_s} s" if answer.is_begun else "did not answer"
                raise ReplayError(f"{self._replay} {problem}; {len(answer)} frames came")
            dealer.ask(answer.wanted())
            self.counts["replays_asked_again"] += 1
            wait_until = time.monotonic() + _FIRST_ANSWER_S


class _Dealer:
    """The connection to a replay endpoint. Raises ZMQError for one that cannot be used."""

    def __init__(self, endpoint: str, max_bytes: int, keep: Callable[[], object] | None) -> None:
        self._keep = keep
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

    def ask(self, start: int) -> None:
        """Ask for messages from there on, once there is a connection."""
        self._socket.send_multipart([b"", start.to_bytes(8, "big")], zmq.NOBLOCK)

    def wait(self, deadline: float) -> bool:
        """Whether a message is there before the deadline. Raises ReplayError for one that does not end."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            if self._keep is not None:
                self._keep()
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
