"""Chunk hashes: chained, keyed in every chunk, and never the same for two namespaces, identities or salts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from itertools import combinations, product

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from distprefix.chunking import pack_extra, read_prompt
from distprefix.hashing import HASH_ALGORITHMS, HASH_BYTES, ChunkHasher, derive_key
from distprefix.identity import Identity, join_parts

KEY = bytes(range(32))
CHUNKS_KEY = hashlib.blake2b(b"chunks", digest_size=32, key=KEY).digest()

DIGESTS: dict[str, Callable[[bytes], bytes]] = {
    "blake2b": lambda data: hashlib.blake2b(data, digest_size=16, key=CHUNKS_KEY).digest(),
    "sha256": lambda data: hashlib.sha256(CHUNKS_KEY + data).digest()[:16],
    "xxh3_128": lambda data: xxhash.xxh3_128_digest(CHUNKS_KEY + data),
}


@pytest.mark.parametrize("algorithm", HASH_ALGORITHMS)
def test_hashes_are_chained(algorithm: str) -> None:
    """Each hash is of the key, its parent's and its chunk's bytes, so that hashing can go on anywhere."""
    digest = DIGESTS[algorithm]
    hasher = ChunkHasher(algorithm, KEY)
    data = bytes(range(48))
    first = digest(hasher.root + data[:16])
    second = digest(first + data[16:32])
    third = digest(second + data[32:])
    assert hasher.chain(hasher.root, memoryview(data), 16) == first + second + third
    assert hasher.chain(first, memoryview(data)[16:], 16) == second + third
    assert hasher.one(first + data[16:32]) == second


@pytest.mark.parametrize("algorithm", HASH_ALGORITHMS)
def test_extras_change_their_chunk_and_what_follows(algorithm: str) -> None:
    """What a chunk depends on besides tokens is part of its hash, at its place and in all that follows."""
    hasher = ChunkHasher(algorithm, KEY)
    plain = hasher.chain(hasher.root, bytes(64), 16)
    extra = hasher.chain(hasher.root, bytes(64), 16, {2: pack_extra("lora", "a")})
    assert extra[: 2 * HASH_BYTES] == plain[: 2 * HASH_BYTES]
    assert not {extra[at : at + HASH_BYTES] for at in (32, 48)} & {plain[at : at + HASH_BYTES] for at in (32, 48)}


@pytest.mark.parametrize("algorithm", HASH_ALGORITHMS)
def test_every_chunk_depends_on_the_key(algorithm: str) -> None:
    """With another key, and the same parent, every chunk at every depth has another hash."""
    parents = [bytes(16), b"p" * 16]
    for parent, tokens in product(parents, (bytes(16), b"t" * 16)):
        hashes = {ChunkHasher(algorithm, bytes([n]) * 32).one(parent + tokens) for n in range(50)}
        assert len(hashes) == 50


@pytest.mark.parametrize("algorithm", HASH_ALGORITHMS)
def test_engine_hashes_have_names_of_their_own(algorithm: str) -> None:
    """The name of an engine's hash depends on key and role, and is no chunk hash of the same bytes."""
    hasher = ChunkHasher(algorithm, KEY)
    engine = hashlib.sha256(b"block").digest()[:16]
    names = {
        hasher.name(engine),
        hasher.name(engine, b"alone"),
        hasher.one(engine),
        ChunkHasher(algorithm, bytes(32)).name(engine),
    }
    assert len(names) == 4
    assert hasher.names(engine + bytes(16)) == hasher.name(engine) + hasher.name(bytes(16))


def test_keys_differ_with_every_part() -> None:
    """Another secret, algorithm, namespace, identity or salt gives another key, root, check and context."""
    secrets = (b"s" * 32, b"t" * 32)
    algorithms = ("blake2b", "sha256")
    namespaces = ("a", "b")
    identities = (Identity(model="m").digest, Identity(model="n").digest)
    salts = (b"", Identity(salt="x").salts)
    keys = [derive_key(*parts) for parts in product(secrets, algorithms, namespaces, identities, salts)]
    assert len(set(keys)) == 32
    hashers = [ChunkHasher("blake2b", key) for key in keys]
    for shown in ("root", "check", "payload_context"):
        assert len({getattr(hasher, shown) for hasher in hashers}) == 32


def test_a_hasher_never_shows_its_key() -> None:
    """Neither its text nor its check has bytes of the key."""
    hasher = ChunkHasher("blake2b", KEY)
    assert KEY.hex() not in repr(hasher)
    assert hasher.check not in KEY.hex()


def test_chunks_that_differ_late_or_above_16_bits_differ() -> None:
    """Tokens above 65,535 are hashed in full: those equal modulo 65,536 have other hashes."""
    hasher = ChunkHasher("blake2b", KEY)
    hashes = {
        hasher.chain(hasher.root, read_prompt([1, token], 2, 10).view, 8)
        for token in (5, 5 + 65_536, 5 + 2**31, 2**32 - 1)
    }
    assert len(hashes) == 4


@given(st.lists(st.binary(max_size=6), max_size=4), st.lists(st.binary(max_size=6), max_size=4))
def test_joined_parts_are_unambiguous(one: list[bytes], other: list[bytes]) -> None:
    """Different lists of parts never give the same bytes, wherever one part ends and the next begins."""
    assert (join_parts(*one) == join_parts(*other)) == (one == other)


def test_salts_are_not_joined_ambiguously() -> None:
    """A tenant's salt and a request's salt that give the same text in a row are different secrets."""
    pairs = [("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"), ("ab\0c", ""), ("ab", "\0c")]
    identities = [Identity(salt=salt, request_salt=request) for salt, request in pairs]
    for one, other in combinations(identities, 2):
        assert one.salts != other.salts
        assert one.namespace("kv") != other.namespace("kv")


def test_an_identity_says_nothing_of_its_salts() -> None:
    """Neither its text, digest nor repr has a salt in it; the namespace's name and the tenant differ with it."""
    plain = Identity(model="m")
    salted = Identity(model="m", salt="S3cret", request_salt="r3quest")
    for shown in (salted.text, repr(salted), salted.namespace("kv"), salted.tenant):
        assert "S3cret" not in shown
        assert "r3quest" not in shown
    assert salted.digest == plain.digest
    assert salted.namespace("kv") != plain.namespace("kv")
    assert salted.tenant == Identity(model="another", salt="S3cret").tenant != ""
