"""A tenant who chooses prompts, salts and LoRA names, and knows this source, reads, forges and fills nothing."""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from distprefix import Chain, PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.chunking import pack_extra, prompt_extras, read_prompt
from distprefix.engines.identity import Identity
from distprefix.engines.store import EngineStore, config_for
from distprefix.errors import DistPrefixError
from distprefix.hashing import HASH_ALGORITHMS, ChunkHasher, derive_key
from distprefix.redis.keys import Keys
from tests.servers import Backend, Server, limited_server

SYSTEM = list(range(1000, 1016))
SECRET_PROMPT = [*SYSTEM, *range(7000, 7048)]
HOSTILE_SALTS = [
    "",
    "}",
    "{x}",
    "*",
    "..",
    "\0",
    "salt\0salt",
    "\x1b[2J",
    "\ud800",
    "a" * 100_000,
    "😀",
    "dp:{default:0}:",
]


def payloads(count: int) -> list[bytes]:
    """The victim's KV."""
    return [b"KV of the victim, chunk %d" % number for number in range(count)]


@pytest.mark.parametrize("algorithm", [name for name in HASH_ALGORITHMS if name != "xxh3_128"])
def test_names_that_a_tenant_can_compute_hit_nothing(real_server: Backend, algorithm: str) -> None:
    """Who knows the prompt, the source and everything but the key computes names in every way, and none is there."""
    victim = real_server.open("victim", hash_algorithm=algorithm)
    victim.cache_prefix(SECRET_PROMPT)
    victim.store(SECRET_PROMPT, payloads(16))
    attacker = real_server.open("attacker", hash_algorithm=algorithm)
    config = attacker.config
    view = read_prompt(SECRET_PROMPT, 4).view
    known = (b"", bytes(32), config.namespace.encode(), b"distprefix", b"default")
    identity = config.identity
    for secret, salts in product(known, (b"", identity.salts)):
        hasher = ChunkHasher(algorithm, derive_key(secret, algorithm, config.namespace, identity.digest, salts))
        chain = Chain.packed(hasher.chain(hasher.root, view, 16))
        assert not attacker.find_longest_cache_hit(chain).hit
        assert attacker.load(chain).chunks == 0
    for digest in (xxhash.xxh3_128_digest, _sha256, _blake2b):
        for root in (b"", bytes(16)):
            parent, hashes = root, list[bytes]()
            for at in range(0, len(view), 16):
                parent = digest(parent + view[at : at + 16])
                hashes.append(parent)
            assert attacker.find_stored(Chain(hashes)) == 0


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:16]


def _blake2b(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=16).digest()


def test_another_salt_confirms_no_guess(real_server: Backend) -> None:
    """With the right prompt under another cache salt, LoRA or engine name a tenant sees no hit at any length."""
    victim = real_server.open("victim")
    named = victim.chain_of(SECRET_PROMPT, cache_salt="the victim's")
    victim.cache_prefix(named)
    victim.store(named, payloads(16))
    attacker = real_server.open("attacker")
    guesses = [
        SECRET_PROMPT,
        attacker.chain_of(SECRET_PROMPT, cache_salt="mine"),
        attacker.chain_of(SECRET_PROMPT, lora_name="the victim's"),
        attacker.chain_of(SECRET_PROMPT, lora_name="salt", cache_salt="the victim's"),
        attacker.chain_of(SECRET_PROMPT, extras={0: pack_extra("key", "the victim's")}),
        attacker.chain_of(SECRET_PROMPT, extras={1: pack_extra("salt", "the victim's")}),
    ]
    for guess in guesses:
        assert not attacker.find_longest_cache_hit(guess).hit
        assert attacker.find_stored(guess) == 0
        assert attacker.load(guess).chunks == 0


TEXT = st.text(max_size=12)


