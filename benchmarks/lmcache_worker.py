"""A Redis client of LMCache, driven by payload_peers.py in LMCache's environment: lmcache_worker.py KIND.

KIND is `resp` (C++, 8 threads, as by default), `hiredis` or `redis-py` (asyncio; with hiredis, and without). Standard
input says what to do: `open URL SIZE COUNT`; then `store` and `load` move COUNT values of SIZE bytes at once and tell
the seconds that this took, and `check` loads and tells whether it is what was stored. An answer begins with ``> ``,
as LMCache logs there too. The memory is that of LMCache's own pool on the CPU.
"""

from __future__ import annotations

import asyncio
import sys
import time
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

_TOKENS, _HEADS, _DIM = 16, 4, 128
_LAYER_BYTES = 2 * _TOKENS * _HEADS * _DIM * 2


async def main(kind: str) -> None:
    """Serve until the input ends."""
    if kind == "redis-py":
        sys.modules["hiredis"] = None  # pyright: ignore[reportArgumentType] - redis-py takes it for not installed
    side: _Side | None = None
    for line in sys.stdin:
        what, *args = line.split()
        if what == "open":
            # the one before is not closed: its close() waits for the loop that it is called from
            side = _Side(kind, args[0], int(args[1]), int(args[2]))
            _answer("ready")
        elif side is not None:
            _answer(await getattr(side, what)())


class _Side:
    """A client with what it stores."""

    def __init__(self, kind: str, url: str, size: int, count: int) -> None:
        torch = import_module("torch")
        backend, metadata = _pool(torch, size, count)
        self.connector = _connect(kind, url, backend)
        # the fastest call that each has for many values
        self._load = self.connector.batched_get if kind == "resp" else self._load_by_redis_py
        key = import_module("lmcache.utils").CacheEngineKey
        self._keys = [key("bench", 1, 0, at + 1, torch.bfloat16) for at in range(count)]
        self._sources = [backend.allocate(metadata.get_shapes(), metadata.get_dtypes()) for _ in self._keys]
        for at, source in enumerate(self._sources):
            source.tensor.view(torch.int16).random_(generator=torch.Generator().manual_seed(at))
            assert len(source.byte_array) == size, "the pool gives another size"

    async def store(self) -> float:
        """Seconds."""
        began = time.perf_counter()
        await self.connector.batched_put(self._keys, self._sources)
        return time.perf_counter() - began

    async def load(self) -> float:
        """Seconds."""
        began = time.perf_counter()
        loaded = await self._load(self._keys)
        seconds = time.perf_counter() - began
        for each in loaded:
            each.ref_count_down()
        return seconds

    async def check(self) -> bool:
        """Whether what comes is what was stored."""
        loaded = await self._load(self._keys)
        same = [*map(_bytes, loaded)] == [*map(_bytes, self._sources)]
        for each in loaded:
            each.ref_count_down()
        return same

    async def _load_by_redis_py(self, keys: list[Any]) -> Any:
        return await self.connector.batched_get_non_blocking("bench", keys)


def _answer(what: object) -> None:
    print(f"> {what}", flush=True)


def _bytes(memory: Any) -> memoryview:
    return memory.byte_array.cast("B")


def _pool(torch: Any, size: int, count: int) -> tuple[Any, Any]:
    """Memory for what is stored and what is loaded, and what a chunk looks like."""
    config = import_module("lmcache.v1.config").LMCacheEngineConfig.from_defaults(
        chunk_size=_TOKENS, local_cpu=False, max_local_cpu_size=0.1 + 3 * size * count / 2**30
    )
    metadata = import_module("lmcache.v1.metadata").LMCacheMetadata(
        model_name="bench",
        world_size=1,
        local_world_size=1,
        worker_id=0,
        local_worker_id=0,
        kv_dtype=torch.bfloat16,
        kv_shape=(size // _LAYER_BYTES, 2, _TOKENS, _HEADS, _DIM),
        chunk_size=_TOKENS,
    )
    backend = import_module("lmcache.v1.storage_backend.local_cpu_backend")
    return backend.LocalCPUBackend(config, metadata, "cpu"), metadata


def _connect(kind: str, url: str, backend: Any) -> Any:
    connectors = import_module("lmcache.v1.storage_backend.connector.redis_connector")
    loop = asyncio.get_running_loop()
    if kind == "resp":
        address = urlsplit(url)
        return connectors.RESPConnector(address.hostname, address.port, loop, backend)
    assert (kind == "hiredis") == import_module("redis.utils").HIREDIS_AVAILABLE, "not the parser that was asked for"
    return connectors.RedisConnector(url, loop, backend)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
