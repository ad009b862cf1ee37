"""What the tree, L1 and the scripts take, against what else one could do, in one run: python benchmarks/foundation.py.

Starts its own servers. Memory per chunk is not measured here: `distprefix replay TRACE --json` tells
`redis_bytes_per_chunk` on a real workload, which is what counts.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from array import array
from collections.abc import Generator, Iterator
from typing import Any

import redis
from measure import Case, Figure, interleave, run_parts

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.chunking import HASH_BYTES, Chain, read_prompt
from distprefix.hashing import ChunkHasher
from distprefix.redis.embedded import EmbeddedServer

_CHUNK = 16
_random = random.Random(7)


def main() -> None:
    """Run what was asked for and print it."""
    run_parts(_PARTS, __doc__)


def l1(url: str, scale: float) -> list[Figure]:
    """Full hits in L1: whole prompts compared, nothing hashed, Redis not asked."""
    figures: list[Figure] = []
    with _open(url, "l1") as cache:
        for kind, prompt in _prompts(131_072):
            cache.cache_prefix(prompt)
            view = read_prompt(prompt, _CHUNK, 1 << 30).view
            tree = cache._state.l1.tree(read_prompt(prompt, _CHUNK, 1 << 30))
            hasher = ChunkHasher("xxh3_128", bytes(32))
            assert cache.find_longest_cache_hit(prompt).matched_tokens == len(prompt)
            times = interleave(
                {
                    "ours": Case(lambda p=prompt: cache.find_longest_cache_hit(p), number=20),
                    "walk": Case(lambda v=view, t=tree: t.find_longest_prefix(v), number=20),
                    "hash": Case(lambda v=view, h=hasher: h.chain(h.root, v, 4 * _CHUNK)),
                },
                int(100 * scale),
            )
            what = f"L1 full hit, 131,072 tokens, {kind}"
            figures += [
                _ratio(f"{what}, against hashing by xxh3", times, "ours", "hash", ">=", 20),
                _cost(f"{what}, over the bare tree walk", times, "ours", "walk", "<", 5),
            ]
        for kind, prompt in _prompts(8192):
            cache.cache_prefix(prompt)
            assert cache.find_longest_cache_hit(prompt).redis_calls == 0
            times = interleave(
                {"ours": Case(lambda p=prompt: cache.find_longest_cache_hit(p), number=50)}, int(100 * scale)
            )
            figures.append(
                Figure(f"L1 full hit, 8,192 tokens, {kind}", _us(times["ours"]), "-", times["ours"], "<=", 30, " us")
            )
    return figures


def l2(url: str, scale: float) -> list[Figure]:
    """Look-ups that L1 knows nothing of: one script call a window, against PING and one HKEYS a block."""
    figures: list[Figure] = []
    with _open(url, "l2-writer") as writer, _open(url, "l2-reader") as reader, _plain(url) as plain:
        for chunks, faster in ((512, 15), (8192, 40)):
            chain = _chain(chunks)
            writer.cache_prefix(chain)
            keys = _store_blocks(plain, chain)
            reader._state.l1.clear()
            result = reader.find_longest_cache_hit(chain)
            assert result.matched_chunks == chunks
            assert len(result.holders) == 1
            times = interleave(
                {
                    "ours": Case(lambda c=chain: reader.find_longest_cache_hit(c), reader._state.l1.clear, number=20),
                    "ping": Case(plain.ping, number=20),
                    "hkeys": Case(lambda k=keys: _pipeline(plain, [("HKEYS", key) for key in k])),
                },
                int((100 if chunks == 512 else 30) * scale),
            )
            what = f"L2 look-up of {chunks:,} chunks"
            if chunks == 512:
                figures.append(_cost(f"{what}, in PING round trips", times, "ours", "ping", "<=", 4))
            figures.append(_ratio(f"{what}, against one HKEYS a block", times, "ours", "hkeys", ">=", faster))
    return figures


def publish(url: str, scale: float) -> list[Figure]:
    """New chunks from one thread over one connection, a call a prompt, against a pipeline of one HSET a block."""
    figures: list[Figure] = []
    for chunks, run in ((100, 100), (256, 256), (1024, 256), (4096, 100), (4096, 256)):
        rounds, prompts = max(3, int(20 * scale)), max(2, 12_800 // chunks)
        with _open(url, f"publish{run}", max_run=run) as cache, _plain(url) as plain:
            fresh = (_chain(chunks) for _ in itertools.count())
            picked: list[Chain] = []
            commands = [
                [("HSET", f"block:{part.hex()}", "worker", "1") for part in _chain(chunks)] for _ in range(prompts)
            ]

            def pick(fresh: Iterator[Chain] = fresh, picked: list[Chain] = picked, prompts: int = prompts) -> None:
                picked[:] = itertools.islice(fresh, prompts)

            def ours(cache: PrefixCacheOptimizer = cache, picked: list[Chain] = picked) -> None:
                for chain in picked:
                    cache.cache_prefix(chain)

            def forget(plain: redis.Redis = plain, commands: list[list[Any]] = commands) -> None:
                for chain in commands:
                    plain.unlink(*(command[1] for command in chain))

            def theirs(plain: redis.Redis = plain, commands: list[list[Any]] = commands) -> None:
                for chain in commands:
                    _pipeline(plain, chain)

            times = interleave({"ours": Case(ours, pick), "hset": Case(theirs, forget)}, rounds)
            rate = {name: prompts * chunks / taken * 1e6 for name, taken in times.items()}
            cache.clear()
        what = f"publish, prompts of {chunks:,} chunks in runs of {run}"
        figures += [
            Figure(f"{what}, new chunks", _rate(rate["ours"]), "-", rate["ours"], ">=", 500_000, "/s"),
            Figure(
                f"{what}, against one HSET a block",
                _rate(rate["ours"]),
                _rate(rate["hset"]),
                rate["ours"] / rate["hset"],
                ">=",
                15,
                "x",
            ),
        ]
    return figures


def size(url: str, scale: float) -> list[Figure]:
    """The same look-ups in a large and in a small tree, each on a server of its own."""
    with EmbeddedServer() as other, _open(url, "size") as large, _open(other.url, "size") as small:
        stored: dict[str, list[Chain]] = {}
        for name, cache, chunks in (("large", large, 1_200_000), ("small", small, 50_000)):
            stored[name] = [_chain(100) for _ in range(chunks // 100)]
            for chain in stored[name]:
                cache.cache_prefix(chain)
            cache._state.l1.clear()
        picked = {name: iter(_random.choices(chains, k=10_000)) for name, chains in stored.items()}
        times = interleave(
            {
                "large": Case(lambda: large.find_longest_cache_hit(next(picked["large"])), large._state.l1.clear, 20),
                "small": Case(lambda: small.find_longest_cache_hit(next(picked["small"])), small._state.l1.clear, 20),
            },
            int(200 * scale),
        )
    return [_cost("L2 look-up with 1,200,000 chunks stored, against 50,000", times, "large", "small", "<=", 1.3)]


_PARTS = {"l1": l1, "l2": l2, "publish": publish, "size": size}


def _open(url: str, namespace: str, max_run: int = 256) -> PrefixCacheOptimizer:
    """A cache that trusts L1 for long, and raises where it would otherwise count a miss."""
    return PrefixCacheOptimizer(
        PrefixCacheConfig(
            url=url,
            namespace=namespace.partition("-")[0],
            worker_id=namespace,
            chunk_size=_CHUNK,
            max_run=max_run,
            max_cached_sequences=10**9,
            lookup_timeout_s=10,
            publish_timeout_s=10,
            touch_interval_s=0,
            l1_ttl_s=1e6,
            strict=True,
        )
    )


@contextlib.contextmanager
def _plain(url: str) -> Generator[redis.Redis, None, None]:
    client = redis.Redis.from_url(url)
    try:
        yield client
    finally:
        client.close()


def _prompts(tokens: int) -> Iterator[tuple[str, Any]]:
    yield "array", array("I", (_random.randrange(150_000) for _ in range(tokens)))
    try:
        import numpy as np  # noqa: PLC0415 - optional
    except ImportError:
        return
    yield "NumPy", np.random.default_rng(tokens).integers(0, 150_000, tokens, dtype=np.uint32)


def _chain(chunks: int) -> Chain:
    return Chain.packed(_random.randbytes(chunks * HASH_BYTES))


def _store_blocks(plain: redis.Redis, chain: Chain) -> list[str]:
    """llm-d's layout: one hash a block, with a field for every worker that holds it. Returns the keys."""
    keys = [f"block:{part.hex()}" for part in chain]
    _pipeline(plain, [("HSET", key, "worker", "1") for key in keys])
    return keys


def _pipeline(plain: redis.Redis, commands: list[tuple[str, ...]]) -> list[Any]:
    pipeline = plain.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    return pipeline.execute()


def _ratio(what: str, times: dict[str, float], ours: str, other: str, relation: str, target: float) -> Figure:
    return Figure(what, _us(times[ours]), _us(times[other]), times[other] / times[ours], relation, target, "x")


def _cost(what: str, times: dict[str, float], ours: str, other: str, relation: str, target: float) -> Figure:
    return Figure(what, _us(times[ours]), _us(times[other]), times[ours] / times[other], relation, target, "x")


def _us(value: float) -> str:
    return f"{value:,.1f} us"


def _rate(value: float) -> str:
    return f"{value:,.0f}/s"


if __name__ == "__main__":
    main()
