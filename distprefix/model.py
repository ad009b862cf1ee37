"""What look-ups give back."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

from distprefix.chunking import Prompt
from distprefix.errors import InvalidInputError

if TYPE_CHECKING:
    from distprefix.reservations import Claim, Lease

__all__ = ["CacheHitResult", "CacheTier", "Holder", "PrefixEntry"]


class CacheTier(StrEnum):
    """Where a prefix was found."""

    HOT = "hot"
    """In this process (L1)."""
    WARM = "warm"
    """In Redis (L2)."""
    COLD = "cold"
    """Compressed, in Redis or on a cheaper endpoint (L3)."""


class Holder(NamedTuple):
    """Who holds how many leading chunks of the prompt that was asked for."""

    name: str
    """``worker/rank@medium``, or a shared tier such as ``@warm``."""
    chunks: int

    @property
    def worker(self) -> str:
        """The worker's id; empty for a shared tier."""
        return self.name.partition("@")[0].partition("/")[0]

    @property
    def medium(self) -> str:
        """What the KV lies in: ``gpu``, ``cpu``, ``warm``, ..."""
        return self.name.rpartition("@")[2]


@dataclass(slots=True)
class PrefixEntry:
    """The deepest radix node that a look-up matched, and the prefix that ends there."""

    prefix_hash: str
    """Chunk hash of the last matched chunk, in hex. Names the whole prefix."""
    num_tokens: int
    block_ids: tuple[int, ...]
    """This worker's block ids for the leading chunks; empty when another worker holds them."""
    tier: CacheTier
    access_count: int
    """Hits of the node, cluster-wide, as of the last time Redis was asked."""
    created_at: float
    """Seconds since the epoch."""
    last_access: float
    """Seconds since the epoch."""
    metadata: Mapping[str, Any] | None = None
    _on_touch: Callable[[], None] | None = field(default=None, repr=False, compare=False)

    def touch(self) -> None:
        """Count one more use, now; Redis hears of it with the next batch. No Redis call."""
        self.access_count += 1
        self.last_access = time.time()
        if self._on_touch is not None:
            self._on_touch()

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it keeps its values; touching it then counts in it alone."""
        return PrefixEntry, (
            self.prefix_hash,
            self.num_tokens,
            self.block_ids,
            self.tier,
            self.access_count,
            self.created_at,
            self.last_access,
            self.metadata,
        )

    def __copy__(self) -> PrefixEntry:
        return replace(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> PrefixEntry:
        return replace(self, metadata=deepcopy(self.metadata, memo))


class Reserving(Protocol):
    """Where leases and claims of a result come from."""

    def lease(self, prompt: Prompt, chunks: int, ttl_s: float) -> Lease:
        """Protect the prompt's leading chunks."""
        ...

    def claim(self, prompt: Prompt, result: CacheHitResult, ttl_s: float) -> Claim:
        """Announce what the result leaves to compute."""
        ...


