"""Long payloads on another server: all parts are kept, dropped and reclaimed with the first value that names them."""

from __future__ import annotations

import time
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer, operations
from distprefix.tiers import moving
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.payloads import ALWAYS, data, demote, loaded, names, put, sound
from tests.servers import Backend, Server

NEVER = 3600.0
TOKENS = prompt(3)
SIZE = 1800
"""Bytes of payloads of four small parts."""
RIGHT = data(TOKENS, SIZE)


def put_cold(backend: Backend, second: Server) -> tuple[PrefixCacheOptimizer, Any]:
    """Long payloads on the other server, and a client of it."""
    return put(backend, "elsewhere", TOKENS, second, SIZE, cold_codec="raw")


def ttls(backend: Backend, server: Any) -> list[int]:
    """TTLs of all values on the other server, in ms."""
    return [server.pttl(backend.keys.base + name) for name in names(server, backend, "cold:")]


def test_a_crash_before_settling_keeps_all_parts(real_server: Backend, second: Server, small_parts: int) -> None:
    """Parts of copies that became cold, and were not asked to stay, are asked by whoever demotes next."""
    assert small_parts < SIZE // 3
    cache = real_server.open(cold_url=second.url, cold_codec="raw")
    server = second.client()
    assert cache.store(TOKENS, RIGHT) == 3
    assert moving.demote(cache._tiers.payloads, time.monotonic() + 10, ALWAYS) == 3
    assert len(ttls(real_server, server)) == 12
    assert min(ttls(real_server, server)) > 0
    sound(real_server, cache, server)
    real_server.open("w2", cold_url=second.url, cold_codec="raw").demote(NEVER)
    assert ttls(real_server, server) == [-1] * 12
    assert loaded(cache, TOKENS) == RIGHT
    sound(real_server, cache, server)


def test_parts_are_settled_before_the_first_value(
    real_server: Backend, second: Server, small_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first value never stays without its parts, wherever a process that settles them is cut short."""
    assert small_parts < SIZE // 3
    cache = real_server.open(cold_url=second.url, cold_codec="raw")
    server = second.client()
    elsewhere: Any = cache._tiers._elsewhere
    ask = elsewhere._ask
    firsts = {real_server.keys.payload(chunk, cold=True) for chunk in heads(TOKENS)}
    settled: list[str] = []

    def noted(deadline: float, *command: Any) -> Any:
        if command[0] == "PERSIST" and command[1] in firsts:
            parts: list[Any] = list(server.scan_iter(match=f"{command[1]}:*", count=1000))
            assert [server.pttl(part) for part in parts] == [-1] * 3
            settled.append(command[1])
        return ask(deadline, *command)

    monkeypatch.setattr(elsewhere, "_ask", noted)
    assert cache.store(TOKENS, RIGHT) == 3
    assert demote(real_server, cache) == 3
    assert set(settled) == firsts
    assert ttls(real_server, server) == [-1] * 12
    sound(real_server, cache, server)


def test_dropped_payloads_lose_all_parts(real_server: Backend, second: Server, small_parts: int) -> None:
    """What was promoted, or trimmed, has all of its parts expire on the other server."""
    assert small_parts < SIZE // 3
    cache, server = put_cold(real_server, second)
    assert ttls(real_server, server) == [-1] * 12
    cache._state.link.publish(operations.trim(bytes.fromhex("".join(heads(TOKENS))), "@cold", 1))
    cache.demote(NEVER)
    assert sorted(ttls(real_server, server))[:8] == [-1] * 8
    assert sum(0 < ttl <= 120_000 for ttl in ttls(real_server, server)) == 4
    sound(real_server, cache, server)
    assert cache.promote(TOKENS) == 2
    cache.demote(NEVER)
    assert all(0 < ttl <= 120_000 for ttl in ttls(real_server, server))
    assert demote(real_server, cache) == 2
    assert loaded(cache, TOKENS) == RIGHT[:2]
    assert ttls(real_server, server).count(-1) == 8
    sound(real_server, cache, server)


@pytest.mark.parametrize("loss", ["tree", "first value", "header", "nothing"])
def test_reclaim_drops_lone_parts_alone(real_server: Backend, second: Server, small_parts: int, loss: str) -> None:
    """Parts that no first value names go; those of payloads that the tree names, and of uploads under way, stay."""
    assert small_parts < SIZE // 3
    cache, server = put_cold(real_server, second)
    first = real_server.keys.payload(heads(TOKENS)[2], cold=True)
    under_way = real_server.keys.part(heads(TOKENS)[2], "00" * 8, 1, cold=True)
    server.set(under_way, b"x", px=600_000)
    if loss == "tree":
        cache.clear()
        real_server.admin.delete(real_server.keys.trash, real_server.keys.kept)
    elif loss == "first value":
        server.delete(first)
    elif loss == "header":
        server.setrange(first, 20, b"another.")
    elsewhere: Any = cache._tiers._elsewhere
    assert elsewhere.reclaim(time.monotonic() + 10) == (3 if loss == "tree" else 0)
    stay = {"tree": 0, "first value": 8, "header": 9, "nothing": 12}[loss]
    assert ttls(real_server, server).count(-1) == stay
    assert server.exists(under_way)
    found = loaded(cache, TOKENS)
    assert found == RIGHT[: {"tree": 0, "nothing": 3}.get(loss, 2)]
    cache.demote(NEVER)
    sound(real_server, cache, server)
    assert cache.store(TOKENS, RIGHT) == 3
    assert loaded(cache, TOKENS) == RIGHT
