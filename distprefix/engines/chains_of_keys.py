"""What came before a key: engines that name a page alone are told its chain from what they named before. Pure."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterable

from distprefix.chunking import HASH_BYTES

__all__ = ["ChainsOfKeys", "chunk_hash", "packed"]

_ROOT = b""
_DIGEST_HEX = 64


class ChainsOfKeys:
    """Remembers the parents of so many keys, those used last. Thread-safe.

    A chain's leaves are forgotten before its root, so that what is known at all reaches the root where it can.
    """

    def __init__(self, most: int = 1_000_000) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._parents: OrderedDict[bytes, bytes] = OrderedDict()

    def __len__(self) -> int:
        return len(self._parents)

    def learn(self, chain: bytes, *, is_from_root: bool = True) -> None:
        """Remember a chain, 16 bytes a key. Where it only may begin at the root, a parent known already is kept."""
        with self._lock:
            parents = self._parents
            for at in range(len(chain) - HASH_BYTES, -1, -HASH_BYTES):
                key, parent = chain[at : at + HASH_BYTES], chain[max(0, at - HASH_BYTES) : at]
                if parent or is_from_root or key not in parents:
                    parents[key] = parent
                parents.move_to_end(key)
            while len(parents) > self._most:
                parents.popitem(last=False)

    def before(self, key: bytes) -> bytes | None:
        """The chain that ends before a key: empty at the root, None when it is not known."""
        found: dict[bytes, None] = {}
        with self._lock:
            parent = self._parents.get(key)
            while parent:
                if parent in found:
                    return None  # what was told goes round in a circle
                found[parent] = None
                parent = self._parents.get(parent)
        return None if parent is None else b"".join(reversed(found))

    def runs(self, keys: bytes, *, guess: bool = False) -> list[tuple[int, int]]:
        """Where keys in order begin and end to follow each other: a key goes on when the one before is its parent.

        With `guess` it also does when its parent is not known, and that is learned.
        """
        found: list[tuple[int, int]] = []
        with self._lock:
            last = None
            for at in range(0, len(keys), HASH_BYTES):
                key = keys[at : at + HASH_BYTES]
                parent, index = self._parents.get(key), at // HASH_BYTES
                if last is not None and (parent == last or (guess and parent is None)):
                    if parent is None:
                        self._parents[key] = last
                    found[-1] = (found[-1][0], index + 1)
                else:
                    found.append((index, index + 1))
                last = key
        return found

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._parents.clear()


def chunk_hash(key: str | bytes) -> bytes:
    """The 16 bytes that stand for an engine's key: the beginning of a SHA256, else a digest of all of it.

    A SHA256 with something behind it names something else than without, so that is part of the digest.
    """
    if isinstance(key, str):
        if len(key) == _DIGEST_HEX:
            try:
                return bytes.fromhex(key[: 2 * HASH_BYTES])
            except ValueError:
                pass
        key = key.encode()
    elif len(key) == _DIGEST_HEX // 2:
        return bytes(key[:HASH_BYTES])
    return hashlib.sha256(key).digest()[:HASH_BYTES]


def packed(keys: Iterable[str | bytes]) -> bytes:
    """A chain of keys, 16 bytes each."""
    return b"".join(map(chunk_hash, keys))
