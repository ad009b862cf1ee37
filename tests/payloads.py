"""Payloads for tests: their bytes, where they lie, and whether all is sound."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Any

import redis

from distprefix import PrefixCacheOptimizer
from distprefix.chunking import read_prompt
from distprefix.hashing import ChunkHasher
from distprefix.redis.integrity import check_payloads
from tests.servers import Backend, Server

__all__ = [
    "ALWAYS",
    "KEYS",
    "MIB",
    "TIERS",
    "cut",
    "data",
    "delete",
    "demote",
    "flip",
    "loaded",
    "meta",
    "metric",
    "names",
    "put",
    "sound",
    "where",
]

MIB = 1 << 20


ALWAYS = -60.0
"""An idle time that everything has reached."""


TIERS = ("warm", "here", "elsewhere")


KEYS = "1:" + "11" * 32


def data(tokens: Sequence[int], size: int = 1000) -> list[bytes]:
    """A payload for each chunk, other for other chunks, that a codec can make a little smaller."""
    return [Random(head).randbytes(size // 2) + bytes(size - size // 2) for head in _names(tokens)]


def _names(tokens: Sequence[int]) -> list[bytes]:
    """Something of each chunk of a prompt that depends on all before it, the same in every namespace."""
    hasher = ChunkHasher("blake2b", bytes(32))
    prompt = read_prompt(list(tokens), 4)
    hashes = hasher.chain(hasher.root, prompt.view, prompt.stride)
    return [hashes[at : at + 16] for at in range(0, len(hashes), 16)]


def loaded(cache: PrefixCacheOptimizer, tokens: Sequence[int]) -> list[bytes]:
    """What a load gives."""
    result = cache.load(tokens)
    assert result.chunks == len(result.payloads)
    return [bytes(payload) for payload in result.payloads]


def metric(cache: PrefixCacheOptimizer, name: str) -> int:
    """A count of this process."""
    return cache.get_metrics()[name]


def demote(backend: Backend, cache: PrefixCacheOptimizer) -> int:
    """Make everything cold that can be; nobody else is moving anything."""
    moved = done = 0
    while done or not moved:
        for key in backend.admin.scan_iter(match=backend.keys.moving("*"), count=1000):
            backend.admin.delete(key)
        done = cache.demote(ALWAYS)
        moved += done
        if not done:
            break
    return moved


def names(admin: redis.Redis, backend: Backend, kind: str) -> set[str]:
    """Keys of a kind, without what they all begin with."""
    base = backend.keys.base
    return {name.decode().removeprefix(base) for name in admin.scan_iter(match=f"{base}{kind}*", count=1000)}


def meta(backend: Backend, name: str) -> int:
    """A count of the shard."""
    found: Any = backend.admin.hget(backend.keys.meta, name)
    return int(found or 0)


def sound(backend: Backend, cache: PrefixCacheOptimizer, cold: redis.Redis | None = None) -> None:
    """The tree is sound, and payloads in both tiers are just those that it names; what it dropped is in the trash."""
    assert cache.check_integrity().problems == []
    assert check_payloads(backend.admin, backend.keys, cold) == []


def where(tier: str, second: Server) -> dict[str, Any]:
    """Settings for a tier."""
    return {"cold_url": second.url} if tier == "elsewhere" else {}


def put(backend: Backend, tier: str, tokens: list[int], second: Server, size: int = 1000, **more: Any) -> Any:
    """A cache, and the server of the tier in which a prompt's payloads lie."""
    cache = backend.open(**{**where(tier, second), **more})
    assert cache.store(tokens, data(tokens, size)) == len(tokens) // 4
    if tier != "warm":
        assert demote(backend, cache) == len(tokens) // 4
    return cache, second.client() if tier == "elsewhere" else backend.admin


# Damage


def flip(admin: redis.Redis, key: str, _: str) -> None:
    """A bit of the value is another one."""
    value: Any = admin.get(key)
    admin.setrange(key, len(value) // 2, bytes([value[len(value) // 2] ^ 1]))


def cut(admin: redis.Redis, key: str, _: str) -> None:
    """The value has lost its end."""
    value: Any = admin.get(key)
    admin.set(key, value[:-1])


def delete(admin: redis.Redis, key: str, _: str) -> None:
    """The value is gone."""
    admin.delete(key)
