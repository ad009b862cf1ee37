"""A part of an engine, such as its scheduler or a worker of it, that counts for itself what it asked for and got."""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import Any, Self

from distprefix import PrefixCacheConfig
from distprefix.engines.store import EngineStore
from distprefix.hashing import HASH_BYTES, ChunkHasher

__all__ = ["CHUNK_TOKENS", "SimulatedEngine"]

CHUNK_TOKENS = 16


class SimulatedEngine:
    """One store, as every part of an engine has one. Prompts have a number; none begins as another one does."""

    PAYLOAD_BYTES = 1000

    def __init__(self, settings: dict[str, Any]) -> None:
        self.counted = Counter[str]()
        self.used = Counter[str]()
        """Look-ups that found anything of a prompt, by its number; loading what was looked up is no second hit."""
        self._store = EngineStore(PrefixCacheConfig(**settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @classmethod
    def head_of(cls, hasher: ChunkHasher, number: int) -> str:
        """The name of a prompt's first chunk, in hex."""
        return hasher.names(cls._chain(number, 1)).hex()

    def look_up(self, number: int, chunks: int) -> None:
        """How much of a prompt there is."""
        found = self._store.look_up(self._chain(number, chunks)).result(30)
        self.counted["lookups"] += 1
        self.counted["hits"] += bool(found)
        self.counted["tokens_hit"] += found * CHUNK_TOKENS
        self.used[str(number)] += bool(found)

    def load(self, number: int, chunks: int) -> None:
        """Load what there is of a prompt, and see where it came from."""
        before = self._store.metrics().get("payload_bytes_loaded_cold", 0)
        into = [bytearray(self.PAYLOAD_BYTES) for _ in range(chunks)]
        loaded = self._store.load(self._chain(number, chunks), into, 0).result(30)
        assert all(into[at] == self._payload(number, at) for at in range(loaded))
        self.counted["loads"] += 1
        self.counted["tokens_loaded"] += loaded * CHUNK_TOKENS
        self.counted["payload_bytes_loaded"] += loaded * self.PAYLOAD_BYTES
        if self._store.metrics()["payload_bytes_loaded_cold"] > before:
            self.counted["payload_bytes_loaded_cold"] += loaded * self.PAYLOAD_BYTES

    def store(self, number: int, chunks: int) -> None:
        """Store a prompt."""
        payloads = [self._payload(number, at) for at in range(chunks)]
        stored = self._store.store(self._chain(number, chunks), payloads, 0).result(30)
        self.counted["payload_bytes_stored"] += stored * self.PAYLOAD_BYTES

    def close(self) -> None:
        """Close the store."""
        self._store.close()

    @staticmethod
    def _chain(number: int, chunks: int) -> bytes:
        hashes = [hashlib.sha256(f"{number} {at}".encode()).digest()[:HASH_BYTES] for at in range(chunks)]
        return b"".join(hashes)

    @classmethod
    def _payload(cls, number: int, at: int) -> bytes:
        return bytes([number, at]) * (cls.PAYLOAD_BYTES // 2)
