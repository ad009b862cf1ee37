"""A publisher that speaks ZMTP itself, so that it can do what ZMQ's own never does."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress

__all__ = ["long_part", "raw_peer"]

_GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_MORE, _LONG, _COMMAND = 1, 2, 4


def long_part(size: int, *, more: bool) -> bytes:
    """One part of a message, on the wire."""
    return bytes([_LONG | (_MORE if more else 0)]) + size.to_bytes(8, "big") + bytes(size)


@contextmanager
def raw_peer(kind: str, talk: Callable[[socket.socket], object]) -> Generator[str]:
    """An endpoint where whoever connects is greeted by a socket of a kind, such as PUB, and talked to."""
    stopped = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.05)

        def serve() -> None:
            while not stopped.is_set():
                with suppress(OSError), server.accept()[0] as connection:
                    connection.settimeout(0.5)
                    connection.sendall(_GREETING + _ready(kind))
                    talk(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"tcp://127.0.0.1:{server.getsockname()[1]}"
        finally:
            stopped.set()
            thread.join()


def _ready(kind: str) -> bytes:
    name = b"Socket-Type"
    value = kind.encode()
    body = b"\x05READY" + bytes([len(name)]) + name + len(value).to_bytes(4, "big") + value
    return bytes([_COMMAND, len(body)]) + body
