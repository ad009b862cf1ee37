"""Every call that shows that a prefix was wanted or served is a use of all its nodes, and costs no call of its own."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer, touches
from distprefix.chunking import HASH_BYTES
from distprefix.engines.lmcache_tasks import LeasingStore
from distprefix.engines.parts import PartStore
from distprefix.engines.store import EngineStore, each_chunk
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.fake_engine import until
from tests.payloads import data, metric
from tests.servers import Backend, Server, hashes_of
from tests.uses import age, commands, node_heads, server_ms, uses

ONE, OTHER = prompt(6), prompt(6, tail=3)
"""Two prompts that share 3 of 6 chunks: a node above, and one for each below."""
HOUR_S = 3600.0

Step = Callable[[PrefixCacheOptimizer], Any]


def chain() -> bytes:
    """The chunk hashes of the first prompt."""
    return hashes_of(ONE)


def room(count: int = 6) -> list[bytearray]:
    """Where payloads are loaded."""
    return [bytearray(1000) for _ in range(count)]


def check(backend: Backend, use: Callable[[], Any], flush: Callable[[], Any], hits: tuple[int, int]) -> None:
    """Age the tree, use it, flush: hits and access times of the path follow, those of the other branch do not.

    `hits`: of the node above and of the one below; a node without any keeps its access time, unless it is -1, which
    stands for a use that is no hit.
    """
    age(backend, HOUR_S)
    before = uses(backend, ONE)
    aside = uses(backend, OTHER)[1]
    began = server_ms(backend)
    use()
    assert uses(backend, ONE) == before or hits == (-1, -1)
    flush()
    ended = server_ms(backend)
    for node, old, count in zip(uses(backend, ONE), before, hits, strict=True):
        assert node.hits == old.hits + max(0, count)
        if count:
            assert began - 1 <= node.accessed_ms <= ended  # a part of a ms is cut off
        else:
            assert node.accessed_ms == old.accessed_ms
    assert uses(backend, OTHER)[1] == aside
    order: Any = backend.admin.zrange(backend.keys.leaves, 0, -1, withscores=True)
    leaf = node_heads(backend, ONE)[1]
    assert [name.decode() for name, _ in order][-1] == leaf or not hits[1]
    assert all(score <= ended for _, score in order)


# The index


def touch_entry(cache: PrefixCacheOptimizer) -> None:
    """A look-up, and one use more."""
    entry = cache.find_longest_cache_hit(ONE).entry
    assert entry is not None
    entry.touch()


INDEX: list[tuple[str, Step, tuple[int, int]]] = [
    ("look-up", lambda cache: cache.find_longest_cache_hit(ONE), (1, 1)),
    ("look-up of a part", lambda cache: cache.find_longest_cache_hit(ONE[:12]), (1, 0)),
    ("touch", touch_entry, (2, 2)),
    ("two look-ups", lambda cache: [cache.find_longest_cache_hit(ONE) for _ in range(2)], (2, 2)),
]


@pytest.mark.parametrize("knows", [False, True], ids=["Redis", "L1"])
@pytest.mark.parametrize(("step", "hits"), [case[1:] for case in INDEX], ids=[case[0] for case in INDEX])
def test_look_ups_use_every_node(any_server: Backend, step: Step, hits: tuple[int, int], knows: bool) -> None:
    """A look-up that Redis or L1 answers, and a touch of its entry, use each node of the path, in the server's time."""
    writer = any_server.open("w1")
    for tokens in (ONE, OTHER):
        writer.cache_prefix(tokens)
    reader = any_server.open("w2")
    if knows:
        reader.find_longest_cache_hit(ONE)
        reader.flush()
    check(any_server, lambda: step(reader), reader.flush, hits)


def test_own_blocks_are_used(any_server: Backend) -> None:
    """Asking for this worker's own blocks uses the nodes that they belong to."""
    cache = any_server.open("w1")
    cache.cache_prefix(OTHER)
    cache.cache_prefix(ONE, range(6))
    check(any_server, lambda: cache.get_computed_blocks(ONE), cache.flush, (1, 1))
    check(any_server, lambda: cache.get_computed_blocks(ONE[:12]), cache.flush, (1, 0))


def test_misses_use_nothing(any_server: Backend) -> None:
    """What found nothing is no use: nothing waits to be sent, whichever call it was."""
    cache = any_server.open("w1")
    cache.find_longest_cache_hit(ONE)
    cache.find_stored(ONE)
    assert cache.get_computed_blocks(ONE) == []
    assert cache._state.outbox.touches.take() == []


