"""Names of chunks: keyed, chained hashes. Pure: no Redis, no clock.

A chunk's hash is H(key, parent's hash, the chunk's tokens as little-endian uint32, what else its content depends on),
16 bytes long. The parent of a prompt's first chunk is the key's root. Equal hashes therefore mean equal tokens from
position 0 on, in one namespace under one salt; without the key nobody makes or confirms a hash, at any depth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from struct import iter_unpack

import xxhash

from distprefix.identity import join_parts

__all__ = ["HASH_ALGORITHMS", "HASH_BYTES", "ChunkHasher", "derive_key"]

HASH_BYTES = 16
_KEY_BYTES = 32
_Functions = tuple[Callable[[bytes], bytes], Callable[[bytes, Iterable[tuple[bytes]]], bytes]]


class ChunkHasher:
    """Makes the chunk hashes of one key. Safe to share between threads; never shows the key.

    blake2b is the keyed mode of RFC 7693. sha256 hashes the key before the rest and is cut to half its length, so no
    hash can be extended. xxh3_128 does the same and is no cryptographic hash: other tokens with the same hash can be
    computed in minutes.
    """

    __slots__ = ("_chain", "_named", "_update", "algorithm", "check", "payload_context", "root")

    def __init__(self, algorithm: str, key: bytes) -> None:
        """`key`: 32 bytes, as `derive_key` gives."""
        self.algorithm = algorithm
        keyed = _ALGORITHMS[algorithm]
        self._update, self._chain = keyed(_subkey(key, b"chunks"))
        self._named, _ = keyed(_subkey(key, b"engine names"))
        self.root = _subkey(key, b"root")[:HASH_BYTES]
        """What stands for the parent of first chunks."""
        self.check = _subkey(key, b"check")[:8].hex()
        """16 hex digits that tell keys apart and show nothing of them."""
        self.payload_context = _subkey(key, b"payloads")[:HASH_BYTES]
        """What payloads are bound to: the namespace, its identity, the salt."""

    def __repr__(self) -> str:
        return f"<ChunkHasher by {self.algorithm}, check {self.check}>"

    def one(self, data: bytes) -> bytes:
        """The hash of one chunk: `data` is its parent's hash, its tokens and what else it depends on, in a row."""
        return self._update(data)

    def chain(
        self, parent: bytes, tokens: memoryview | bytes, stride: int, extras: Mapping[int, bytes] | None = None
    ) -> bytes:
        """Hash full chunks in order, each on top of the one before; 16 bytes a chunk, `parent` is before the first.

        `stride`: bytes a chunk. `extras`: what chunks depend on besides, by their place (`pack_extra`).
        """
        if not extras:
            return self._chain(parent, iter_unpack(f"{stride}s", tokens))
        update = self._update
        hashes: list[bytes] = []
        for i, (chunk,) in enumerate(iter_unpack(f"{stride}s", tokens)):
            parent = update(parent + chunk + extras.get(i, b""))
            hashes.append(parent)
        return b"".join(hashes)

    def name(self, engine_hash: bytes, kind: bytes = b"") -> bytes:
        """The chunk hash that stands for an engine's own hash of 16 bytes: unkeyed, that would confirm guesses.

        `kind`: another one stands for the same chunk in another role.
        """
        return self._named(engine_hash + kind)

    def names(self, engine_hashes: bytes) -> bytes:
        """As `name` for a chain of them, 16 bytes each."""
        named = self._named
        return b"".join([named(each) for (each,) in iter_unpack(f"{HASH_BYTES}s", engine_hashes)])


def derive_key(secret: bytes, algorithm: str, namespace: str, identity: bytes, salts: bytes) -> bytes:
    """The key of a namespace's chunk hashes under some salts, 32 bytes; `identity`: `Identity.digest`."""
    parts = join_parts(b"distprefix key 1", algorithm.encode(), namespace.encode(), identity, salts)
    return hashlib.blake2b(parts, digest_size=_KEY_BYTES, key=hashlib.sha512(secret).digest()).digest()


def _subkey(key: bytes, purpose: bytes) -> bytes:
    return hashlib.blake2b(purpose, digest_size=_KEY_BYTES, key=key).digest()


def _blake2b(key: bytes) -> _Functions:
    copy = hashlib.blake2b(digest_size=HASH_BYTES, key=key).copy  # the key's own block is hashed once

    def update(data: bytes) -> bytes:
        state = copy()
        state.update(data)
        return state.digest()

    def chain(parent: bytes, chunks: Iterable[tuple[bytes]]) -> bytes:
        # The loop of `_in_turn` with `update` in it: a call for each chunk would take a sixth of the time.
        hashes: list[bytes] = []
        append = hashes.append
        for (chunk,) in chunks:
            state = copy()
            state.update(parent + chunk)
            parent = state.digest()
            append(parent)
        return b"".join(hashes)

    return update, chain


def _sha256(key: bytes) -> _Functions:
    sha256 = hashlib.sha256
    return _in_turn(lambda data: sha256(key + data).digest()[:HASH_BYTES])


def _xxh3_128(key: bytes) -> _Functions:
    digest = xxhash.xxh3_128_digest
    return _in_turn(lambda data: digest(key + data))


def _in_turn(update: Callable[[bytes], bytes]) -> _Functions:
    def chain(parent: bytes, chunks: Iterable[tuple[bytes]]) -> bytes:
        hashes: list[bytes] = []
        for (chunk,) in chunks:
            parent = update(parent + chunk)
            hashes.append(parent)
        return b"".join(hashes)

    return update, chain


_ALGORITHMS: dict[str, Callable[[bytes], _Functions]] = {
    "blake2b": _blake2b,
    "sha256": _sha256,
    "xxh3_128": _xxh3_128,
}
"""What each algorithm makes of a key: the hash of one chunk, and of chunks in a row."""
HASH_ALGORITHMS = tuple(_ALGORITHMS)
"""Names of algorithms, the default first."""
