"""A proxy before a server that forwards commands, and answers those in its place that a test picks."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from typing import BinaryIO

__all__ = ["Answer", "CloseError", "Proxy", "bulk"]

Answer = Callable[[list[bytes], Callable[[], bytes]], bytes]
"""Gets a command, and what forwards it and gives the server's reply; returns what the client gets."""


class CloseError(Exception):
    """The client gets these bytes, and its connection ends."""


def bulk(value: bytes) -> bytes:
    """A value as it is sent."""
    return b"$%d\r\n%s\r\n" % (len(value), value)


def forward(_: list[bytes], ask: Callable[[], bytes]) -> bytes:
    """Answer nothing in the server's place."""
    return ask()


class Proxy:
    """Listens on a port of its own; every command passes `answer`, one after the other on each connection."""

    def __init__(self, url: str) -> None:
        self.answer: Answer = forward
        self.greeting = b""
        """What a new connection gets before it is closed; empty to serve it."""
        self._path = url.removeprefix("unix://").rpartition("@")[2]
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """End every connection."""
        self._listener.close()
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        server = socket.socket(socket.AF_UNIX)
        self._open |= {client, server}
        with client, server, contextlib.suppress(OSError, EOFError):
            if self.greeting:
                client.sendall(self.greeting)
                return
            server.connect(self._path)
            with client.makefile("rb") as asked, server.makefile("rb") as replies:
                self._talk(client, server, asked, replies)
        self._open -= {client, server}

    def _talk(self, client: socket.socket, server: socket.socket, asked: BinaryIO, replies: BinaryIO) -> None:
        while True:
            words = [_value(asked) for _ in range(int(_line(asked)[1:]))]

            def ask(words: list[bytes] = words) -> bytes:
                server.sendall(b"*%d\r\n%s" % (len(words), b"".join(map(bulk, words))))
                return _reply(replies)

            try:
                reply = self.answer(words, ask)
            except CloseError as error:
                client.sendall(error.args[0])
                return
            client.sendall(reply)


def _line(stream: BinaryIO) -> bytes:
    line = stream.readline()
    if not line:
        raise EOFError
    return line


def _value(stream: BinaryIO) -> bytes:
    length = int(_line(stream)[1:])
    return stream.read(length + 2)[:-2]


def _reply(stream: BinaryIO) -> bytes:
    """One reply as it came, in either protocol."""
    line = _line(stream)
    kind, size = line[:1], line[1:-2]
    if kind in b"$=!" and size != b"-1":
        return line + stream.read(int(size) + 2)
    if kind in b"*~>%" and size != b"-1":
        count = int(size) * (2 if kind == b"%" else 1)
        return line + b"".join(_reply(stream) for _ in range(count))
    return line