@settings(max_examples=300)
@given(st.tuples(TEXT, TEXT), st.tuples(TEXT, TEXT))
def test_no_salt_or_lora_looks_like_another(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Whatever characters a tenant puts into LoRA name and salt, only the same pair gives the same extras."""

    def extras(pair: tuple[str, str]) -> bytes:
        return prompt_extras(pair[0] or None, pair[1] or None).get(0, b"")

    assert (extras(one) == extras(other)) == (one == other)


@settings(max_examples=300)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=4, max_size=4), st.binary(max_size=24))
def test_no_tokens_look_like_an_extra(tokens: list[int], text: bytes) -> None:
    """A chunk with an extra has the hash of no other chunk, whatever the tokens are."""
    hasher = ChunkHasher("blake2b", b"k" * 32)
    data = array("I", tokens).tobytes()
    extra = pack_extra("salt", text)
    with_extra = hasher.chain(hasher.root, data, 16, {0: extra})
    longer = data + extra
    cut = longer[: len(longer) // 16 * 16]
    assert with_extra not in {hasher.chain(hasher.root, cut, 16)[at : at + 16] for at in range(0, len(cut), 16)}


@pytest.mark.parametrize("salt", HOSTILE_SALTS)
def test_salts_of_any_kind_name_a_namespace_of_their_own(salt: str) -> None:
    """Whatever a request's salt is made of, the namespace has a plain name that shows nothing of it."""
    names = [Identity(model="m", request_salt=salt).namespace("kv"), Identity(model="m", salt=salt).namespace("kv")]
    for name in names:
        assert len(name) <= 64
        assert all(letter.isascii() and (letter.isalnum() or letter in "-._") for letter in name)
    assert names[0] != names[1] or not salt


def test_two_salts_of_one_engine_share_nothing(real_server: Backend) -> None:
    """Stores of one engine under two salts, however these are told, load nothing of each other."""
    identity = Identity("lmcache", "m", "w", "", "l", 16, "r", "h")
    settings_of: list[dict[str, Any]] = [{"salt": "a"}, {"salt": "b"}, {"request_salt": "a"}, {}]
    stores = [EngineStore(config_for(identity, {"url": real_server.url, **each})) for each in settings_of]
    chain = os.urandom(64)
    try:
        assert stores[0].store(chain, payloads(4), 0).result(20) == 4
        for store in stores[1:]:
            into = [bytearray(len(payload)) for payload in payloads(4)]
            assert store.look_up(chain).result(20) == 0
            assert store.load(chain, into, 0).result(20) == 0
            assert not any(map(any, into))
    finally:
        for store in stores:
            store.close()


def test_redis_has_no_engine_hash(real_server: Backend) -> None:
    """An engine's own block hashes, which anybody computes from a guessed prompt, are nowhere in Redis."""
    identity = Identity("vllm", "m", "w", "", "l", 16, "r", "sha256_cbor")
    store = EngineStore(config_for(identity, {"url": real_server.url}))
    chain = os.urandom(64)
    try:
        assert store.store(chain, payloads(4), 0).result(20) == 4
        assert store.store_each(chain[:16], payloads(1)).result(20) == [True]
        admin: Any = real_server.admin
        everything = [b"".join((name, admin.dump(name) or b"")) for name in admin.scan_iter(count=1000)]
        for at in range(0, 64, 16):
            part = chain[at : at + 16]
            assert not [name for name in everything if part in name or part.hex().encode() in name]
    finally:
        store.close()


@pytest.fixture
def small() -> Iterator[Server]:
    """A server with room for 24 MiB."""
    with limited_server("24mb") as server:
        yield server


def test_a_flood_of_prompts_takes_no_more_than_a_share(small: Server) -> None:
    """One salt, ever new prompts, pinned and leased: the neighbour keeps what is within its share, and goes on."""

    def config(namespace: str, salt: str) -> PrefixCacheConfig:
        quiet: dict[str, Any] = {"touch_interval_s": 0, "feed_interval_s": 0, "worker_id": "w"}
        return PrefixCacheConfig(url=small.url, namespace=namespace, salt=salt, payload_timeout_s=30.0, **quiet)

    with (
        PrefixCacheOptimizer(config("a", "neighbour")) as neighbour,
        PrefixCacheOptimizer(config("b", "flood")) as flood,
    ):
        for cache in (neighbour, flood):  # both in use for long
            small.client().hset(Keys(cache.config.namespace).meta, "created", "1.0")
            small.client().hset(Keys(cache.config.namespace).meta, "used", 10**15)
        own = Chain([os.urandom(16) for _ in range(60)])
        assert neighbour.store(own, [os.urandom(100_000)] * 60) == 60
        for _ in range(50):
            chain = Chain([os.urandom(16) for _ in range(10)])
            flood.store(chain, [os.urandom(100_000)] * 10)
            flood.pin(chain)
        assert neighbour.load(own).chunks == 60
        assert neighbour.store(Chain([os.urandom(16)]), [os.urandom(100_000)]) == 1


def test_prompts_of_any_kind_do_no_harm(real_server: Backend) -> None:
    """Repeated tokens, tokens that spell Redis commands, prompts of one chunk a million times: the tree stays sound."""
    cache = real_server.open("w1", max_cached_sequences=100)
    spelled = list(array("I", b"*1\r\n$8\r\nFLUSHALL\r\n\0\0"[:20]))
    for prompt in ([0] * 4000, [2**32 - 1] * 400, spelled * 50, [*range(4)] * 200):
        cache.cache_prefix(prompt)
        assert cache.find_longest_cache_hit(prompt).matched_chunks == len(prompt) // 4
    for number in range(300):
        cache.cache_prefix([number, 1, 2, 3])
    assert cache.check_integrity().ok
    for wrong in ([-1] * 4, ["a"] * 4, "text", [2**32] * 4, None, {}, Chain([b"x" * 16, b"x" * 16])):
        with pytest.raises(DistPrefixError):
            cache.cache_prefix(wrong)
    assert cache.check_integrity().ok
