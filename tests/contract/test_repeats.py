"""Chains that have a chunk twice, which chained hashes cannot: refused with a word, and no script is misled."""

from __future__ import annotations

import os
from collections.abc import Callable
from random import Random

import pytest

from distprefix import Chain, PrefixCacheOptimizer, operations
from distprefix.errors import DamagedNodeError, InvalidInputError, NoParentError
from tests.contract.test_tree import sound
from tests.lengths import short_or_long
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


@pytest.mark.parametrize("at", [1, 2, 5, 256, 300])
def test_scripts_refuse_a_repeated_chunk(any_server: Backend, at: int) -> None:
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


@short_or_long("rounds", short=12, long=300)
def test_scripts_keep_the_tree_whatever_repeats(real_server: Backend, rounds: int) -> None:
    """Publishes and removals of chains with and without repeats, by two workers: the tree keeps its invariants."""
    random = Random()
    cache, other = real_server.open("a", max_run=3), real_server.open("b", max_run=3)
    refused = 0
    bases = [hashes(8) for _ in range(3)]
    for _ in range(rounds):
        for _ in range(12):
            chain = random.choice(bases)[: random.randrange(1, 8)] + hashes(random.randrange(4))
            if random.random() < 0.5:
                chain[random.randrange(len(chain))] = random.choice(chain)
            worker = random.choice((cache, other))
            holder, epoch = worker.config.holder, worker._state.link.epoch
            data = b"".join(chain)
            try:
                if random.random() < 0.7:
                    worker._state.link.publish(operations.publish(data, 0, holder, epoch, max_run=3, metadata=b"x"))
                else:
                    worker._state.link.publish(operations.trim(data, holder, epoch))
            except (DamagedNodeError, NoParentError):
                refused += 1
        assert cache.check_integrity().problems == []
    assert refused