def test_a_tail_that_redis_lacks_hides_no_use(own: Backend, own_server: Server) -> None:
    """Of a prompt whose tail only this process knows, since Redis was off, the nodes that Redis has are used."""
    cache = own.open("w1", strict=False, publish_timeout_s=0.2, lookup_timeout_s=0.2, breaker_reset_s=0.05)
    cache.cache_prefix(ONE[:12])
    own_server.freeze()
    cache.cache_prefix(ONE)
    assert cache.find_longest_cache_hit(ONE).matched_chunks == 6
    own_server.thaw()
    assert [head.hex() for head, _, _ in cache._state.outbox.touches.take()] == heads(ONE)[:1]


# Payloads


PAYLOADS: list[tuple[str, Step, tuple[int, int]]] = [
    ("find_stored", lambda cache: cache.find_stored(ONE), (1, 1)),
    ("find_stored of a part", lambda cache: cache.find_stored(ONE[:12]), (1, 0)),
    ("find_stored_batch", lambda cache: cache.find_stored_batch([ONE, OTHER[:12]]), (2, 1)),
    ("load", lambda cache: cache.load(ONE), (1, 1)),
    ("load of a look-up's result", lambda cache: cache.load(cache.find_longest_cache_hit(ONE)), (1, 1)),
    ("load into buffers", lambda cache: cache.load(ONE, room()), (1, 1)),
    ("load from a chunk on", lambda cache: cache.load(ONE, first=4), (1, 1)),
    ("load up to a chunk", lambda cache: cache.load(ONE, most=3), (1, 0)),
    ("load_batch", lambda cache: cache.load_batch([(ONE, None), (OTHER[:12], None)]), (2, 1)),
    ("store", lambda cache: cache.store(ONE, data(ONE)), (-1, -1)),
    ("store of None", lambda cache: cache.store(ONE, [None] * 6), (-1, -1)),
]


@pytest.mark.parametrize("l1", [0, 1 << 20], ids=["no L1", "L1"])
@pytest.mark.parametrize(("step", "hits"), [case[1:] for case in PAYLOADS], ids=[case[0] for case in PAYLOADS])
def test_payloads_use_every_node(real_server: Backend, step: Step, hits: tuple[int, int], l1: int) -> None:
    """Finding, loading and storing again what is there use each node of the path; only a store makes no hits."""
    cache = real_server.open("w1", l1_payload_bytes=l1)
    for tokens in (ONE, OTHER):
        assert cache.store(tokens, data(tokens)) == 6
        cache.load(tokens)
    cache.flush()
    check(real_server, lambda: step(cache), cache.flush, hits)


def test_payload_uses_reach_every_server(any_server: Backend) -> None:
    """Payload look-ups count on every kind of server, once the tree names payloads."""
    cache = any_server.open("w1")
    for tokens in (ONE, OTHER):
        cache.cache_prefix(tokens)
        for head in node_heads(any_server, tokens):
            key = any_server.keys.node(head)
            chunks = len(any_server.admin.hget(key, "r") or b"") // HASH_BYTES  # pyright: ignore[reportArgumentType]
            sizes = array("I", [500] * chunks).tobytes()
            any_server.admin.hset(key, mapping={"h:@warm": f"1:{chunks}", "b:@warm": sizes})
    check(any_server, lambda: cache.find_stored(ONE), cache.flush, (1, 1))


def test_uses_move_the_local_order(real_server: Backend) -> None:
    """What is only loaded or found stored is the last to leave L1."""
    cache = real_server.open("w1")
    for tokens in (ONE, OTHER):
        cache.store(tokens, data(tokens))
        cache.find_longest_cache_hit(tokens)  # OTHER last
    for use in (cache.load, cache.find_stored):
        one, other = (cache._state.l1.find(cache._state.read(tokens), 0.0).path[-1] for tokens in (ONE, OTHER))
        cache.find_longest_cache_hit(OTHER)
        assert one.accessed <= other.accessed
        before = one.hits
        use(ONE)
        assert (one.accessed >= other.accessed, one.hits) == (True, before + 1)


# Engines' stores


class Every(PartStore, LeasingStore):
    """What engines' stores can do, in one."""


EngineStep = Callable[[Every], "Future[Any]"]


def engine_store(backend: Backend) -> Every:
    """A store that keeps chunks that follow a hole."""
    return Every(backend.config("engine"), alone=True, max_waiting_bytes=1 << 20)


