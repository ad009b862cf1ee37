"""What the parts of one cache share: settings, L1, own blocks, the tie to Redis, and the lock over the first two."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import redis

from distprefix.chunking import HASH_BYTES, Prompt, read_prompt
from distprefix.config import PrefixCacheConfig
from distprefix.errors import DistPrefixError, ForkedProcessError, InvalidInputError
from distprefix.feed import Feed
from distprefix.l1 import L1, Found, Node
from distprefix.operations import WINDOW, Usage
from distprefix.outbox import Outbox
from distprefix.own import OwnBlocks, UnnamedChains
from distprefix.redis.link import Link
from distprefix.reservations import Reservations

__all__ = ["State"]

_log = logging.getLogger("distprefix")
_BLIND_TTL_S = 1.0


class State:
    """One process's cache. Raises what opening a cache raises."""

    def __init__(self, config: PrefixCacheConfig, client: redis.Redis | None) -> None:
        self.config = config
        self.lock = threading.RLock()
        self.l1 = L1(config.chunk_size, config.max_run, config.l1_max_bytes, config.l1_ttl_s, config.hot_threshold)
        self.own = OwnBlocks(config.max_run, config.max_own_chunks)
        self.counts: Counter[str] = Counter()
        self.drops: Counter[str] = Counter()
        """Publishes that Redis did not take, by reason."""
        self.unpublished: Counter[str] = Counter()
        """Chunks that publishes left out, by what took too long."""
        self.usage: Usage | None = None
        """What the shard held after this process's last publish."""
        self.unusable = ""
        """Why nothing can be asked of this cache any more; empty while it can."""
        self.wake: Callable[[], object] = lambda: None
        """Has the background begin a round now."""
        self.link = Link(config, client)
        self.outbox = Outbox(self.link, config)
        self.feed = Feed(self.link, self.l1, self.lock, config.feed_interval_s)
        self.link.on_loss = _weakly(self._distrust_all)  # or an unfinished cache would keep its connections
        self.link.on_rekey = _weakly(self._forget_names)
        if config.feed_interval_s:
            self.feed.poll()  # to begin before L1 learns anything
        self.samples: deque[tuple[bytes, dict[str, int]]] = deque(maxlen=32)
        """Chains and who L1 said holds how much of them, to be checked against Redis."""
        self.guesses: deque[tuple[Node, int]] = deque(maxlen=32)
        """Where prompts ended, to be gone on from in the background."""
        self.unnamed = UnnamedChains()
        self.reservations = Reservations(self)
        self._warned_of_cut = False

    def _distrust_all(self) -> None:
        """The server has lost history: L1 asks again, and the background takes a new epoch now."""
        self.feed.distrust_all()
        self.wake()

    def _forget_names(self) -> None:
        """Chunks have other names from now on: whatever is remembered by name names nothing any more."""
        with self.lock:
            self.l1.clear()
            self.own.is_torn = True  # forgotten before the next publish, and before it is asked
            self.unnamed.clear()

    def find(self, prompt: Prompt, now: float) -> Found:
        """What L1 knows of a prompt, and how much of it may be trusted. Under the lock.

        With a feed that is not current, what is older than a second is not: nothing would have revoked it.
        """
        ttl_s = self.config.l1_ttl_s
        if self.config.feed_interval_s and not self.feed.is_current(now):
            ttl_s = min(ttl_s, _BLIND_TTL_S)
        return self.l1.find(prompt, now, ttl_s)

    def check_usable(self) -> None:
        """Raise ForkedProcessError or DistPrefixError when the cache is closed or belongs to another process."""
        if self.unusable:
            raise (ForkedProcessError() if self.unusable == "forked" else DistPrefixError(self.unusable))

    def read(self, token_ids: Any) -> Prompt:
        """A prompt with at least one token; a chain may be empty, as that of a prompt shorter than a chunk is.

        What `max_prefix_length` cuts is counted. Raises InvalidInputError.
        """
        self.check_usable()
        limit = self.config.max_prefix_length
        prompt = read_prompt(token_ids, self.config.chunk_size, limit)
        if not prompt.length and not prompt.is_chain:
            raise InvalidInputError("an empty prompt has no prefix: pass at least one token")
        if limit is not None and prompt.length > limit:
            self._count_cut(prompt, limit)
        return prompt

    def _count_cut(self, prompt: Prompt, limit: int) -> None:
        """Count the tokens of full chunks that the limit leaves out, and warn of the first."""
        size = self.config.chunk_size
        cut = (prompt.length // size - prompt.chunks) * size
        if not cut:
            return
        with self.lock:
            self.counts["tokens_cut"] += cut
            is_first = not self._warned_of_cut
            self._warned_of_cut = True
        if is_first:
            _log.warning(
                "max_prefix_length is %d, and a prompt has %d tokens: those that follow the limit are neither looked "
                "up nor published; raise the limit, or leave it out. Warned of once; tokens_cut counts them all",
                limit,
                prompt.length,
            )

    def chain(self, prompt: Prompt) -> bytes:
        """All of a prompt's chunk hashes, as far as L1 knows them without computing."""
        with self.lock:
            found = self.l1.find(prompt, time.monotonic())
        return self.hashes(prompt, found)

    def hashes(self, prompt: Prompt, found: Found, until: float = float("inf"), *, least: int = 0) -> bytes:
        """A prompt's chunk hashes: those that L1 knows, then computed ones, as far as `until` (time.monotonic).

        What was found is always in the answer, and so many chunks that follow it.
        """
        if prompt.is_chain:
            return bytes(prompt.view)
        with self.lock:
            known = self.l1.hashes(found.path, 0, found.chunks)
        if len(known) < found.chunks * HASH_BYTES:  # forgotten meanwhile
            known = b""
        hasher = self.link.hasher
        parts = [known]
        parent = known[-HASH_BYTES:] or hasher.root
        window = WINDOW * prompt.stride
        for at in range(len(known) // HASH_BYTES * prompt.stride, len(prompt.view), window):
            if time.monotonic() > until and at >= (found.chunks + least) * prompt.stride:
                break
            parts.append(hasher.chain(parent, prompt.view[at : at + window], prompt.stride))
            parent = parts[-1][-HASH_BYTES:]
        return b"".join(parts)


def _weakly(method: Callable[[], object]) -> Callable[[], object]:
    """What calls a method as long as its owner is there, and does not keep the owner."""
    reference = weakref.WeakMethod(method)

    def call() -> object:
        found = reference()
        return found() if found is not None else None

    return call
