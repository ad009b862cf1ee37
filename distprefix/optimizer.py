"""The façade: what a program calls. L1 answers first, Redis is asked for the rest, nothing gets in the way."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
import weakref
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn, Self

import redis

from distprefix.background import Background
from distprefix.budget import maintain
from distprefix.chunking import Chain, pack_block_ids, prompt_extras, read_items, read_pairs
from distprefix.config import SHORTEST_LEASE_S, PrefixCacheConfig
from distprefix.errors import ConfigError, InvalidInputError
from distprefix.health import Health, health_of
from distprefix.lookup import look_up, own_blocks, touch
from distprefix.metrics import metrics_of
from distprefix.model import CacheHitResult, PrefixEntry
from distprefix.operations import Evicted, Swept
from distprefix.prewarm import Prewarmed, candidates, prewarm
from distprefix.publisher import Publisher
from distprefix.redis.integrity import Report, check_integrity
from distprefix.redis.roster import Member, WorkerInfo, read_members
from distprefix.redis.transfers import Buffer
from distprefix.redis.workers import retire_worker
from distprefix.reservations import Lease
from distprefix.state import State
from distprefix.tiers.loading import Loaded, asked_of, load
from distprefix.tiers.storing import store
from distprefix.tiers.tiers import Tiers
from distprefix.upkeep import Upkeep

__all__ = ["PrefixCacheOptimizer"]

_log = logging.getLogger("distprefix")
_REGISTER_TIMEOUT_S = 5.0

_open: weakref.WeakSet[PrefixCacheOptimizer] = weakref.WeakSet()


class PrefixCacheOptimizer:
    """A node's view of the cluster's prefix cache. Thread-safe; after a fork the child must open its own.

    Opening attaches to the namespace and takes an epoch: coverage that this worker id published before counts no more.
    That needs Redis; afterwards Redis may be slow or gone at any time, and look-ups become misses.
    Raises ConfigError, NamespaceError, EmbeddedServerError or UnavailableError when it cannot be opened.
    """

    def __init__(self, config: PrefixCacheConfig | None = None, *, client: redis.Redis | None = None) -> None:
        config = config or PrefixCacheConfig()
        if not isinstance(config, PrefixCacheConfig):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"config is {type(config).__name__}: pass a PrefixCacheConfig")
        self.config = config = config.with_worker_id()
        self._state = State(config, client)
        self._closing = threading.RLock()
        self._is_closed = False
        self._background: Background | None = None
        try:
            self._publisher = Publisher(self._state)
            self._tiers = Tiers(self._state)
            if config.prewarm_on_start and config.enable_prewarm:
                self.prewarm()
            self._state.relief.enroll(time.monotonic() + _REGISTER_TIMEOUT_S)
            self._upkeep = Upkeep(self._state, self._tiers, self._publisher)
            self._begin_background()
            _open.add(self)
        except BaseException:  # interrupted: nobody will close it
            self._state.link.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        where, epoch = self.config.namespace, self._state.link.epoch
        return f"<PrefixCacheOptimizer {self.config.holder} in {where!r}, epoch {epoch}>"

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a cache cannot be pickled or copied: pickle cache.config, and open another with it, "
            "PrefixCacheOptimizer(replace(config, url=cache.url, worker_id=...)), under a worker_id of its own"
        )

    @property
    def url(self) -> str:
        """Where the shared tree is; a private server's socket too."""
        return self._state.link.url

    # Look up

    def find_longest_cache_hit(
        self, token_ids: Any, *, max_cache_hit_length: int | None = None, blocks_of: str | None = None
    ) -> CacheHitResult:
        """The longest prefix of a prompt that some live holder has, in whole chunks.

        `max_cache_hit_length`: the most tokens to match, of bytes and chains too. Engines have to compute one token at
        least: with the prompt's tokens less one, `remaining_tokens` is never empty. None: a prompt may match whole.
        `blocks_of` names a holder whose block ids are wanted, and asks Redis for them; by default this worker's own.
        Redis calls: 0 when L1 answers, else 1 for every 4,096 chunks and for about 120 nodes. Redis failing gives a
        miss, or what L1 has.
        Raises InvalidInputError for what is no prompt, and what went wrong with Redis only when `strict`.
        """
        return look_up(self._state, token_ids, blocks_of, max_cache_hit_length)

    def get_computed_blocks(self, token_ids: Any, *, max_cache_hit_length: int | None = None) -> list[int]:
        """This worker's own block ids for the leading chunks that it holds itself. No Redis call.

        `max_cache_hit_length` as for `find_longest_cache_hit`.
        """
        prompt = self._state.read(token_ids).within(max_cache_hit_length, self.config.chunk_size)
        blocks = own_blocks(self._state, prompt, prompt.chunks)
        if blocks:
            touch(self._state, prompt, len(blocks))
        return list(blocks)

    def get_prewarm_candidates(self, limit: int = 10) -> list[PrefixEntry]:
        """The nodes with at least `prewarm_threshold` hits in the whole cluster, most hits first.

        One Redis call; when Redis fails, those that this process knows. Hits count once they were flushed.
        """
        self._state.check_usable()
        return candidates(self._state, limit) if self.config.enable_prewarm else []

    def chain_of(
        self,
        token_ids: Any,
        *,
        lora_name: str | None = None,
        cache_salt: str | None = None,
        extras: Mapping[int, bytes] | None = None,
    ) -> Chain:
        """A prompt whose KV depends on more than its tokens, to be looked up or published. No Redis call.

        `extras`: what else, by chunk, each made with `pack_extra`: ``("mm", identifier, offset)`` for an image, as
        engines tell it, in the first chunk of the engine's block. Without any of these it is the plain prompt's chain.
        """
        prompt = self._state.read(token_ids)
        if prompt.is_chain:
            raise InvalidInputError("a chain has its LoRA and salt in it already: pass tokens")
        every = prompt_extras(lora_name, cache_salt, extras)
        hasher = self._state.link.hasher
        return Chain.packed(hasher.chain(hasher.root, prompt.view, prompt.stride, every))

    def chain_of_hashes(self, hashes: bytes, role: bytes = b"") -> Chain:
        """The chain that stands for an engine's own block hashes, 16 bytes each, in a row. No Redis call.

        Chunks so named can be guessed by nobody who has not the namespace's key; unlike the engine's hashes, which a
        `Chain` of them would show in Redis. `role`: the same hashes stand for other chunks in another role.
        """
        hasher = self._state.link.hasher
        return Chain.packed(hasher.name(hashes, role) if role else hasher.names(hashes))

    # Publish

    def cache_prefix(
        self, token_ids: Any, block_ids: Iterable[int] | None = None, metadata: Mapping[str, Any] | None = None
    ) -> str:
        """Say that this worker has the KV of a prompt's full chunks. Returns the prefix's hash (hex).

        A prompt without a full chunk, or of less than `min_prefix_length` tokens, is not published, which is counted:
        the hash is then empty.
        `block_ids`: one a full chunk. `metadata`: up to 4 KiB as msgpack; who matches just this prompt gets it.
        Redis calls: 1 for every 4,096 chunks that this worker has not just published, and for about 60 nodes. When
        Redis fails, this process knows the prefix, the others do not, and it is counted as dropped. Raises
        InvalidInputError, and when `strict` what went wrong with Redis.
        Of a prompt that does not fit `publish_timeout_s` the leading part is published, also when `strict`: it is
        counted as cut, and the next publish of the prompt goes on from there. The hash is then that of what was hashed.
        """
        return self._publisher.publish_tokens(token_ids, block_ids, metadata)

    def update_prefix_state(self, prefix_hash: str, new_block_ids: Iterable[int]) -> bool:
        """The KV of a prefix that this process published lies in other blocks now. Redis calls as `cache_prefix`.

        False when the hash names nothing that this process still knows.
        """
        self._state.check_usable()
        chunks = self._publisher.chunks_of(prefix_hash)
        if new_block_ids is None or not chunks:  # pyright: ignore[reportUnnecessaryComparison]
            pack_block_ids(new_block_ids, None)  # raises for None
            return False
        return self._publisher.move_blocks(prefix_hash, pack_block_ids(new_block_ids, chunks))

    def remove_skipped_blocks(self, block_ids: Iterable[int]) -> int:
        """This worker no longer has these blocks: no look-up counts on them, or on what lies behind them, any more.

        Returns how many of them it had; what lay behind them is forgotten with them. Redis calls: one for every branch
        that lost its blocks; the cost is in proportion to the blocks named, not to the cache. When Redis fails, or the
        deadline of a publish passes, the rest is kept and sent later, before anything else is published.
        """
        self._state.check_usable()
        return self._publisher.remove_blocks(array("I", pack_block_ids(block_ids, None)))

    def clear(self) -> None:
        """Empty the namespace, for everybody, and forget everything here. One Redis call for every 500 nodes.

        Raises UnavailableError when Redis fails.
        """
        self._state.check_usable()
        self._publisher.clear()

    # Payloads

    def store(self, token_ids: Any, payloads: Sequence[Buffer | None]) -> int:
        """Keep the KV bytes of a prompt's leading chunks in Redis, for everybody. Returns how many it has there now.

        `payloads`: one buffer a chunk, 1 byte to 512 MiB, in the engine's own layout; None for what is there already. A
        chunk behind one that is not there is not stored. The bytes go first, over connections of their own; then
        one script says that they are there. What was never told of goes by itself.
        Redis calls: a walk, a SET for every 8 MiB of what is not there yet, and 1 for every 512 chunks or about 30
        nodes. When Redis fails, what was stored until then stays, and it is counted. Raises InvalidInputError for what
        does not fit.
        """
        return self.store_batch([(token_ids, payloads)])[0]

    def store_batch(self, prompts: Iterable[tuple[Any, Sequence[Buffer | None]]]) -> list[int]:
        """As `store` for each of several prompts, with their payloads; what they share is written once."""
        pairs = read_pairs(prompts, "payloads")
        wanted = [(self._state.read(token_ids), payloads) for token_ids, payloads in pairs]
        return store(self._tiers.payloads, wanted)

    def load(
        self,
        token_ids: Any,
        into: Sequence[Buffer] | None = None,
        *,
        first: int = 0,
        most: int | None = None,
        was_looked_up: bool = False,
    ) -> Loaded:
        """The KV bytes of a prompt's leading chunks, as far as they are stored and good; of a look-up's result as well.

        `first`: leading chunks that the caller has itself, such as in its GPU; `most`: chunk to end before.
        `into`: writable buffers, one a chunk wanted, filled without a copy where the payload is stored raw. Every
        payload is verified. The first that is missing, short or damaged ends the hit; the tree is told, and it is
        counted. What the buffers behind it hold then is undefined.
        A load is a use, and a hit of the nodes it passes. One that follows a look-up is the same use: of a look-up's
        result, or with `was_looked_up`, it adds no second hit.
        Redis calls: a walk, and a GET for every 8 MiB. Never raises on Redis failing: the result says what came.
        Raises InvalidInputError when a buffer has another size than its payload.
        """
        asked = asked_of(self._state, token_ids, into, first, most, was_looked_up=was_looked_up)
        return load(self._tiers.payloads, [asked], requests=1)[0]

    def load_batch(
        self,
        prompts: Iterable[tuple[Any, Sequence[Buffer] | None]],
        *,
        as_one: bool = False,
        continues: bool = False,
        was_looked_up: bool = False,
    ) -> list[Loaded]:
        """As `load` for each of several prompts, or look-ups' results, with what to load into; read together.

        `as_one`: they are parts of one request, which counts as one load. `continues`: of a request whose first load
        was counted already.
        """
        pairs = read_pairs(prompts, "buffers")
        state = self._state
        asked = [asked_of(state, token_ids, into, 0, None, was_looked_up=was_looked_up) for token_ids, into in pairs]
        requests = min(1, len(asked)) if as_one else len(asked)
        return load(self._tiers.payloads, asked, requests=0 if continues else requests)

    def find_stored(self, token_ids: Any, *, is_counted: bool = True) -> int:
        """How many leading chunks of a prompt have payloads, in either tier.

        One Redis call for 4,096 chunks, and for about 300 nodes.
        It is a use of what is found, and counts as a look-up in `get_metrics`. Not `is_counted`: the caller knows later
        how much of it is of use, and says so with `count_lookup`.
        0 when Redis fails, which is counted as a failed look-up. Raises what went wrong when `strict`.
        """
        return self.find_stored_batch([token_ids], is_counted=is_counted)[0]

    def find_stored_batch(self, prompts: Iterable[Any], *, as_one: bool = False, is_counted: bool = True) -> list[int]:
        """As `find_stored` for each of several prompts.

        One Redis call for 4,096 chunks of all together, and for about 300 nodes.
        `as_one`: they are parts of one request, which counts as one look-up.
        """
        read = [self._state.read(prompt) for prompt in read_items(prompts, "prompts", "a list of prompts")]
        return self._tiers.payloads.find_stored(read, as_one=as_one, is_counted=is_counted)

    def count_lookup(self, chunks: int, chunks_hit: int) -> None:
        """Count a look-up by `find_stored` as engines do: chunks lacked, and those taken of them. No Redis call."""
        self._tiers.payloads.count_lookups(1, int(chunks_hit > 0), chunks, chunks_hit)

    def demote(self, idle_s: float | None = None, timeout_s: float = 60.0) -> int:
        """Make cold what nobody used for so long, by default `cold_timeout_s`. Returns the chunks moved.

        Every payload is read, compressed and written; then one script a node says where it is now, unless the node
        has changed meanwhile. Keeps `cold_max_bytes`. Raises UnavailableError.
        """
        self._state.check_usable()
        return self._tiers.demote(idle_s, timeout_s)

    def promote(self, token_ids: Any, timeout_s: float = 60.0) -> int:
        """Make warm what of a prompt is cold; the background does so after a load. Returns the chunks moved.

        Raises UnavailableError.
        """
        prompt = self._state.read(token_ids)
        return self._tiers.promote(prompt, timeout_s)

    # Keep it well

    def catch_up(self) -> bool:
        """Read the log now, so that L1 knows no more than there is. Whether Redis answered; never raises.

        One call for every 1,000 entries. A background thread does this every `feed_interval_s`.
        """
        self._state.check_usable()
        return self._state.feed.poll()

    def pin(self, token_ids: Any) -> int:
        """Keep a prompt, such as a system prompt, from eviction until `unpin`. Returns how many chunks are protected.

        0 when nothing of it is there, or Redis fails. One Redis call, two when L1 does not know the prompt.
        """
        return self._state.reservations.pin(self._state.read(token_ids), keep=True)

    def unpin(self, token_ids: Any) -> int:
        """Let a prompt be evicted again. Returns how many chunks of it are there. Redis calls as `pin`."""
        return self._state.reservations.pin(self._state.read(token_ids), keep=False)

    def maintain(self) -> Evicted:
        """Bring the shared tree within its budgets, down to the low watermark. Several may do so at once.

        One call for every 25 leaves. Raises UnavailableError when Redis fails.
        """
        self._state.check_usable()
        return maintain(self._state)

    def lease(self, token_ids: Any, ttl_s: float = 30.0) -> Lease:
        """Keep a prompt from eviction until `ttl_s` passed or the lease is released, without looking it up.

        A context manager, as `hit.lease()`. One Redis call, two when L1 does not know the prompt.
        """
        prompt = self._state.read(token_ids)
        return self._state.reservations.lease(prompt, prompt.chunks, ttl_s)

    def prewarm(
        self,
        time_s: float | None = None,
        max_bytes: int | None = None,
        progress: Callable[[Prewarmed], object] | None = None,
    ) -> Prewarmed:
        """Bring the hottest prefixes of the namespace into L1, most hits first; `progress` is told after each call.

        Ends after `time_s` or when L1 grew by `max_bytes`, by default as configured. One call for 200 candidates,
        and one for about 4,096 chunks or 50 nodes.
        Never raises on Redis failing: the result says what came.
        """
        self._state.check_usable()
        return prewarm(
            self._state,
            self.config.prewarm_time_s if time_s is None else time_s,
            self.config.prewarm_max_bytes if max_bytes is None else max_bytes,
            progress,
        )

    # Workers

    def register_worker(
        self,
        *,
        address: str = "",
        model: str = "",
        media: Iterable[str] = (),
        load: Mapping[str, float] | None = None,
        lease_s: float = 10.0,
    ) -> int:
        """Hold a lease from now on, under a new epoch, and say who this worker is. Returns the epoch.

        What it published before counts no more; what it publishes now counts until `lease_s` after it was last heard
        of, three times a lease in the background. Redis calls: 4. Raises InvalidInputError, UnavailableError.
        """
        self._state.check_usable()
        if lease_s < SHORTEST_LEASE_S:
            raise InvalidInputError(f"a lease of {lease_s} s is too short: at least {SHORTEST_LEASE_S:g} are needed")
        link = self._state.link
        link.info = WorkerInfo(address, model, tuple(media) or (self.config.medium,), dict(load or {}))
        link.lease_s = float(lease_s)
        link.attach_again(link.epoch, time.monotonic() + _REGISTER_TIMEOUT_S, begins_anew=True)
        self._begin_background()
        return link.epoch

    def report_load(self, load: Mapping[str, float]) -> None:
        """What routers should know of this worker now, sent with the next heartbeat. No Redis call."""
        link = self._state.link
        link.info = replace(link.info, load=dict(load))

    def workers(self) -> list[Member]:
        """Every rank that ever published here: its epoch, its lease, what it says of itself.

        Redis calls: 1, and 1 for each that holds a lease. Raises UnavailableError.
        """
        self._state.check_usable()
        link = self._state.link
        return read_members(link.admin, link.keys, time.monotonic() + _REGISTER_TIMEOUT_S)

    def drop_worker(self, worker: str) -> int:
        """This worker is gone: nothing that any of its ranks published counts any more, however much it is.

        Returns how many ranks it had. Redis calls: 3. Readers know within `feed_interval_s` where any worker holds
        a lease, else within `touch_interval_s`; what it left is swept in the background. Raises UnavailableError.
        """
        self._state.check_usable()
        link, deadline = self._state.link, time.monotonic() + _REGISTER_TIMEOUT_S
        dropped = retire_worker(link.admin, link.keys, worker, deadline)
        link.refresh()
        return dropped

    def sweep(self) -> Swept:
        """Take away what dead workers left behind, which counts for nothing already. Raises UnavailableError.

        Redis calls: 2 when there is nothing to do, else three more and one for 5 nodes of the tree.
        """
        self._state.check_usable()
        return self._upkeep.sweep()

    # Look into it

    def get_metrics(self) -> dict[str, Any]:
        """What happened so far in this process, and how large L1 is; docs/metrics.md has every name. No Redis call."""
        return metrics_of(self._state, self._tiers)

    def health(self) -> Health:
        """What works now: walks, writes, and each server of payloads by itself. No Redis call; never raises."""
        return health_of(self._state.link, self._tiers.pools)

    def check_integrity(self) -> Report:
        """Read the whole shared tree and hold it to its invariants; changes nothing. One call for every key."""
        self._state.check_usable()
        link = self._state.link
        return check_integrity(link.admin.redis, link.keys, self.config.max_run)

    def flush(self) -> None:
        """Tell Redis now what otherwise goes in the background: touches, retractions. Never raises on Redis failing.

        One call for 100 nodes touched, one for a retraction, one for the epochs; at most three publish deadlines.
        """
        self._state.check_usable()
        self._upkeep.flush()

    def close(self) -> None:
        """Send what waits, as `flush` does, and close. May be called again.

        The tree keeps what was published, and it goes on to count, unless this worker holds a lease: that ends.
        """
        if self._is_closed or self._state.unusable == "forked":
            return
        with self._closing:
            try:
                if self._background is not None:
                    self._background.stop()
                # Of an interpreter that ends modules are half gone: what waits may be lost.
                with contextlib.suppress(Exception) if sys.is_finalizing() else contextlib.nullcontext():
                    if not self._state.unusable:  # else an interrupt cut closing short: only the rest is closed
                        self._upkeep.end()
            finally:
                self._state.unusable = "this cache is closed: open another one"
                self._tiers.close()
                self._state.link.close()
                self._is_closed = True

    def _begin_background(self) -> None:
        interval_s = self._upkeep.interval_s
        if not interval_s:
            return
        if self._background is None:
            self._background = Background(self, PrefixCacheOptimizer._work, interval_s)
            self._state.wake = self._background.wake
        else:
            self._background.go_on_every(interval_s)

    def _work(self) -> None:
        self._upkeep.work()


def _refuse_after_fork() -> None:
    for cache in _open:
        cache._state.unusable = "forked"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_refuse_after_fork)