ENGINES: dict[str, tuple[EngineStep, tuple[int, int]]] = {
    "look_up": (lambda store: store.look_up(chain()), (1, 1)),
    "load": (lambda store: store.load(chain(), room(), 0), (-1, -1)),
    "load from a chunk on": (lambda store: store.load(chain(), room(2), 4), (-1, -1)),
    "store": (lambda store: store.store(chain(), data(ONE), 0), (-1, -1)),
    "look_up_parts": (lambda store: store.look_up_parts(chain(), [3, 4, 5]), (1, 1)),
    "load_parts": (lambda store: store.load_parts(chain(), room(3), 3), (-1, -1)),
    "store_parts": (lambda store: store.store_parts(chain(), data(ONE)[3:], 3), (-1, -1)),
}


@pytest.mark.usefixtures("plain_names")
@pytest.mark.parametrize("name", ENGINES)
def test_engines_use_every_node(real_server: Backend, name: str) -> None:
    """What engines look up counts as what a program does; what they then load is a use, and no second hit."""
    step, hits = ENGINES[name]
    writer = real_server.open("w1")
    for tokens in (ONE, OTHER):
        assert writer.store(tokens, data(tokens)) == 6
    with contextlib.closing(engine_store(real_server)) as store:
        assert store.look_up(chain()).result() == 6
        cache: Any = store._opened
        cache.flush()
        check(real_server, lambda: step(store).result(), cache.flush, hits)


@pytest.mark.usefixtures("plain_names")
def test_a_look_up_that_leases_is_one_use(real_server: Backend) -> None:
    """Looking up and leasing at once is a use of every node on the path, not two."""
    writer = real_server.open("w1")
    for tokens in (ONE, OTHER):
        assert writer.store(tokens, data(tokens)) == 6
    with contextlib.closing(engine_store(real_server)) as store:
        found, lease = store.look_up_and_lease(chain(), 30).result()
        assert (found, lease is not None) == (6, True)
        cache: Any = store._opened
        cache.flush()
        assert [node.hits for node in uses(real_server, ONE)] == [1, 1]
        assert (metric(cache, "lookups"), metric(cache, "hits"), metric(cache, "tokens_hit")) == (1, 1, 24)


@pytest.mark.usefixtures("plain_names")
def test_chunks_that_stand_alone_are_used(real_server: Backend) -> None:
    """Of chunks that are each a chain of its own just those that were found or loaded are used."""
    store = EngineStore(real_server.config("engine"))
    try:
        assert store.store_each(chain()[: 2 * HASH_BYTES], data(ONE)[:2]).result() == [True, True]
        cache: Any = store._opened
        names = [chunk.data.hex() for chunk in each_chunk(cache, chain()[: 2 * HASH_BYTES])]

        def hits() -> list[int]:
            cache.flush()
            found: Any = [real_server.admin.hget(real_server.keys.node(name), "n") for name in names]
            return [*map(int, found)]

        assert hits() == [0, 0]
        assert store.look_up_each(chain()[HASH_BYTES:]).result() == [True, False, False, False, False]
        assert hits() == [0, 1]
        assert store.load_each(chain()[: 2 * HASH_BYTES], room(2)).result() == [True, True]
        assert hits() == [0, 1]
        assert store.store_each(chain()[: 2 * HASH_BYTES], data(ONE)[:2]).result() == [True, True]
        assert hits() == [0, 1]
    finally:
        store.close()


@pytest.mark.usefixtures("plain_names")
def test_a_request_is_one_look_up_and_one_load(real_server: Backend) -> None:
    """Whatever parts it comes in, a request counts once; one for nothing counts for nothing, and is no error."""
    store = engine_store(real_server)
    try:
        assert store.store_parts(chain()[: 3 * HASH_BYTES], data(ONE)[:3], 0).result() == [True] * 3
        assert store.store_parts(chain(), data(ONE)[4:], 4).result() == [True] * 2
        assert store.look_up_parts(chain(), range(6)).result() == {0, 1, 2, 4, 5}
        assert store.load_parts(chain(), room(), 0).result() == [True, True, True, False, True, True]
        counts = store.metrics()
        assert [counts[name] for name in ("lookups", "hits", "loads")] == [1, 1, 1]
        assert (counts["chunks_hit"], counts["payloads_loaded"], counts["chunks_loaded"]) == (5, 5, 5)
        assert store.look_up_each(b"").result() == []
        assert store.load_each(b"", []).result() == []
        counts = store.metrics()
        assert [counts[name] for name in ("lookups", "hits", "loads")] == [1, 1, 1]
        assert "errors" not in store.counts
    finally:
        store.close()


# What it costs


