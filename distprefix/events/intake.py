"""What ZMQ keeps of messages that are not complete. It bounds the parts of a message, but not how many there are."""

from __future__ import annotations

import os
import socket
import struct
import time
from contextlib import closing, suppress

__all__ = ["Intake"]

_INFO_BYTES = 256
_RECEIVED = struct.Struct("=Q")
_RECEIVED_AT = 128  # tcpi_bytes_received of struct tcp_info, in Linux 4.1 and later
_SLACK_PER_S = 1024  # ZMQ's own heartbeats, which are received and not delivered


class Intake:
    """Compares what the TCP connections of a socket have received with what the socket has delivered.

    Where the system does not tell (no TCP, not Linux), nothing is ever pending. Not thread-safe.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._received: dict[int, int] = {}
        """By file descriptor, when it was looked at last."""
        self._delivered = 0
        self._pending = 0.0
        self._at = time.monotonic()

    def __len__(self) -> int:
        return len(self._received)

    def open(self, descriptor: int) -> None:
        """A connection is there."""
        self._received[descriptor] = 0

    def close(self, descriptor: int) -> None:
        """A connection is gone, and what was not complete with it."""
        self._received.pop(descriptor, None)
        if not self._received:
            self._pending = 0.0

    def deliver(self, size: int) -> None:
        """The socket has delivered a message of so many bytes on the wire."""
        self._delivered += size

    def pending(self) -> int:
        """Bytes that were received and not delivered. To be asked for when the socket has no message left."""
        now = time.monotonic()
        grown = 0
        for descriptor, before in self._received.items():
            received = self._read(descriptor)
            if received is not None:
                grown += max(0, received - before)
                self._received[descriptor] = received
        spared = self._delivered + _SLACK_PER_S * (now - self._at)
        self._pending = max(0.0, self._pending + grown - spared)
        self._delivered = 0
        self._at = now
        return int(self._pending)

    def cut(self, descriptor: int | None = None) -> None:
        """End a connection, or all of them: ZMQ drops what was not complete, and connects again where it did before."""
        for each in list(self._received) if descriptor is None else [descriptor]:
            with suppress(OSError), closing(socket.socket(fileno=os.dup(each))) as connection:
                if self._is_ours(connection):
                    connection.shutdown(socket.SHUT_RDWR)
        self._pending = 0.0

    def _read(self, descriptor: int) -> int | None:
        try:
            with closing(socket.socket(fileno=os.dup(descriptor))) as connection:
                if not self._is_ours(connection):
                    return None
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _INFO_BYTES)
        except (OSError, AttributeError):
            return None
        if len(info) < _RECEIVED_AT + _RECEIVED.size:
            return None
        return _RECEIVED.unpack_from(info, _RECEIVED_AT)[0]

    def _is_ours(self, connection: socket.socket) -> bool:
        """Whether the descriptor still is a connection of this socket: its number may be another file's by now."""
        ports = [address[1] for address in (connection.getsockname(), connection.getpeername()) if len(address) > 1]
        return self._port in ports
