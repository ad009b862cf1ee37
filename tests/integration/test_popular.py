"""What is used stays: under a budget that holds a third of what comes, in every order of eviction, and warm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer
from distprefix.chunking import HASH_BYTES
from distprefix.engines.store import EngineStore
from distprefix.redis.scripts import policy_names
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.payloads import data, sound
from tests.servers import Backend, hashes_of
from tests.uses import age, let_pass, uses
from tests.values import soon

CHUNKS, PROMPTS = 6, 30
BUDGETS: dict[str, dict[str, Any]] = {
    "chunks": {"l2_max_chunks": CHUNKS * PROMPTS // 3},
    "prompts": {"max_cached_sequences": PROMPTS // 3},
}
IDLE_S = 1800.0
HOUR_S = 3600.0
ROUND_S = 10.0
"""More than an order of eviction makes of anything else than the time of the last use."""

Use = Callable[[PrefixCacheOptimizer, list[int]], int]

USES: dict[str, Use] = {
    "load": lambda cache, tokens: cache.load(tokens).chunks,
    "load_batch": lambda cache, tokens: cache.load_batch([(tokens, None)])[0].chunks,
    "find_stored": lambda cache, tokens: cache.find_stored(tokens),
    "look-up": lambda cache, tokens: cache.find_longest_cache_hit(tokens).matched_chunks,
}


def one_of(number: int) -> list[int]:
    """A prompt of its own."""
    return [1_000_000 + 1000 * number + at for at in range(4 * CHUNKS)]


def open_with(backend: Backend, worker: str, **settings: Any) -> PrefixCacheOptimizer:
    """A cache in which no number of hits makes a prompt hot: the order of eviction alone keeps it."""
    return backend.open(worker, hot_threshold=10**6, **settings)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("use", USES)
@pytest.mark.usefixtures("plain_names")
@pytest.mark.parametrize("policy", policy_names())
def test_what_is_used_survives(real_server: Backend, policy: str, use: str, budget: str) -> None:
    """A prompt that another node uses, by whatever call, outlives three times the budget in prompts that come and go.

    Those are used once themselves, when they come.
    """
    settings = {"policy": policy, **BUDGETS[budget]}
    writer, reader = (open_with(real_server, worker, **settings) for worker in ("w1", "w2"))
    popular = one_of(-1)
    writer.store(popular, data(popular))
    for number in range(PROMPTS):
        let_pass(real_server, ROUND_S)
        other = one_of(number)
        writer.store(other, data(other))
        assert USES[use](writer, other) == CHUNKS
        assert USES[use](reader, popular) == CHUNKS
        writer.flush()
        reader.flush()
    stored = [number for number in range(PROMPTS) if writer.find_stored(one_of(number))]
    assert len(stored) <= PROMPTS // 3
    assert stored == [*range(PROMPTS - len(stored), PROMPTS)]  # in the order of their only use
    assert uses(real_server, popular)[0].hits == PROMPTS
    sound(real_server, writer)


@pytest.mark.usefixtures("plain_names")
@pytest.mark.parametrize("policy", policy_names())
def test_what_engines_load_survives(real_server: Backend, policy: str) -> None:
    """A system prompt that engines only look up and load stays, when its own continuations come and go as well."""
    settings = {"policy": policy, "hot_threshold": 10**6, **BUDGETS["chunks"]}
    writer = real_server.open("w1", **settings)
    engine = EngineStore(real_server.config("engine", **settings))
    system = prompt(CHUNKS)
    chain = hashes_of(system)
    writer.store(system, data(system))
    room = [bytearray(1000) for _ in range(CHUNKS)]
    try:
        for number in range(PROMPTS):
            let_pass(real_server, ROUND_S)
            longer = [*system, *one_of(number)]
            writer.store(longer, data(longer))
            assert engine.look_up(chain + bytes(HASH_BYTES)).result() == CHUNKS
            assert engine.load(chain, room, 0).result() == CHUNKS
            assert room == data(system)
            cache: Any = engine._opened
            cache.flush()
        assert uses(real_server, system)[0].hits == PROMPTS
        writer.store(one_of(-1), data(one_of(-1)))
        gone = [number for number in range(PROMPTS) if writer.find_stored([*system, *one_of(number)]) == CHUNKS]
        assert len(gone) > PROMPTS // 2
        sound(real_server, writer)
    finally:
        engine.close()


@pytest.mark.parametrize("use", ["load", "find_stored"])
def test_what_is_used_stays_warm(real_server: Backend, use: str) -> None:
    """Payloads that are used are not demoted, nor those before them; those of idle branches and prompts are, whole."""
    cache = real_server.open("w1")
    system = prompt(CHUNKS)
    used, idle_branch, idle_prompt = ([*system, *one_of(1)], [*system, *one_of(2)], one_of(3))
    idle_longer = [*idle_prompt, *one_of(4)]
    idle_fork = [*idle_prompt, *one_of(5)]
    for tokens in (used, idle_branch, idle_longer, idle_fork):
        cache.store(tokens, data(tokens))
    age(real_server, HOUR_S)
    assert USES[use](real_server.open("w2"), used) == 2 * CHUNKS
    real_server.opened[-1].flush()
    moved = 0
    while step := _demote(real_server, cache):
        moved += step
    assert moved == CHUNKS + 3 * CHUNKS
    places = cache._tiers.payloads.places([_chain(tokens) for tokens in (used, idle_branch, idle_longer)], soon())
    assert [[bool(size) for size in each.warm] for each in places] == [
        [True] * 2 * CHUNKS,
        [True] * CHUNKS + [False] * CHUNKS,
        [False] * 2 * CHUNKS,
    ]
    sound(real_server, cache)


def test_storing_again_keeps_payloads_warm(real_server: Backend) -> None:
    """A prompt that is computed and stored again is not idle, though nothing was loaded."""
    cache = real_server.open("w1")
    again, idle = one_of(1), one_of(2)
    for tokens in (again, idle):
        cache.store(tokens, data(tokens))
    age(real_server, HOUR_S)
    assert cache.store(again, data(again)) == CHUNKS
    cache.flush()
    assert _demote(real_server, cache) == CHUNKS
    assert _demote(real_server, cache) == 0
    (places,) = cache._tiers.payloads.places([_chain(again)], soon())
    assert all(places.warm)


def _chain(tokens: list[int]) -> bytes:
    return bytes.fromhex("".join(heads(tokens)))


def _demote(backend: Backend, cache: PrefixCacheOptimizer) -> int:
    """Make cold what is idle, though it was tried just now."""
    for key in backend.admin.scan_iter(match=backend.keys.moving("*"), count=1000):
        backend.admin.delete(key)
    return cache.demote(IDLE_S)
