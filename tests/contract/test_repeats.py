"""Chains that have a chunk twice, which chained hashes cannot: refused with a word."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest

from distprefix import Chain, PrefixCacheOptimizer, operations
from distprefix.errors import DamagedNodeError, InvalidInputError
from tests.contract.test_tree import sound
from tests.servers import Backend

CALLS: dict[str, Callable[[PrefixCacheOptimizer, Chain], object]] = {
    "cache_prefix": lambda cache, chain: cache.cache_prefix(chain, range(len(chain))),
    "store": lambda cache, chain: cache.store(chain, [b"x"] * len(chain)),
    "lease": lambda cache, chain: cache.lease(chain),
    "pin": lambda cache, chain: cache.pin(chain),
    "claim": lambda cache, chain: cache.find_longest_cache_hit(chain).claim(),
}


def hashes(count: int) -> list[bytes]:
    """So many chunk hashes, all different."""
    return [os.urandom(16) for _ in range(count)]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("places", [(0, 2), (0, 1), (3, 300), (256, 299)])
def test_what_writes_refuses_a_repeated_chunk(real_server: Backend, call: str, places: tuple[int, int]) -> None:
    """Publishing, storing, leasing and claiming name both places; the tree stays as it is, and a look-up misses."""
    cache = real_server.open()
    first, second = places
    chain = hashes(first)
    chain += hashes(second - first)
    chain.append(chain[first])
    if call == "claim":
        cache.cache_prefix(Chain(chain[:-1]))
    before = real_server.dump()
    with pytest.raises(InvalidInputError, match=f"chunk hash {second} of the chain is that of chunk {first}"):
        CALLS[call](cache, Chain([*chain, *hashes(3)] if call != "claim" else chain))
    assert real_server.dump() == before
    assert cache.find_longest_cache_hit(Chain(chain)).matched_chunks == (second if call == "claim" else 0)


def test_hashes_that_share_half_do_not_repeat(any_server: Backend) -> None:
    """Chunks are the same when all 16 bytes are."""
    chain = Chain([b"a" * 8 + bytes([i] * 8) for i in range(5)])
    cache = any_server.open()
    cache.cache_prefix(chain, range(5))
    assert any_server.open("b").find_longest_cache_hit(chain).matched_chunks == 5


@pytest.mark.parametrize("at", [256, 512])
def test_scripts_refuse_a_node_above_itself(any_server: Backend, at: int) -> None:
    """Who calls the scripts without the library cannot make a node its own ancestor."""
    cache = any_server.open(prewarm_threshold=1)
    chain = hashes(at)
    chain += [chain[0], *hashes(300)]
    publish = operations.publish(b"".join(chain), 0, "a/0@gpu", cache._state.link.epoch, max_run=256)
    with pytest.raises(DamagedNodeError, match="twice"):
        cache._state.link.publish(publish)
    sound(cache, 0, 0)
    cache.cache_prefix(Chain(chain[:at]))
    publish = operations.publish(b"".join(chain), 0, "a/0@gpu", cache._state.link.epoch, max_run=256)
    with pytest.raises(DamagedNodeError, match="twice"):
        cache._state.link.publish(publish)
    assert cache.find_longest_cache_hit(Chain(chain)).matched_chunks == at
    assert cache.prewarm(time_s=5).complete
    assert cache.check_integrity().problems == []
