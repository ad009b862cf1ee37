"""L1 for payloads: bytes by chunk hash, bounded. Content-addressed, so nothing ever has to be revoked. Thread-safe."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict

__all__ = ["PayloadCache", "Reading"]


class Reading:
    """That a thread reads a payload, until a deadline."""

    def __init__(self, deadline: float) -> None:
        self.ended = threading.Event()
        self.deadline = deadline


class PayloadCache:
    """Payloads used last stay. Who reads a chunk that another thread is reading waits for it instead."""

    def __init__(self, max_bytes: int) -> None:
        self.bytes = 0
        self.hits = 0
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._payloads: OrderedDict[bytes, bytes] = OrderedDict()
        self._reading: dict[bytes, Reading] = {}
        self._is_torn = False
        """Whether an interrupt cut a change short: the payloads and their bytes may not agree."""

    @property
    def is_on(self) -> bool:
        """Whether anything is kept at all."""
        return self._max_bytes > 0

    def get(self, chunk: bytes) -> bytes | None:
        """A payload, if it is there."""
        with self._lock:
            self._mend()
            payload = self._payloads.get(chunk)
            if payload is not None:
                self._payloads.move_to_end(chunk)
                self.hits += 1
            return payload

    def begin(self, chunk: bytes, reading: Reading) -> Reading:
        """Say that the caller reads a chunk, to be ended with `end`; or what to wait for when another one does.

        What should have ended by now was interrupted, and is not waited for.
        """
        with self._lock:
            other = self._reading.get(chunk)
            if other is not None and time.monotonic() < other.deadline:
                return other
            self._reading[chunk] = reading
            return reading

    def end(self, chunk: bytes, reading: Reading, payload: memoryview | None) -> None:
        """The caller has read a chunk, or could not. A copy is kept while there is room."""
        kept = bytes(payload) if payload is not None and len(payload) <= self._max_bytes else None
        with self._lock:
            self._mend()
            if kept is not None and chunk not in self._payloads:
                try:
                    self._keep(chunk, kept)
                except BaseException:
                    self._is_torn = True
                    raise
            if self._reading.get(chunk) is reading:
                del self._reading[chunk]
        reading.ended.set()

    def _keep(self, chunk: bytes, kept: bytes) -> None:
        self._payloads[chunk] = kept
        self.bytes += len(kept)
        while self.bytes > self._max_bytes:
            _, gone = self._payloads.popitem(last=False)
            self.bytes -= len(gone)

    def _mend(self) -> None:
        """Begin anew, empty, after a change that was cut short."""
        if self._is_torn:
            self._payloads.clear()
            self.bytes = 0
            self._is_torn = False
