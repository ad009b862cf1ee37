"""What engines' stores count: a request is one use of each node, however many processes of the engine serve it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.chunking import Chain
from distprefix.engines.store import EngineStore
from distprefix.redis.inspect import children_of, read_node, read_stats
from distprefix.redis.keys import Keys
from distprefix.touches import Touches
from tests.fake_engine import until
from tests.servers import Server

CHAIN = bytes(range(96))
"""Six chunks."""
BODIES = [bytes([i]) * 500 for i in range(6)]
NAMESPACE = "figures"


@pytest.fixture
def stores(own_server: Server) -> Iterator[tuple[EngineStore, EngineStore]]:
    """The stores of an engine's scheduler and of its worker, under one name."""
    config = PrefixCacheConfig(
        url=own_server.url, namespace=NAMESPACE, worker_id="engine", chunk_size=4, touch_interval_s=0.02
    )
    scheduler, worker = EngineStore(config), EngineStore(config)
    yield scheduler, worker
    scheduler.close()
    worker.close()


def hits(server: Server) -> list[int]:
    """Of the nodes at the root."""
    keys = Keys(NAMESPACE)
    found = [read_node(server.client(), keys, head) for head in children_of(server.client(), keys, "")]
    return [node.hits for node in found if node is not None]


def into(count: int) -> list[bytearray]:
    """Room for payloads."""
    return [bytearray(500) for _ in range(count)]


def test_a_request_is_one_hit_in_the_tree(stores: tuple[EngineStore, EngineStore], own_server: Server) -> None:
    """A look-up before the prompt is stored is no hit; a look-up and the load that follows it are one."""
    scheduler, worker = stores
    assert scheduler.look_up(CHAIN).result() == 0
    assert worker.store(CHAIN, BODIES, 0).result() == 6
    assert scheduler.look_up(CHAIN).result() == 6
    assert worker.load(CHAIN, into(6), 0).result() == 6
    for store in stores:
        store.close()
    assert hits(own_server) == [1]


def test_an_engine_counts_what_it_takes(stores: tuple[EngineStore, EngineStore], own_server: Server) -> None:
    """A look-up whose outcome the engine decides counts the chunks it lacked and those it took, in one row."""
    scheduler, worker = stores
    assert worker.store(CHAIN, BODIES, 0).result() == 6
    assert scheduler.look_up(CHAIN, is_counted=False).result() == 6
    assert scheduler.metrics()["lookups"] == 0
    scheduler.count_lookup(4, 3)
    assert worker.load(CHAIN[:80], into(3), 2).result() == 3

    def row() -> tuple[object, ...]:
        live = read_stats(own_server.client(), Keys(NAMESPACE))["live"]
        assert set(live) <= {"engine/0@gpu"}
        names = ("lookups", "hits", "chunks_looked_up", "tokens_hit", "loads", "tokens_loaded", "payload_bytes_loaded")
        return tuple(live.get("engine/0@gpu", {}).get(name, 0) for name in names)

    until(lambda: row() == (1, 1, 4, 12, 1, 12, 1500))


def test_a_load_of_a_result_is_no_second_hit(own_server: Server) -> None:
    """A look-up's result that is loaded counts once in the tree; a load without a look-up counts as well."""
    config = PrefixCacheConfig(url=own_server.url, namespace=NAMESPACE, worker_id="w", chunk_size=4)
    with PrefixCacheOptimizer(config) as cache:
        prompt = Chain.packed(CHAIN)
        assert cache.store(prompt, BODIES) == 6
        hit = cache.find_longest_cache_hit(prompt)
        assert cache.load(hit).chunks == 6
        cache.flush()
        assert hits(own_server) == [1]
        assert cache.load(prompt).chunks == 6
        cache.flush()
        assert hits(own_server) == [2]


def test_uses_of_one_node_by_several_paths_add_up() -> None:
    """A node whose path is known and that is also used by itself keeps the hits of both, and so do its ancestors."""
    touches = Touches()
    touches.add_chunks(CHAIN, (0, 3))
    touches.add_node(CHAIN[48:64])
    touches.add_chunks(CHAIN, (0, 3))
    assert {head: count for head, count, _ in touches.take()} == {CHAIN[:16]: 2, CHAIN[48:64]: 3}
