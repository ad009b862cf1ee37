"""Two nodes that move payloads at the same time, one held up between two of its steps: nothing is lost or left over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from distprefix import operations
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.integration.test_payload_stress import NEVER, everything_ends_well
from tests.payloads import ALWAYS, data, demote, loaded, metric, put
from tests.servers import Backend, Server, find_server

TOKENS = prompt(3)


@pytest.fixture
def second() -> Iterator[Server]:
    """A server for cold payloads."""
    server = Server(find_server("valkey-9.1")).start()
    yield server
    server.stop()


def _once(target: Any, name: str, meanwhile: Any, monkeypatch: pytest.MonkeyPatch, *, after: Any = None) -> list[bool]:
    """Have something happen before the next call of a method, and after it. Returns a list that is empty then."""
    method, todo = getattr(target, name), [True]

    def hooked(*args: Any) -> Any:
        first = bool(todo)
        if first:
            todo.pop()
            meanwhile()
        result = method(*args)
        if first and after is not None:
            after()
        return result

    monkeypatch.setattr(target, name, hooked)
    return todo


def test_two_nodes_empty_the_trash(real_server: Backend, second: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What two nodes have the other server drop at the same time goes from there."""
    cache, server = put(real_server, "elsewhere", TOKENS, second)
    other = real_server.open("w2", cold_url=second.url)
    assert cache.promote(TOKENS) == 3
    assert real_server.admin.scard(real_server.keys.trash) == 3
    done = _once(cache._tiers._elsewhere, "_each", lambda: other.demote(NEVER), monkeypatch)
    cache.demote(NEVER)
    assert not done
    everything_ends_well(real_server, cache, server)
    assert loaded(other, TOKENS) == data(TOKENS)


def test_a_node_settles_late(real_server: Backend, second: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a node has the other server keep after the tree dropped it, and others did what was to do, goes as well."""
    cache, other = (real_server.open(who, cold_url=second.url) for who in ("w1", "w2"))
    cache.store(TOKENS, data(TOKENS))

    def meanwhile() -> None:
        other.demote(NEVER)
        other._state.link.publish(operations.trim(bytes.fromhex(heads(TOKENS)[0]), "@cold", 1))
        other.demote(NEVER)

    done = _once(cache._tiers._elsewhere, "_each", meanwhile, monkeypatch)
    assert cache.demote(ALWAYS) == 3
    assert not done
    everything_ends_well(real_server, cache, second.client())


@pytest.mark.parametrize("tier", ["here", "elsewhere"])
def test_what_goes_and_comes_back_during_a_load_is_there(
    real_server: Backend, second: Server, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A payload that is away just while a load reads it, and back when it looks again, is not taken for lost."""
    options: dict[str, Any] = {"cold_url": second.url} if tier == "elsewhere" else {}
    cache, other = (real_server.open(who, **options) for who in ("w1", "w2"))
    cache.store(TOKENS, data(TOKENS))

    def away() -> None:
        assert demote(real_server, other) == 3

    def back() -> None:
        assert other.promote(TOKENS) == 3

    done = _once(cache._tiers.payloads.warm, "read", away, monkeypatch, after=back)
    assert loaded(cache, TOKENS) == data(TOKENS)
    assert not done
    assert metric(cache, "payloads_missing") == 0
    everything_ends_well(real_server, cache, second.client() if tier == "elsewhere" else None)


def test_what_a_store_follows_is_evicted(real_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was written behind chunks that are gone when the tree is told belongs to nothing, and ends by itself."""
    cache, tokens = real_server.open(max_run=3), prompt(8)
    other = real_server.open("w2", max_run=3)
    assert cache.store(tokens[:24], data(tokens)[:6]) == 6

    def evict() -> None:
        other._state.link.administer(operations.evict(operations.Bounds(3, None, None), 100))

    done = _once(cache._tiers.payloads.warm, "write", evict, monkeypatch)
    assert cache.store(tokens, [*[None] * 6, *data(tokens)[6:]]) == 3
    assert not done
    assert loaded(cache, tokens) == data(tokens)[:3]
    everything_ends_well(real_server, cache)
    assert cache.store(tokens, data(tokens)) == 8
    everything_ends_well(real_server, cache)
    assert loaded(cache, tokens) == data(tokens)
