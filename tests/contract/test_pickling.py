"""What passes from one process to another: results do, without their tie to the cache; what is tied to it says no."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from array import array
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from distprefix import CacheHitResult, CacheTier, Chain, PrefixCacheConfig, PrefixCacheOptimizer, UnavailableError
from distprefix.errors import InvalidInputError
from distprefix.redis.data import WriteError
from tests.servers import Backend

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)
TOKENS = [*range(16), 7, 7]
PACKED = array("I", TOKENS)
PROMPTS: dict[str, Any] = {
    "list": TOKENS,
    "tuple": tuple(TOKENS),
    "array": PACKED,
    "array of bytes": array("B", TOKENS),
    "array of int64": array("q", TOKENS),
    "NumPy array": np.array(TOKENS, np.uint32),
    "NumPy array of int64": np.array(TOKENS),
    "bytes": PACKED.tobytes(),
    "bytearray": bytearray(PACKED.tobytes()),
    "view of uint32": memoryview(PACKED),
    "view of int64": memoryview(array("q", TOKENS)),
    "view of uint16": memoryview(array("H", TOKENS)),
    "view of a NumPy array": np.array(TOKENS, np.uint32).data,
    "view of every other": memoryview(array("I", [each for token in TOKENS for each in (token, 9)]))[::2],
    "view of bytes": memoryview(PACKED.tobytes()),
    "writable view of bytes": memoryview(bytearray(PACKED.tobytes())),
}


def plain(result: CacheHitResult) -> tuple[Any, ...]:
    """All that a result says of itself, to be compared."""
    entry = result.entry
    return (
        *(result.hit, result.matched_tokens, result.matched_chunks, result.tier, result.holders, result.block_ids),
        *(result.lookup_time_us, result.l1_chunks, result.redis_calls),
        None if entry is None else replace(entry, _on_touch=None),
        *(_listed(result.prompt), _listed(result.remaining_tokens)),
    )


def _listed(tokens: Any) -> Any:
    if isinstance(tokens, Chain):
        return tokens
    is_bytes = isinstance(tokens, bytes | bytearray) or (isinstance(tokens, memoryview) and tokens.itemsize == 1)
    return list(memoryview(bytes(tokens)).cast("I") if is_bytes else map(int, tokens))


@pytest.fixture
def cache(any_server: Backend) -> PrefixCacheOptimizer:
    """A cache that has the four full chunks of TOKENS, with metadata and blocks."""
    cache = any_server.open("w1")
    cache.cache_prefix(TOKENS, range(5, 9), {"a": [1]})
    return cache


@pytest.mark.parametrize("name", [*PROMPTS, "Chain"])
def test_results_are_pickled(cache: PrefixCacheOptimizer, name: str) -> None:
    """A result keeps all its values, whatever kind of prompt it has; the prompt can be looked up and loaded again."""
    prompt = cache.chain_of(TOKENS) if name == "Chain" else PROMPTS[name]
    for limit, chunks in ((None, 4), (15, 3)):
        hit = cache.find_longest_cache_hit(prompt, max_cache_hit_length=limit)
        assert (hit.matched_chunks, hit.block_ids) == (chunks, (5, 6, 7, 8)[:chunks])
        for protocol in PROTOCOLS:
            copied = pickle.loads(pickle.dumps(hit, protocol))
            assert copied == hit
            assert plain(copied) == plain(hit)
            assert plain(pickle.loads(pickle.dumps(copied, protocol))) == plain(hit)
            assert type(copied.prompt) is type(prompt) or isinstance(prompt, memoryview)
            assert cache.find_longest_cache_hit(copied.prompt).matched_chunks == 4
            assert cache.load(copied).chunks == 0


def test_misses_and_results_made_by_hand_are_pickled(cache: PrefixCacheOptimizer) -> None:
    """A miss keeps its prompt; a result that no cache made has none."""
    miss = pickle.loads(pickle.dumps(cache.find_longest_cache_hit([9] * 9)))
    assert (bool(miss), miss.entry, miss.block_ids, miss.remaining_tokens) == (False, None, (), [9] * 9)
    empty = pickle.loads(pickle.dumps(cache.find_longest_cache_hit(Chain(()))))
    assert (empty.hit, empty.prompt) == (False, Chain(()))
    made = CacheHitResult(True, 4, 1, CacheTier.HOT, (), 1.0)
    assert pickle.loads(pickle.dumps(made)) == made


def test_an_unpickled_result_has_no_tie(cache: PrefixCacheOptimizer) -> None:
    """Leasing, claiming and looking up again raise and say what to do instead; touching counts in the entry alone."""
    copied = pickle.loads(pickle.dumps(cache.find_longest_cache_hit(TOKENS)))
    for call in (copied.lease, copied.claim, copied.again):
        with pytest.raises(InvalidInputError, match=r"no tie to a cache.*find_longest_cache_hit\(result\.prompt\)"):
            call()
    used = copied.entry.access_count
    copied.entry.touch()
    assert copied.entry.access_count == used + 1


def test_copies_in_the_same_process_keep_the_tie(cache: PrefixCacheOptimizer) -> None:
    """A copy is the same result, a deep one has a prompt and an entry of its own; both lease, claim and ask again."""
    prompt = list(TOKENS)
    hit = cache.find_longest_cache_hit(prompt)
    assert copy.copy(hit) is hit
    deep = copy.deepcopy(hit)
    assert plain(deep) == plain(hit)
    prompt.append(1)
    assert (deep.prompt, deep.again().matched_chunks, deep.claim().mine) == (TOKENS, 4, True)
    with deep.lease() as lease:
        assert lease.active
    assert hit.entry is not None
    assert hit.entry.metadata is not None
    for entry in (copy.copy(hit.entry), copy.deepcopy(hit.entry)):
        assert entry == hit.entry
        entry.touch()
        assert entry.access_count == hit.entry.access_count + 1
    assert copy.deepcopy(hit.entry).metadata is not hit.entry.metadata


def test_what_was_loaded_is_pickled(real_server: Backend) -> None:
    """What `load` returns has its bytes, in band and out of band."""
    cache = real_server.open("w1")
    payloads = [bytes([i]) * 1000 for i in range(4)]
    cache.store(TOKENS, payloads)
    for into in (None, [bytearray(1000) for _ in payloads]):
        loaded = cache.load(TOKENS, into)
        for protocol in PROTOCOLS:
            assert pickle.loads(pickle.dumps(loaded, protocol)) == loaded == (4, tuple(payloads))
        buffers: list[pickle.PickleBuffer] = []
        packed = pickle.dumps(loaded, 5, buffer_callback=buffers.append)
        assert len(packed) < 1000
        assert pickle.loads(packed, buffers=buffers) == loaded
        assert copy.copy(loaded) is loaded
        assert copy.deepcopy(loaded) == loaded
        assert all(isinstance(payload, memoryview) for payload in pickle.loads(packed, buffers=buffers).payloads)


def test_what_is_tied_to_a_cache_refuses(cache: PrefixCacheOptimizer) -> None:
    """A cache, a lease and a claim raise TypeError and say what to do instead."""
    hit = cache.find_longest_cache_hit(TOKENS)
    for tied, hint in ((cache, r"pickle cache\.config"), (hit.lease(), "lease the result"), (hit.claim(), "claim the")):
        message = rf"cannot be pickled or copied: .*{hint}"
        for protocol in PROTOCOLS:
            with pytest.raises(TypeError, match=message):
                pickle.dumps(tied, protocol)
        for attempt in (copy.copy, copy.deepcopy):
            with pytest.raises(TypeError, match=message):
                attempt(tied)


def test_other_results_are_pickled(real_server: Backend) -> None:
    """Settings, metrics and what the other methods return are plain values."""
    cache = real_server.open("w1", worker_lease_s=10.0)
    cache.cache_prefix(TOKENS)
    values: dict[str, Any] = {
        "config": cache.config,
        "metrics": cache.get_metrics(),
        "workers": cache.workers(),
        "evicted": cache.maintain(),
        "prewarmed": cache.prewarm(),
        "swept": cache.sweep(),
        "report": cache.check_integrity(),
        "candidates": cache.get_prewarm_candidates(),
        "chain": cache.chain_of(TOKENS),
        "holders": cache.find_longest_cache_hit(TOKENS).holders,
    }
    for protocol in PROTOCOLS:
        assert pickle.loads(pickle.dumps(values, protocol)) == values


def _work(config: PrefixCacheConfig, tokens: list[int]) -> tuple[CacheHitResult, Any, WriteError]:
    """What another process sends back."""
    with PrefixCacheOptimizer(replace(config, worker_id="w2")) as cache:
        hit = cache.find_longest_cache_hit(memoryview(array("I", tokens)))
        return hit, cache.load(tokens), WriteError("failed", [True, False])


def _fail(message: str) -> None:
    raise UnavailableError(message)


def test_another_process_sends_results_back(real_server: Backend) -> None:
    """A spawned worker opens a cache from the settings of this one, and its results and errors arrive here."""
    cache = real_server.open("w1")
    cache.cache_prefix(TOKENS)
    cache.store(TOKENS, [b"x" * 100] * 4)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        hit, loaded, error = pool.apply(_work, (cache.config, TOKENS))
        with pytest.raises(UnavailableError, match="no answer"):
            pool.apply(_fail, ("no answer",))
    assert (hit.matched_chunks, list(hit.remaining_tokens)) == (4, [7, 7])
    assert {"w1/0@gpu", "@warm"} == {holder.name for holder in hit.holders}
    assert loaded == (4, (b"x" * 100,) * 4)
    assert (str(error), error.written) == ("failed", [True, False])
    assert cache.load(hit).chunks == 4
