"""From keys of single chunks, each with the token it ends at, back to chains from the root."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import NamedTuple

from distprefix.chunking import HASH_BYTES

__all__ = ["GROUP_BYTES", "KeyChains", "Run"]

GROUP_BYTES = 4
"""A key is a block hash and the number of its KV cache group, big-endian."""


class Run(NamedTuple):
    """Consecutive chunks of one group's chain."""

    group: int
    first: int
    """The chunk that it begins with."""
    chain: bytes
    """The hashes from the root to its last chunk, 16 bytes each."""
    keys: tuple[bytes, ...]
    rows: tuple[int, ...]
    """What was given with each key."""


class KeyChains:
    """The keys of one request, which grows. One thread learns; others may read meanwhile."""

    def __init__(self, chunk_tokens: Mapping[int, int]) -> None:
        """`chunk_tokens`: tokens of a chunk, for each group. Keys of other groups are in no chain."""
        self._chunk_tokens = chunk_tokens
        self._chains = dict.fromkeys(chunk_tokens, b"")
        self._ahead: dict[tuple[int, int], bytes] = {}
        """What is behind a gap, by group and chunk."""
        self._chunks: dict[bytes, int] = {}
        """The place of each key in its group's chain."""
        self._seen = 0

    def learn(self, positions: Mapping[bytes, int]) -> None:
        """Take in the keys that a mapping to their last tokens has got since it was last shown."""
        if len(positions) == self._seen:
            return
        fresh = list(islice(positions.items(), self._seen, None))
        self._seen = len(positions)
        groups: set[int] = set()
        for key, end in fresh:
            group = int.from_bytes(key[-GROUP_BYTES:], "big")
            size = self._chunk_tokens.get(group)
            if size and end > 0 and end % size == 0 and len(key) >= HASH_BYTES + GROUP_BYTES:
                self._ahead[group, end // size - 1] = key
                groups.add(group)
        for group in groups:
            self._extend(group)

    def chunk(self, key: bytes) -> int | None:
        """Which chunk of its group's chain a key is; None when it is not known from the root on."""
        return self._chunks.get(key)

    def chain(self, group: int, stop: int) -> bytes:
        """The leading hashes of a group's chain, 16 bytes each."""
        return self._chains[group][: stop * HASH_BYTES]

    def runs(self, keys: Iterable[bytes], rows: Iterable[int]) -> list[Run]:
        """Keys and what belongs to each as runs, in the order of their chains, leaving out those of no chain."""
        placed = sorted(
            (int.from_bytes(key[-GROUP_BYTES:], "big"), chunk, key, row)
            for key, row in zip(keys, rows, strict=True)
            if (chunk := self.chunk(key)) is not None
        )
        return [self._run(part) for part in _parts(placed)]

    def _run(self, part: Sequence[tuple[int, int, bytes, int]]) -> Run:
        group, first = part[0][:2]
        chain = self.chain(group, first + len(part))
        return Run(group, first, chain, tuple(each[2] for each in part), tuple(each[3] for each in part))

    def _extend(self, group: int) -> None:
        begin = len(self._chains[group]) // HASH_BYTES
        fresh: list[bytes] = []
        while (key := self._ahead.pop((group, begin + len(fresh)), None)) is not None:
            fresh.append(key)
        self._chains[group] += b"".join(key[:HASH_BYTES] for key in fresh)
        self._chunks.update((key, begin + at) for at, key in enumerate(fresh))


def _parts(placed: Sequence[tuple[int, int, bytes, int]]) -> Iterator[Sequence[tuple[int, int, bytes, int]]]:
    """Cut where a chunk does not follow the one before."""
    begin = 0
    for at in range(1, len(placed) + 1):
        if at == len(placed) or placed[at][0] != placed[at - 1][0] or placed[at][1] != placed[at - 1][1] + 1:
            yield placed[begin:at]
            begin = at
