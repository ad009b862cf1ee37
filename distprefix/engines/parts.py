"""Chains of which parts may be missing: of layers with sliding windows engines keep only the end of a chain.

What lies behind a hole is kept chunk by chunk, each a chain of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from distprefix.chunking import HASH_BYTES
from distprefix.config import PrefixCacheConfig
from distprefix.engines.store import EngineStore, each_chunk, load_alone, size_of, store_alone
from distprefix.optimizer import PrefixCacheOptimizer
from distprefix.redis.transfers import Buffer

__all__ = ["PartStore"]


class PartStore(EngineStore):
    """Answers for each chunk. With `alone` a chunk behind a hole is kept as a chain of its own, else it is dropped."""

    def __init__(self, config: PrefixCacheConfig, *, alone: bool, max_waiting_bytes: int) -> None:
        super().__init__(config, max_waiting_bytes=max_waiting_bytes)
        self._alone = alone

    def look_up_parts(self, chain: bytes, chunks: Sequence[int]) -> Future[set[int]]:
        """Which of a chain's chunks can be loaded. One Redis call for 4,096 chunks, 300 nodes, or 500 asked for."""

        def work(cache: PrefixCacheOptimizer) -> set[int]:
            asked = b"".join(_hashes(chain, chunk, chunk + 1) for chunk in chunks)
            prompts = [cache.chain_of_hashes(chain), *(each_chunk(cache, asked) if self._alone else ())]
            stored, *alone = cache.find_stored_batch(prompts, as_one=True)
            found = {chunk for chunk, there in zip(chunks, alone, strict=False) if there}
            return found | {chunk for chunk in chunks if chunk < stored}

        return self._submit(self._lookups, work, set())

    def load_parts(self, chain: bytes, into: Sequence[Buffer], first: int) -> Future[list[bool]]:
        """Load chunks from `first` on into buffers. Which of them are good."""

        def work(cache: PrefixCacheOptimizer) -> list[bool]:
            loaded = cache.load(cache.chain_of_hashes(chain), into, first=first, was_looked_up=True).chunks
            good = [True] * loaded + [False] * (len(into) - loaded)
            if self._alone and loaded < len(into):
                rest = _hashes(chain, first + loaded, first + len(into))
                good[loaded:] = load_alone(cache, rest, into[loaded:], continues=True)
            self._count("chunks_loaded", sum(good))
            return good

        return self._submit(self._loads, work, [False] * len(into))

    def store_parts(self, chain: bytes, payloads: Sequence[Buffer], first: int) -> Future[list[bool]]:
        """Store chunks from `first` on. Which of them are there then; none while too many bytes wait already."""

        def work(cache: PrefixCacheOptimizer) -> list[bool]:
            stored = cache.store(cache.chain_of_hashes(chain), [*([None] * first), *payloads]) - first
            good = [at < stored for at in range(len(payloads))]
            if stored < 0:
                self._count("holes", 1)
                if self._alone:
                    good = store_alone(cache, _hashes(chain, first, first + len(payloads)), payloads)
            self._count("stores_dropped", good.count(False))
            return good

        return self._store(work, len(payloads), size_of(payloads), [False] * len(payloads))


def _hashes(chain: bytes, first: int, stop: int) -> bytes:
    return chain[first * HASH_BYTES : stop * HASH_BYTES]
