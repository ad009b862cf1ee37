"""Faults for tests: a proxy whose target may change and whose flows may be forgotten, servers that stay silent."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator
from typing import Self

import redis

from tests.servers import Server

__all__ = ["Relay", "refuse_writes", "signals", "silent", "wait_until"]

_PATIENCE_S = 20.0


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + _PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.01)


class _Flow:
    """One connection through a relay."""

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near = near
        self.far = far
        self.is_forgotten = False

    def close(self) -> None:
        for each in (self.near, self.far):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


class Relay:
    """A TCP proxy: new connections lead to `target`, those that are open stay where they are.

    `forget` has open flows swallow all that is sent, as a balancer does with flows that were idle.
    """

    def __init__(self, target: int) -> None:
        self.target = target
        self.forgets_after: bytes | None = None
        """A flow that carries these bytes to the server is forgotten."""
        self.cuts_after = 0
        """A flow ends, in the middle of a reply, once the server has sent so many bytes on it; 0 for never."""
        self.accepted = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}"
        self._flows: list[_Flow] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def forget(self) -> None:
        """Every flow that is open swallows what comes, on both sides, and stays open."""
        for flow in self._flows:
            flow.is_forgotten = True

    def close(self) -> None:
        """Close all sockets and end the threads."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for flow in self._flows:
            flow.close()
        for thread in self._threads:
            thread.join(timeout=5)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            self.accepted += 1
            try:
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            for each in (near, far):
                each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            flow = _Flow(near, far)
            self._flows.append(flow)
            for source, sink in ((near, far), (far, near)):
                thread = threading.Thread(target=self._copy, args=(flow, source, sink), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _copy(self, flow: _Flow, source: socket.socket, sink: socket.socket) -> None:
        sent = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 18):
                sent += len(data)
                if self.cuts_after and source is flow.far and sent > self.cuts_after:
                    break
                if self.forgets_after is not None and source is flow.near and self.forgets_after in data:
                    flow.is_forgotten = True
                if not flow.is_forgotten:
                    sink.sendall(data)
        if not flow.is_forgotten:
            flow.close()


@contextlib.contextmanager
def silent(port: int = 0, *, accepts: bool = True) -> Generator[int]:
    """A port where connections are taken and nothing is answered; with `accepts` off, the listening backlog is full."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(64 if accepts else 0)
    address = listener.getsockname()
    waiting: list[socket.socket] = []
    while not accepts:
        each = socket.socket()
        each.settimeout(0.2)
        waiting.append(each)
        try:
            each.connect(address)
        except TimeoutError:
            break
    try:
        yield int(address[1])
    finally:
        for each in (*waiting, listener):
            each.close()


@contextlib.contextmanager
def refuse_writes(server: Server, how: str) -> Generator[None]:
    """The server refuses writes with MISCONF or NOREPLICAS, or pauses them, and answers reads."""
    with server.client() as admin:
        if how == "misconf":
            admin.config_set("save", "3600 1000000")
            (server.folder / "dump.rdb").mkdir()  # where a snapshot cannot be written
            admin.bgsave()
            wait_until(lambda: _is_refused(admin, "MISCONF"))
        elif how == "noreplicas":
            admin.config_set("min-replicas-to-write", 1)
        else:
            admin.client_pause(600_000, all=False)
        yield
        if how == "misconf":
            admin.config_set("save", "")
        elif how == "noreplicas":
            admin.config_set("min-replicas-to-write", 0)
        else:
            admin.client_unpause()


def _is_refused(admin: redis.Redis, code: str) -> bool:
    try:
        admin.delete("nothing")
    except redis.ResponseError as error:
        return str(error).startswith(code)
    return False


@contextlib.contextmanager
def signals(thread: int, number: signal.Signals = signal.SIGUSR1) -> Generator[None]:
    """A thread gets a signal every 10 ms, whose handler does nothing. To be entered in the main thread."""

    def do_nothing(_number: int, _frame: object) -> None:
        pass

    before = signal.signal(number, do_nothing)
    ended = threading.Event()

    def send() -> None:
        while not ended.wait(0.01):
            with contextlib.suppress(ProcessLookupError):
                signal.pthread_kill(thread, number)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    try:
        yield
    finally:
        ended.set()
        sender.join()
        signal.signal(number, before)
