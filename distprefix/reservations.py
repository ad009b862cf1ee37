"""Leases, which keep a matched prefix from eviction, and claims, which say who computes a missing one.

Both live in Redis and end by its clock, whatever becomes of who took them.
"""

from __future__ import annotations

import itertools
import secrets
import time
import weakref
from typing import TYPE_CHECKING, NoReturn, Self

from distprefix import operations
from distprefix.chunking import HASH_BYTES, Prompt
from distprefix.errors import DistPrefixError, InvalidInputError
from distprefix.operations import Claimed

if TYPE_CHECKING:
    from distprefix.model import CacheHitResult
    from distprefix.state import State

__all__ = ["Claim", "Lease", "Reservations"]

_LONGEST_S = 86_400.0
_FOR_EVER_S = 100 * 365 * 86_400.0
_FIRST_POLL_S, _LONGEST_POLL_S = 0.01, 0.2


class Lease:
    """A prefix that stays. A context manager; releasing it twice is harmless."""

    def __init__(self, owner: Reservations, prompt: Prompt, ttl_s: float) -> None:
        self.chunks = 0
        """Leading chunks that are protected; fewer than were asked for when some are gone."""
        self._owner = owner
        self._prompt = prompt
        self._name = owner.new_name()
        self._ends = 0.0
        self.renew(ttl_s)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a lease cannot be pickled or copied: it is renewed and released by the process that took it. Where the "
            "prefix is used, look the prompt up in a cache of that process, and lease the result"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    @property
    def active(self) -> bool:
        """Whether it protects all that was asked for, as far as this process's clock can tell."""
        return self.chunks == self._prompt.chunks and time.monotonic() < self._ends

    def renew(self, ttl_s: float) -> bool:
        """Let it last for `ttl_s` from now. Returns whether all that was asked for is protected. One Redis call."""
        began = time.monotonic()
        self.chunks = self._owner.mark(self._prompt, self._name, _checked(ttl_s))
        self._ends = began + ttl_s if self.chunks else 0.0
        return self.active

    def protect_again(self) -> None:
        """Let it last as long as it would have: the server may have lost it. One Redis call."""
        left = self._ends - time.monotonic()
        if left > 0:
            self.chunks = self._owner.mark(self._prompt, self._name, left)

    def release(self) -> None:
        """End it. One Redis call; when Redis fails, the lease ends by itself."""
        if self._ends:
            self._ends = 0.0
            self._owner.mark(self._prompt, self._name, 0.0)


class Claim:
    """Who computes the first chunk that a look-up did not find."""

    def __init__(self, owner: Reservations, prompt: Prompt, result: CacheHitResult, ttl_s: float) -> None:
        self._owner = owner
        self._prompt = prompt
        self._result = result
        self._ttl_s = ttl_s
        self._depth = result.matched_chunks
        self._claimed = owner.ask(prompt, self._depth, ttl_s)

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a claim cannot be pickled or copied: it is of the worker that made it. Where the prompt is computed, look "
            "it up in a cache of that process, and claim the result"
        )

    @property
    def mine(self) -> bool:
        """Whether this worker is to compute it: nobody else said so before, or Redis could not be asked."""
        return self._claimed.worker in ("", self._owner.worker)

    @property
    def worker(self) -> str:
        """Who computes it."""
        return self._claimed.worker or self._owner.worker

    @property
    def since(self) -> float:
        """Since when, in seconds since the epoch by the server's clock."""
        return self._claimed.since_ms / 1000

    def wait(self, timeout_s: float) -> CacheHitResult:
        """Wait until more of the prompt is there, or the claim has ended and is ours, at most `timeout_s`.

        Returns the last look-up's result. Two Redis calls a poll, every 10 ms at first and every 200 ms later.
        """
        deadline, pause = time.monotonic() + timeout_s, _FIRST_POLL_S
        while True:
            result = self._result.again()
            if result.matched_chunks > self._result.matched_chunks or self.mine:
                return result
            self._depth = min(self._depth, result.matched_chunks)  # some of what was there is gone
            self._claimed = self._owner.ask(self._prompt, self._depth, self._ttl_s)
            left = deadline - time.monotonic()
            if left <= 0:
                return result
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_POLL_S)

    def release(self) -> None:
        """Take it back, if it is this worker's. One Redis call."""
        if self.mine:
            self._owner.ask(self._prompt, self._depth, 0.0)


