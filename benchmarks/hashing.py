"""What naming chunks costs: each hash algorithm under a key, beside what was the default before and beside BLAKE3.

Parts: hash (tokens a second, by algorithm), lookup (of tokens that L1 does not know, 64 and 8,192 chunks), publish (of
tokens, chunks a second).
"""

from __future__ import annotations

import itertools
import random
from array import array
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import xxhash
from measure import Case, Figure, interleave, run_parts, untargeted

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.hashing import HASH_ALGORITHMS, ChunkHasher

_CHUNK = 16
_STRIDE = 4 * _CHUNK
_UNKEYED = "xxh3_128 without a key"
_random = random.Random(7)


def hash_tokens(_: str, scale: float) -> list[Figure]:
    """Chains of 8,192 chunks, hashed in this process."""
    tokens = memoryview(_tokens(8192)).cast("B")
    hashers = {name: ChunkHasher(name, bytes(32)) for name in HASH_ALGORITHMS}
    cases = {name: Case(lambda h=hasher: h.chain(h.root, tokens, _STRIDE)) for name, hasher in hashers.items()}
    cases[_UNKEYED] = Case(lambda: _chain_by(xxhash.xxh3_128_digest, tokens))
    if find_spec("blake3") is not None:
        cases["BLAKE3, its package"] = Case(lambda: _chain_by(_blake3(bytes(32)), tokens))
    times = interleave(cases, max(5, int(60 * scale)))
    figures: list[Figure] = []
    for name, taken in times.items():
        rate = 8192 * _CHUNK / taken * 1e6
        figures.append(untargeted(f"hash with {name}", f"{rate:,.0f} tokens/s", "-", taken / 8.192, " ns a chunk"))
        if name != _UNKEYED:
            ratio = taken / times[_UNKEYED]
            figures.append(untargeted(f"hash with {name}, against {_UNKEYED}", "", "", ratio, "x the time"))
    return figures


def lookup(url: str, scale: float) -> list[Figure]:
    """Look-ups of tokens that L1 knows nothing of: hashing and one script call."""
    figures: list[Figure] = []
    for chunks in (64, 8192):
        prompt = _tokens(chunks)
        caches: dict[str, PrefixCacheOptimizer] = {}
        for name in HASH_ALGORITHMS:
            with _open(url, name, "writer") as writer:
                writer.cache_prefix(prompt)
            caches[name] = _open(url, name, "reader")
            assert caches[name].find_longest_cache_hit(prompt).matched_chunks == chunks
        cases = {
            name: Case(lambda c=cache, p=prompt: c.find_longest_cache_hit(p), cache._state.l1.clear, number=5)
            for name, cache in caches.items()
        }
        times = interleave(cases, max(5, int((200 if chunks == 64 else 40) * scale)))
        for name, taken in times.items():
            ratio = taken / times["xxh3_128"]
            compared = f"{times['xxh3_128']:,.0f} us with xxh3_128"
            figures.append(
                untargeted(f"look-up of {chunks:,} chunks, {name}", f"{taken:,.0f} us", compared, ratio, "x")
            )
        for cache in caches.values():
            cache.close()
    return figures


def publish(url: str, scale: float) -> list[Figure]:
    """New prompts of 4,096 chunks, given as tokens, one call each, from one thread."""
    cases: dict[str, Case] = {}
    caches: list[PrefixCacheOptimizer] = []
    for name in HASH_ALGORITHMS:
        cache = _open(url, name, "publisher")
        caches.append(cache)
        fresh = (_tokens(4096) for _ in itertools.count())
        picked: list[Any] = []

        def pick(fresh: Iterator[Any] = fresh, picked: list[Any] = picked) -> None:
            picked[:] = [next(fresh)]

        def run(cache: PrefixCacheOptimizer = cache, picked: list[Any] = picked) -> None:
            cache.cache_prefix(picked[0])

        cases[name] = Case(run, pick)
    times = interleave(cases, max(5, int(60 * scale)))
    for cache in caches:
        cache.clear()
        cache.close()
    rates = {name: 4096 / taken * 1e6 for name, taken in times.items()}
    return [
        Figure(f"publish tokens, {name}", f"{rate:,.0f} chunks/s", "-", rate, ">=", 1_000_000, "/s")
        for name, rate in rates.items()
    ]


def _chain_by(digest: Callable[[bytes], bytes], tokens: memoryview) -> bytes:
    """As chains were made before: a call of a digest for each chunk."""
    parent = bytes(16)
    hashes: list[bytes] = []
    for at in range(0, len(tokens), _STRIDE):
        parent = digest(parent + tokens[at : at + _STRIDE])
        hashes.append(parent)
    return b"".join(hashes)


def _blake3(key: bytes) -> Callable[[bytes], bytes]:
    keyed: Any = import_module("blake3").blake3(key=key)

    def digest(data: bytes) -> bytes:
        state = keyed.copy()
        state.update(data)
        return state.digest(16)

    return digest


def _tokens(chunks: int) -> array[int]:
    return array("I", _random.randbytes(_STRIDE * chunks))


def _open(url: str, algorithm: str, worker: str) -> PrefixCacheOptimizer:
    quiet: dict[str, Any] = {"touch_interval_s": 0, "feed_interval_s": 0, "lookup_timeout_s": 5.0}
    quiet |= {"publish_timeout_s": 5.0, "staleness_sample": 0.0, "max_cached_sequences": 1_000_000}
    namespace = f"hashing-{algorithm.replace('_', '-')}"
    return PrefixCacheOptimizer(
        PrefixCacheConfig(url=url, namespace=namespace, worker_id=worker, hash_algorithm=algorithm, **quiet)
    )


if __name__ == "__main__":
    run_parts({"hash": hash_tokens, "lookup": lookup, "publish": publish}, __doc__)
