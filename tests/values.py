"""Values for tests of the data path, where they go, and servers that do as they are told."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Callable, Generator

from distprefix.redis.data import DataPool

__all__ = ["MIB", "Fake", "Into", "fake", "noise", "read", "saying", "skip_all", "soon"]

MIB = 1024 * 1024


def soon(seconds: float = 20) -> float:
    """A deadline."""
    return time.monotonic() + seconds


def noise(length: int) -> bytes:
    """Bytes that differ wherever they are shifted."""
    return random.Random(length).randbytes(min(length, 99_991)) * (length // 99_991 + 1)


class Into:
    """A sink that gives fresh buffers, each value cut into several views."""

    def __init__(self, views: int = 1) -> None:
        self.found: dict[int, bytearray] = {}
        self._views = views

    def __call__(self, index: int, length: int) -> list[memoryview]:
        """Room for a value."""
        whole = memoryview(self.found.setdefault(index, bytearray(length)))
        step = length // self._views + 1
        return [whole[start : start + step] for start in range(0, length, step)]


def read(pool: DataPool, *keys: str, seconds: float = 20) -> list[bytes | None]:
    """The values, None for what is not there."""
    sink = Into()
    lengths = pool.get(keys, sink, soon(seconds))
    return [None if length < 0 else bytes(sink.found[index]) for index, length in enumerate(lengths)]


def skip_all(index: int, length: int) -> None:
    """A sink that wants nothing."""


class Fake:
    """A server that does what the test says with every connection, the number of which it counts."""

    def __init__(self, talk: Callable[[socket.socket], None]) -> None:
        self._talk = talk
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.url = f"redis://127.0.0.1:{self.port}"
        self.connections = 0
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            accepted, _ = self._listener.accept()
            if self._listener.gettimeout() == 0.5:
                accepted.close()
                return
            self.connections += 1
            accepted.settimeout(10)
            self._threads.append(threading.Thread(target=self._serve, args=(accepted,)))
            self._threads[-1].start()

    def _serve(self, accepted: socket.socket) -> None:
        with accepted, contextlib.suppress(OSError):
            self._talk(accepted)

    def close(self) -> None:
        """Stop accepting and wait for all talks to end."""
        self._listener.settimeout(0.5)
        socket.create_connection(("127.0.0.1", self.port)).close()
        for thread in self._threads:
            thread.join()
        self._listener.close()


@contextlib.contextmanager
def fake(talk: Callable[[socket.socket], None]) -> Generator[tuple[Fake, DataPool]]:
    """A fake server and a pool that leads there."""
    server = Fake(talk)
    pool = DataPool(server.url, timeout_s=5)
    try:
        yield server, pool
    finally:
        pool.close()
        server.close()


def saying(*answers: bytes, stay: bool = True) -> Callable[[socket.socket], None]:
    """Answer each thing that comes with the next answer; then wait for the other side to close, or close."""

    def talk(accepted: socket.socket) -> None:
        for answer in answers:
            accepted.recv(65536)
            accepted.sendall(answer)
        while stay and accepted.recv(65536):
            pass

    return talk