@dataclass(frozen=True, slots=True)
class CacheHitResult:
    """The longest prefix of a prompt that a live worker or a shared tier holds.

    Pickled, it keeps its values, the prompt among them, and loses its tie to the cache: `lease`, `claim` and `again`
    then raise InvalidInputError. A copy in the same process keeps both.
    """

    hit: bool
    matched_tokens: int
    matched_chunks: int
    tier: CacheTier | None
    holders: tuple[Holder, ...]
    """Longest first."""
    lookup_time_us: float
    l1_chunks: int = 0
    """How many of the matched chunks L1 answered for."""
    redis_calls: int = 0
    _make_entry: Callable[[tuple[int, ...]], PrefixEntry] | None = field(default=None, repr=False, compare=False)
    _entry: PrefixEntry | None = field(default=None, init=False, repr=False, compare=False)
    _make_blocks: Callable[[], tuple[int, ...]] | None = field(default=None, repr=False, compare=False)
    _blocks: tuple[int, ...] | None = field(default=None, init=False, repr=False, compare=False)
    _reservations: Reserving | None = field(default=None, repr=False, compare=False)
    _prompt: Prompt | None = field(default=None, repr=False, compare=False)
    _again: Callable[[], CacheHitResult] | None = field(default=None, repr=False, compare=False)

    def __bool__(self) -> bool:
        """Whether it is a hit."""
        return self.hit

    @property
    def block_ids(self) -> tuple[int, ...]:
        """Block ids of the matched chunks, in order, as far as the worker that was asked for (this one) has them.

        This worker's own are read when first asked for: what it has removed since the look-up is not among them.
        """
        if self._blocks is None:
            object.__setattr__(self, "_blocks", self._make_blocks() if self._make_blocks is not None else ())
        return cast("tuple[int, ...]", self._blocks)

    @property
    def entry(self) -> PrefixEntry | None:
        """What is known of the matched prefix; None for a miss. Made when asked for, then the same each time."""
        if self._entry is None and self._make_entry is not None:
            object.__setattr__(self, "_entry", self._make_entry(self.block_ids))
        return self._entry

    @property
    def prompt(self) -> Any:
        """What was asked for, as it was given."""
        return self._prompt.tokens if self._prompt is not None else ()

    @property
    def remaining_tokens(self) -> Any:
        """What is left to compute: a slice of the prompt as it was given, made when asked for.

        NumPy arrays and memoryviews give views; bytes give bytes, four a token; chains give the chunks left.
        """
        return self._prompt.tokens[self.matched_chunks * self._prompt.unit :] if self._prompt is not None else ()

    def lease(self, ttl_s: float = 30.0) -> Lease:
        """Protect the matched prefix from eviction, for everybody, until `ttl_s` passed or it is released.

        A context manager. One Redis call. Never raises on Redis failing: `chunks` of the lease says what is protected.
        """
        reservations, prompt = self._made_by()
        return reservations.lease(prompt, self.matched_chunks, ttl_s)

    def claim(self, ttl_s: float = 5.0) -> Claim:
        """Announce that this worker computes what is missing, or learn who announced it before. Advisory.

        Publishing the missing chunk ends it. One Redis call. Never raises on Redis failing: the claim is yours then.
        """
        reservations, prompt = self._made_by()
        return reservations.claim(prompt, self, ttl_s)

    def again(self) -> CacheHitResult:
        """Look the same prompt up again, with the same limit. Redis calls as a look-up."""
        if self._again is None:
            raise InvalidInputError(_UNTIED)
        return self._again()

    def __reduce__(self) -> tuple[Any, ...]:
        values = {name: getattr(self, name) for name in _VALUES}
        return _restored, (values, self.block_ids, self.entry, self._prompt)

    def __copy__(self) -> CacheHitResult:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> CacheHitResult:
        restore, parts = self.__reduce__()
        copied = restore(*deepcopy(parts, memo))
        object.__setattr__(copied, "_reservations", self._reservations)
        object.__setattr__(copied, "_again", self._again)
        return copied

    def _made_by(self) -> tuple[Reserving, Prompt]:
        if self._reservations is None or self._prompt is None:
            raise InvalidInputError(_UNTIED)
        return self._reservations, self._prompt


_VALUES = tuple(spec.name for spec in fields(CacheHitResult) if not spec.name.startswith("_"))
_UNTIED = (
    "this result has no tie to a cache, since it was pickled or made by hand: look its prompt up again, "
    "with cache.find_longest_cache_hit(result.prompt)"
)


def _restored(
    values: dict[str, Any], blocks: tuple[int, ...], entry: PrefixEntry | None, prompt: Prompt | None
) -> CacheHitResult:
    """A result that was pickled."""
    result = CacheHitResult(**values, _prompt=prompt)
    object.__setattr__(result, "_blocks", blocks)
    object.__setattr__(result, "_entry", entry)
    return result
