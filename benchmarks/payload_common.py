"""What the benchmarks of payloads share: caches, chains, and bytes that pack as KV does."""

from __future__ import annotations

import random
from typing import Any

import numpy as np

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.chunking import HASH_BYTES, Chain

__all__ = ["bf16_payload", "gb_per_s", "new_chain", "open_cache"]

_random = random.Random(3)


def open_cache(url: str, name: str, **settings: Any) -> PrefixCacheOptimizer:
    """A cache without limits or background work; `name` is the namespace, or NAMESPACE-WORKER."""
    return PrefixCacheOptimizer(
        PrefixCacheConfig.from_mapping(
            {
                "url": url,
                "namespace": name.partition("-")[0],
                "worker_id": name,
                "max_cached_sequences": 10**9,
                "lookup_timeout_s": 10,
                "publish_timeout_s": 10,
                "payload_timeout_s": 600,
                "touch_interval_s": 0,
                "feed_interval_s": 0,
                "staleness_sample": 0,
                "l1_ttl_s": 1e6,
                "strict": True,
                **settings,
            }
        )
    )


def new_chain(chunks: int) -> Chain:
    """A prompt that shares nothing with others."""
    return Chain.packed(_random.randbytes(chunks * HASH_BYTES))


def bf16_payload(size: int, seed: int) -> memoryview:
    """Gaussian noise as bf16, rounded to the nearest: as in real KV exponents can be packed, and mantissas cannot."""
    noise: Any = np.random.default_rng(seed).standard_normal(size // 2, np.float32)
    bits = noise.view(np.uint32)
    return memoryview(((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)).cast("B")


def gb_per_s(size: int, seconds: float) -> str:
    """So many bytes in that time."""
    return f"{size / seconds / 1e9:.2f} GB/s"
