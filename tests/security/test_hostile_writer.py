"""Whoever writes to Redis as they like, without the keys, has no wrong byte loaded and stops nobody."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from itertools import permutations
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer
from distprefix.errors import NamespaceError
from distprefix.redis.client import Client
from distprefix.redis.connections import connect
from distprefix.redis.keys import REGISTRY, Keys
from distprefix.redis.purge import purge
from distprefix.relief import relieve, remove_unused
from distprefix.tiers.envelope import HEADER_BYTES
from tests.servers import Backend, Server, hashes_of

TOKENS = list(range(32))
KEYS = "1:" + "5a" * 32
BODIES = [bytes([number]) * 3000 for number in range(8)]


def chunks(backend: Backend) -> list[str]:
    """The chunks of the prompt, in hex."""
    hashes = hashes_of(TOKENS)
    return [hashes[at : at + 16].hex() for at in range(0, len(hashes), 16)]


def right(cache: PrefixCacheOptimizer, bodies: list[bytes]) -> int:
    """How many chunks a load gives; every one of them has to be the right one."""
    loaded = cache.load(TOKENS)
    assert [bytes(payload) for payload in loaded.payloads] == bodies[: loaded.chunks]
    return loaded.chunks


@pytest.mark.parametrize("encryption", ["", KEYS], ids=["plain", "sealed"])
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_values_in_each_others_places_are_not_loaded(real_server: Backend, encryption: str, codec: str) -> None:
    """Any value under any other chunk's key, or with another's header, ends the hit there, and nothing raises."""
    settings: dict[str, Any] = {"encryption_keys": encryption, "payload_codec": codec}
    writer = real_server.open("writer", **settings)
    admin: Any = real_server.admin
    drawn = random.Random(5)
    for one, other in drawn.sample(list(permutations(range(8), 2)), 12):
        assert writer.store(TOKENS, BODIES) == 8
        names = [real_server.keys.payload(chunk) for chunk in chunks(real_server)]
        values = [admin.get(name) for name in names]
        forged = values[other] if drawn.random() < 0.5 else values[one][:HEADER_BYTES] + values[other][HEADER_BYTES:]
        admin.set(names[one], forged)
        reader = real_server.open("reader", **settings)
        assert right(reader, BODIES) == one
        assert reader.get_metrics()["payloads_damaged"] + reader.get_metrics()["payloads_unreadable"] == 1
        writer.clear()


@pytest.mark.parametrize("encryption", ["", KEYS], ids=["plain", "sealed"])
def test_payloads_of_another_namespace_are_damaged(real_server: Backend, encryption: str) -> None:
    """The sealed value of the same engine chunk, brought over from a namespace of another model, is not loaded."""
    admin: Any = real_server.admin
    names: list[list[str]] = []
    for model in ("base", "tuned"):
        namespace = f"{real_server.namespace}-{model}"
        cache = real_server.open("w", namespace=namespace, model=model, encryption_keys=encryption)
        bodies = [model.encode() + body for body in BODIES]
        assert cache.store(TOKENS, bodies) == 8
        chain = cache.chain_of(TOKENS)
        names.append([Keys(namespace).payload(chunk.hex()) for chunk in chain])
    admin.set(names[1][2], admin.get(names[0][2]))
    victim = real_server.opened[-1]
    assert right(victim, [b"tuned" + body for body in BODIES]) == 2
    assert victim.get_metrics()["payloads_damaged"] + victim.get_metrics()["payloads_unreadable"] == 1


@pytest.mark.parametrize("damage", ["cut", "longer", "empty", "other type", "flipped", "old upload"])
def test_a_forged_value_ends_a_hit_cleanly(real_server: Backend, damage: str) -> None:
    """Whatever stands where a payload was, loads into buffers and into memory of their own end before it."""
    writer = real_server.open("writer", encryption_keys=KEYS)
    writer.store(TOKENS, BODIES)
    admin: Any = real_server.admin
    name = real_server.keys.payload(chunks(real_server)[3])
    value = admin.get(name)
    admin.delete(name)
    if damage == "other type":
        admin.rpush(name, value)
    else:
        forged = {
            "cut": value[:-1],
            "longer": value + b"x",
            "empty": b"",
            "flipped": value[:100] + bytes([value[100] ^ 1]) + value[101:],
            "old upload": value[:20] + os.urandom(8) + value[28:],
        }[damage]
        admin.set(name, forged)
    reader = real_server.open("reader", encryption_keys=KEYS)
    into = [bytearray(3000) for _ in range(8)]
    assert reader.load(TOKENS, into).chunks == 3
    assert into[:3] == BODIES[:3]
    assert right(reader, BODIES) == 3


@pytest.mark.parametrize("size", [0, 1, 39, 40, 2**31 - 1, 2**32 - 1])
def test_forged_sizes_cost_no_memory(real_server: Backend, size: int) -> None:
    """Sizes that the tree was made to name are held to what the namespace allows before any byte is allocated."""
    writer = real_server.open("writer", max_payload_bytes=4096)
    writer.store(TOKENS, BODIES)
    admin: Any = real_server.admin
    head = chunks(real_server)[0]
    column = bytearray(admin.hget(real_server.keys.node(head), "b:@warm"))
    column[8:12] = size.to_bytes(4, "little")
    admin.hset(real_server.keys.node(head), "b:@warm", bytes(column))
    reader = real_server.open("reader", max_payload_bytes=4096)
    assert right(reader, BODIES) <= 2
    assert reader.load(TOKENS, [bytearray(3000) for _ in range(8)]).chunks <= 2


def test_a_secret_that_was_exchanged_is_refused(real_server: Backend) -> None:
    """A secret of the attacker's own choice does not fit the namespace's check: nobody names chunks by it."""
    cache = real_server.open("w1")
    cache.cache_prefix(TOKENS)
    real_server.admin.hset(real_server.keys.secret, "secret", "ab" * 32)
    with pytest.raises(NamespaceError, match="another secret"):
        real_server.open("w2")
    assert cache.find_longest_cache_hit(TOKENS).matched_chunks == 8


def test_a_configured_secret_is_worth_more_than_redis(real_server: Backend) -> None:
    """Where the secret is configured, who rewrites descriptor and secret moves nobody to names of their own."""
    secret = "never in this server's memory"
    cache = real_server.open("w1", secret=secret)
    cache.cache_prefix(TOKENS)
    before = cache.chain_of(TOKENS)
    admin: Any = real_server.admin
    admin.hset(real_server.keys.secret, "secret", "ab" * 32)
    admin.hset(real_server.keys.descriptor, "key_check", "00" * 8)
    with pytest.raises(NamespaceError):
        real_server.open("w2", secret=secret)
    admin.delete(real_server.keys.descriptor, real_server.keys.secret)
    assert real_server.open("w3", secret=secret).chain_of(TOKENS) == before


HOSTILE = ["nan", "inf", "-inf", "-1", "", "1e309", "9" * 400, "\xff", "[/red]\x1b[2J", "1.0.0", "0x10"]


@pytest.mark.parametrize("value", HOSTILE)
def test_forged_standings_trap_no_operator(own_server: Server, value: str) -> None:
    """Shares, uses, sizes, ages and tags of any kind: making room and removing what is unused go on."""
    backend = Backend("own", own_server.client(), "a", url=own_server.url)
    backend.open("w1").cache_prefix(TOKENS)
    admin: Any = backend.admin
    for field in ("used", "created", "share", "tenant", "ttl_ms", "bytes", "cold", "elsewhere"):
        admin.hset(backend.keys.meta, field, value)
    names = ("}", "{a}:", "*", "a*", "\x1b]0;x\x07", "x" * 10_000, "", "\ud800".encode(errors="surrogatepass"))
    admin.zadd(REGISTRY, dict.fromkeys(names, -1.0))
    client = Client(connect(own_server.url, 10))
    backend.open("w2", namespace="b").cache_prefix(TOKENS)
    counts = Counter[str]()
    assert remove_unused(client, time.monotonic() + 20, counts) == 0
    done = relieve(client, backend.config(server_max_bytes=1), time.monotonic() + 20, counts=counts)
    assert done.namespaces >= 1
    assert admin.hget(Keys("b").meta, "nodes") == b"0"  # it went on to the one that is sound
    assert admin.exists(backend.keys.descriptor)
    backend.close()


def test_a_purge_removes_no_key_of_others(real_server: Backend) -> None:
    """Keys whose names look like a namespace's, and namespaces whose names begin alike, stay."""
    real_server.open("w1").cache_prefix(TOKENS)
    admin: Any = real_server.admin
    name = real_server.namespace
    others = (
        f"dp:{{{name}x:0}}:meta",
        f"dp:{{{name}:0}}",
        f"dp:{{{name}",
        f"xdp:{{{name}:0}}:meta",
        f"dp:{{{name}.}}:w",
    )
    for other in others:
        admin.set(other, "x")
    purge(Client(connect(real_server.url or "", 10)), name, time.monotonic() + 30)
    assert [admin.get(other) for other in others] == [b"x"] * len(others)
    assert not list(admin.scan_iter(match=f"dp:{{{name}:0}}:*", count=1000))
    admin.delete(*others)
