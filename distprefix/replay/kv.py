"""Made-up KV bytes for every chunk: normally distributed bf16 values, about as hard to compress as real ones."""

from __future__ import annotations

import random
import time
from array import array
from collections.abc import Iterator
from typing import NamedTuple

from distprefix.chunking import Chain
from distprefix.optimizer import PrefixCacheOptimizer

__all__ = ["KvBytes", "Moved"]

_VALUES = 512 * 1024
_SHIFTS = 65_536
_AT_ONCE = 32 * 1024 * 1024


class Moved(NamedTuple):
    """What a request's payloads did."""

    loaded: int = 0
    """Chunks."""
    wrong: int = 0
    """Payloads that were not what was stored."""
    load_us: float = 0.0


class KvBytes:
    """Payloads of one size, the same in every process. Holds a buffer for every chunk of the longest prompt."""

    def __init__(self, size: int) -> None:
        self.size = size
        normal = random.Random(0)  # noqa: S311 - repeatable, not secret
        values = array("f", [normal.gauss(0.0, 1.0) for _ in range(min(_VALUES, (size + _SHIFTS) // 2))]).tobytes()
        some = bytearray(len(values) // 2)
        some[0::2], some[1::2] = values[2::4], values[3::4]
        self._source = memoryview(bytes(some) * ((size + _SHIFTS) // len(some) + 1))
        self._buffers: list[bytearray] = []

    def of(self, chunk: bytes) -> bytes:
        """A chunk's payload: begins with its hash as far as that fits."""
        start = 2 * int.from_bytes(chunk[:2], "little") % _SHIFTS
        return b"".join((chunk[: self.size], self._source[start : start + self.size - len(chunk[: self.size])]))

    def exchange(self, cache: PrefixCacheOptimizer, chain: Chain, own: int, hit: int) -> Moved:
        """Load what was hit beyond the node's own, into buffers as an engine does, check it, and store what is new."""
        while len(self._buffers) < hit - own:
            self._buffers.append(bytearray(self.size))
        loaded, load_us = 0, 0.0
        if hit > own:
            began = time.perf_counter_ns()
            loaded = cache.load(chain, self._buffers[: hit - own], first=own).chunks
            load_us = (time.perf_counter_ns() - began) / 1000
        wrong = sum(bytes(self._buffers[at]) != self.of(chain[own + at]) for at in range(loaded))
        for first, payloads in self._pieces(chain, own + loaded):
            cache.store(chain, [None] * first + payloads)
        return Moved(loaded, wrong, load_us)

    def _pieces(self, chain: Chain, first: int) -> Iterator[tuple[int, list[bytes]]]:
        step = max(1, _AT_ONCE // self.size)
        for at in range(first, len(chain), step):
            yield at, [self.of(chain[i]) for i in range(at, min(len(chain), at + step))]
