"""Chains of which engines keep only parts: in whatever order these come, what is told is what can be loaded."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.chunking import HASH_BYTES
from distprefix.engines.parts import PartStore
from tests.servers import Server, find_server

CHUNKS, FORK = 8, 3
_numbers = count()


def chain_of(which: int) -> bytes:
    """The first chain, or the other one."""
    return b"".join(bytes([1 + at, which if at >= FORK else 0]) * (HASH_BYTES // 2) for at in range(CHUNKS))


def payload(which: int, at: int) -> bytes:
    """Of a chunk."""
    return bytes([which if at >= FORK else 0, at]) * 250


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that nobody harms."""
    server = Server(find_server("valkey-9.1")).start()
    yield server
    server.stop()


Part = tuple[int, int, int]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    parts=st.lists(st.tuples(st.integers(0, 1), st.integers(0, CHUNKS - 1), st.integers(1, CHUNKS)), max_size=6),
    max_run=st.sampled_from([1, 2, 3, 256]),
)
def test_parts_in_any_order(server: Server, parts: list[Part], max_run: int) -> None:
    """Parts of two chains that fork are stored; then each chunk that was can be loaded, and the tree is sound."""
    config = PrefixCacheConfig(url=server.url, namespace=f"parts-{next(_numbers)}", max_run=max_run, lookup_timeout_s=5)
    store = PartStore(config, alone=True, max_waiting_bytes=1 << 20)
    try:
        stored: set[tuple[int, int]] = set()
        for which, first, size in parts:
            stop = min(CHUNKS, first + size)
            buffers = [payload(which, at) for at in range(first, stop)]
            good = store.store_parts(chain_of(which)[: stop * HASH_BYTES], buffers, first).result(10)
            assert good == [True] * len(buffers)
            stored |= {(which if at >= FORK else 0, at) for at in range(first, stop)}
        for which in (0, 1):
            mine = {at for at in range(CHUNKS) if (which if at >= FORK else 0, at) in stored}
            found = store.look_up_parts(chain_of(which), range(CHUNKS)).result(10)
            assert found == mine
            room = [bytearray(500) for _ in range(CHUNKS)]
            good = store.load_parts(chain_of(which), room, 0).result(10)
            assert {at for at in range(CHUNKS) if good[at]} == mine
            assert all(room[at] == payload(which, at) for at in mine)
        with PrefixCacheOptimizer(config) as cache:
            assert cache.check_integrity().problems == []
    finally:
        store.close()


def test_without_leave_to_stand_alone(server: Server) -> None:
    """A store of whole chains drops what lies behind a hole, and counts the hole."""
    config = PrefixCacheConfig(url=server.url, namespace="whole", lookup_timeout_s=5)
    store = PartStore(config, alone=False, max_waiting_bytes=1 << 20)
    try:
        buffers = [payload(0, at) for at in range(CHUNKS)]
        assert store.store_parts(chain_of(0)[: 4 * HASH_BYTES], buffers[2:4], 2).result(10) == [False, False]
        assert (store.counts["holes"], store.counts["stores_dropped"]) == (1, 2)
        assert store.store_parts(chain_of(0), buffers, 0).result(10) == [True] * CHUNKS
        assert store.look_up_parts(chain_of(1), range(CHUNKS)).result(10) == {0, 1, 2}
    finally:
        store.close()