class Reservations:
    """What this process has leased and claimed. Thread-safe."""

    def __init__(self, state: State) -> None:
        self.worker = state.config.worker_id
        self._state = state
        self._prefix, self._numbers = secrets.token_hex(4), itertools.count()
        self._leases: weakref.WeakSet[Lease] = weakref.WeakSet()
        self._claims: dict[bytes, tuple[int, float]] = {}
        """Chunk to its depth, and when the claim ends on the monotonic clock."""

    @property
    def claims(self) -> int:
        """Missing chunks that this process said it computes, and has not published."""
        self._drop_ended()
        return len(self._claims)

    def new_name(self) -> str:
        """A name that no other lease has."""
        return f"{self.worker}:{self._prefix}:{next(self._numbers)}"

    def active(self) -> list[Lease]:
        """The leases that last yet."""
        with self._state.lock:
            return [lease for lease in self._leases if lease.active]

    def pin(self, prompt: Prompt, *, keep: bool) -> int:
        """Keep a prompt's chunks from eviction until that is taken back. Returns how many are there."""
        return self.mark(prompt, "pin", _FOR_EVER_S if keep else 0.0)

    def lease(self, prompt: Prompt, chunks: int, ttl_s: float) -> Lease:
        """See `CacheHitResult.lease`."""
        self._state.counts["leases"] += 1
        lease = Lease(self, prompt.leading(chunks), _checked(ttl_s))
        with self._state.lock:
            self._leases.add(lease)
        return lease

    def mark(self, prompt: Prompt, name: str, ttl_s: float) -> int:
        """Write or remove a lease. Returns how many leading chunks it protects."""
        state = self._state
        state.check_usable()
        if not prompt.chunks:
            return 0
        with state.lock:
            found = state.l1.find(prompt, time.monotonic())
        if found.chunks < prompt.chunks:
            prompt.check_chain()
        hashes, start = state.hashes(prompt, found), found.resume
        try:
            if found.chunks < prompt.chunks:  # L1 does not know the way: it is walked again
                views = state.link.publish(operations.walk(hashes, 0))
                start = views[-1].start if views else 0
            operation = operations.lease(hashes[start * HASH_BYTES :], name, int(ttl_s * 1000))
            chunks = state.link.publish(operation)[0]
        except DistPrefixError:
            chunks = 0
        state.counts["leases_failed"] += ttl_s > 0 and start + chunks < prompt.chunks
        return start + chunks if chunks else 0

    def claim(self, prompt: Prompt, result: CacheHitResult, ttl_s: float) -> Claim:
        """See `CacheHitResult.claim`."""
        self._state.counts["claims"] += 1
        claim = Claim(self, prompt, result, _checked(ttl_s))
        self._state.counts["claims_lost"] += not claim.mine
        return claim

    def ask(self, prompt: Prompt, missing: int, ttl_s: float) -> Claimed:
        """Claim the chunk at depth `missing`, or give it back. An empty worker when there is none, or Redis failed."""
        self._state.check_usable()
        if missing >= prompt.chunks:
            return Claimed("", 0, 0)
        prompt.leading(missing + 1).check_chain()
        chunk = self._hash_at(prompt, missing)
        try:
            claimed = self._state.link.publish(operations.claim(chunk, self.worker, int(ttl_s * 1000)))
        except DistPrefixError:
            return Claimed("", 0, 0)
        self._drop_ended()
        if claimed.worker == self.worker:
            self._claims[chunk] = (missing, time.monotonic() + ttl_s)
        else:
            self._claims.pop(chunk, None)
        return claimed

    def fulfil(self, hashes: bytes) -> None:
        """A chain was published: claims on its chunks have served. One Redis call each."""
        self._drop_ended()
        for chunk, (depth, _) in list(self._claims.items()):
            if hashes[depth * HASH_BYTES : (depth + 1) * HASH_BYTES] == chunk:
                self._claims.pop(chunk, None)
                try:
                    self._state.link.publish(operations.claim(chunk, self.worker, 0))
                except DistPrefixError:
                    continue  # it ends by itself

    def _drop_ended(self) -> None:
        now = time.monotonic()
        for chunk, (_, ends) in list(self._claims.items()):
            if ends < now:
                self._claims.pop(chunk, None)

    def _hash_at(self, prompt: Prompt, depth: int) -> bytes:
        cut = prompt.leading(depth + 1)
        with self._state.lock:
            found = self._state.l1.find(cut, time.monotonic())
        return self._state.hashes(cut, found)[-HASH_BYTES:]


def _checked(ttl_s: float) -> float:
    if not isinstance(ttl_s, int | float) or not 0.001 <= ttl_s <= _LONGEST_S:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidInputError(f"ttl_s is {ttl_s!r}: it must lie between 0.001 and {_LONGEST_S:.0f} seconds")
    return ttl_s
