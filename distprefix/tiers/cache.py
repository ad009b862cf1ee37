"""L1 for payloads: bytes by chunk hash, bounded. Content-addressed, so nothing ever has to be revoked. Thread-safe."""

from __future__ import annotations

import threading
from collections import OrderedDict

__all__ = ["PayloadCache"]


class PayloadCache:
    """Payloads used last stay. Who reads a chunk that another thread is reading waits for it instead."""

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self.hits = 0
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._payloads: OrderedDict[bytes, bytes] = OrderedDict()
        self._reading: dict[bytes, threading.Event] = {}

    @property
    def is_on(self) -> bool:
        """Whether anything is kept at all."""
        return self._max_bytes > 0

    def get(self, chunk: bytes) -> bytes | None:
        """A payload, if it is there."""
        with self._lock:
            payload = self._payloads.get(chunk)
            if payload is not None:
                self._payloads.move_to_end(chunk)
                self.hits += 1
            return payload

    def begin(self, chunk: bytes) -> threading.Event | None:
        """Say that the caller reads a chunk, to be ended with `end`; or what to wait for when another one does."""
        with self._lock:
            reading = self._reading.get(chunk)
            if reading is None:
                self._reading[chunk] = threading.Event()
            return reading

    def end(self, chunk: bytes, payload: memoryview | None) -> None:
        """The caller has read a chunk, or could not. A copy is kept while there is room."""
        kept = bytes(payload) if payload is not None and len(payload) <= self._max_bytes else None
        with self._lock:
            if kept is not None and chunk not in self._payloads:
                self._payloads[chunk] = kept
                self.bytes += len(kept)
                while self.bytes > self._max_bytes:
                    _, gone = self._payloads.popitem(last=False)
                    self.bytes -= len(gone)
            reading = self._reading.pop(chunk, None)
        if reading is not None:
            reading.set()
