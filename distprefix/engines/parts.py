"""Chains of which parts may be missing: of layers with sliding windows engines keep only the end of a chain."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future

from distprefix.chunking import HASH_BYTES, Chain
from distprefix.config import PrefixCacheConfig
from distprefix.engines.store import EngineStore, each_chunk, size_of
from distprefix.optimizer import PrefixCacheOptimizer
from distprefix.redis.transfers import Buffer

__all__ = ["PartStore"]


class PartStore(EngineStore):
    """Answers for each chunk. With `alone` a chunk behind a hole is kept as a chain of its own, else it is dropped."""

    def __init__(self, config: PrefixCacheConfig, *, alone: bool, max_waiting_bytes: int) -> None:
        super().__init__(config, max_waiting_bytes=max_waiting_bytes)
        self._alone = alone

    def look_up_parts(self, chain: bytes, chunks: Sequence[int]) -> Future[set[int]]:
        """Which of a chain's chunks can be loaded. One Redis call for 4,096 chunks, or 500 of those asked for."""

        def work(cache: PrefixCacheOptimizer) -> set[int]:
            asked = b"".join(chain[chunk * HASH_BYTES : (chunk + 1) * HASH_BYTES] for chunk in chunks)
            found = cache.find_stored_batch([Chain.packed(chain), *(each_chunk(asked) if self._alone else ())])
            alone = found[1:] or [0] * len(chunks)
            return {chunk for chunk, there in zip(chunks, alone, strict=True) if there or chunk < found[0]}

        return self._submit(self._lookups, work, set())

    def load_parts(self, chain: bytes, into: Sequence[Buffer], first: int) -> Future[list[bool]]:
        """Load chunks from `first` on into buffers. Which of them are good."""

        def work(cache: PrefixCacheOptimizer) -> list[bool]:
            loaded = cache.load(Chain.packed(chain), into, first=first).chunks
            good = [True] * loaded + [False] * (len(into) - loaded)
            if self._alone and loaded < len(into):
                rest = each_chunk(chain[(first + loaded) * HASH_BYTES :])
                wanted = [(chunk, [target]) for chunk, target in zip(rest, into[loaded:], strict=True)]
                good[loaded:] = [bool(each.chunks) for each in cache.load_batch(wanted)]
            self._count("chunks_loaded", sum(good))
            return good

        return self._submit(self._loads, work, [False] * len(into))

    def store_parts(self, chain: bytes, payloads: Sequence[Buffer], first: int) -> Future[list[bool]]:
        """Store chunks from `first` on. Which of them are there then; none while too many bytes wait already."""

        def work(cache: PrefixCacheOptimizer) -> list[bool]:
            stored = cache.store(Chain.packed(chain), [*([None] * first), *payloads]) - first
            self._count("holes", int(stored < 0))
            done = max(0, stored)
            good = [True] * done + [False] * (len(payloads) - done)
            if self._alone and done < len(payloads):
                rest = each_chunk(chain[(first + done) * HASH_BYTES :])
                wanted = [(chunk, [payload]) for chunk, payload in zip(rest, payloads[done:], strict=True)]
                good[done:] = map(bool, cache.store_batch(wanted))
            self._count("stores_dropped", good.count(False))
            return good

        return self._store(work, len(payloads), size_of(payloads), [False] * len(payloads))