def test_uses_cost_no_call(real_server: Backend) -> None:
    """Finding, loading and storing come to the calls that they are documented with; uses go with a flush, in one."""
    cache = real_server.open("w1")
    for tokens in (ONE, OTHER):
        cache.store(tokens, data(tokens))
        cache.load(tokens)
    cache.flush()
    expected: list[tuple[Step, dict[str, int]]] = [
        (lambda cache: cache.find_stored(ONE), {"script": 1}),
        (lambda cache: cache.find_stored_batch([ONE, OTHER]), {"script": 1}),
        (lambda cache: cache.load(ONE), {"script": 1, "get": 6}),
        (lambda cache: cache.load(ONE, first=4), {"script": 1, "get": 2}),
        (lambda cache: cache.load(ONE, room(2), most=2), {"script": 1, "get": 2}),
        (lambda cache: cache.load_batch([(ONE, None), (OTHER, None)]), {"script": 1, "get": 12}),
        (lambda cache: cache.store(ONE, data(ONE)), {"script": 1}),
        (lambda cache: cache.find_longest_cache_hit(ONE), {"script": 1}),
        (lambda cache: cache.find_longest_cache_hit(ONE), {}),
        (touch_entry, {}),
        (lambda cache: cache.flush(), {"script": 2, "get": 1}),  # the uses, and the epochs
        (lambda cache: cache.flush(), {"script": 1, "get": 1}),
        (lambda cache: cache.store(prompt(8), data(prompt(8))), {"script": 2, "set": 2}),
    ]
    for step, calls in expected:
        with commands(real_server) as sent:
            step(cache)
        assert sent == calls


def test_uses_arrive_by_themselves(real_server: Backend) -> None:
    """The background sends what was loaded and found within the flush interval, without any further call."""
    writer = real_server.open("w1")
    writer.store(ONE, data(ONE))
    reader = real_server.open("w2", touch_interval_s=0.05)
    reader.load(ONE)
    until(lambda: [node.hits for node in uses(real_server, ONE)] == [1])
    reader.find_stored(ONE)
    until(lambda: [node.hits for node in uses(real_server, ONE)] == [2])


# Bounds and losses


def test_only_so_many_paths_wait(any_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses of more paths than may wait are lost and counted; those of paths that wait already still count."""
    monkeypatch.setattr(touches, "_MAX_PATHS", 2)
    cache = any_server.open("w1")
    prompts = [[100 * i + at for at in range(8)] for i in range(4)]
    for tokens in prompts:
        cache.cache_prefix(tokens)
    for tokens in (*prompts, *prompts):
        cache.find_longest_cache_hit(tokens)
    assert metric(cache, "touches_dropped") == 4
    cache.flush()
    assert [node.hits for tokens in prompts for node in uses(any_server, tokens)] == [2, 2, 0, 0]
    cache.find_longest_cache_hit(prompts[3])
    cache.flush()
    assert [node.hits for node in uses(any_server, prompts[3])] == [1]
    assert metric(cache, "touches_dropped") == 4


def test_uses_that_redis_does_not_take_are_counted(own: Backend, own_server: Server) -> None:
    """Uses are sent once: those of a flush that fails are lost, counted by node, and do not come back later."""
    cache = own.open("w1", strict=False, publish_timeout_s=0.2, breaker_reset_s=0.05)
    for tokens in (OTHER, ONE):
        cache.cache_prefix(tokens)
    for tokens in (ONE, ONE[:12]):
        cache.find_longest_cache_hit(tokens)
    own_server.freeze()
    cache.flush()
    own_server.thaw()
    assert metric(cache, "touches_dropped") == 2
    until(lambda: (cache.flush(), cache.health().ok)[-1])
    assert [node.hits for node in uses(own, ONE)] in ([0, 0], [2, 1])  # a frozen server may have got them
    assert metric(cache, "touches_dropped") == 2


def test_a_use_of_one_node_hides_no_path(any_server: Backend) -> None:
    """Uses of a node whose path was not known, as of a candidate for pre-warming, leave later ones their path."""
    writer = any_server.open("w1")
    for tokens in (ONE, OTHER):
        writer.cache_prefix(tokens)
    cache = any_server.open("w2", prewarm_threshold=1)
    cache.find_longest_cache_hit(ONE)
    cache.flush()
    before = uses(any_server, ONE)
    deepest = next(entry for entry in cache.get_prewarm_candidates() if entry.num_tokens == 24)
    deepest.touch()
    cache.find_longest_cache_hit(ONE)
    cache.flush()
    after = uses(any_server, ONE)
    assert (after[0].hits - before[0].hits, after[1].hits - before[1].hits) == (1, 2)
