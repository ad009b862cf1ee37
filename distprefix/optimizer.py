"""The façade: what a program calls. L1 answers first, Redis is asked for the rest, nothing gets in the way."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, Self

import redis

from distprefix import operations
from distprefix.chunking import HASH_BYTES, Prompt, chain_hashes, chain_root, pack_block_ids, read_prompt
from distprefix.config import PrefixCacheConfig
from distprefix.errors import (
    ConfigError,
    DistPrefixError,
    ForkedProcessError,
    InvalidInputError,
    NoParentError,
    NotAttachedError,
    UnavailableError,
)
from distprefix.l1 import L1, Found, Node
from distprefix.model import CacheHitResult, CacheTier, PrefixEntry
from distprefix.nodes import NodeView
from distprefix.outbox import Outbox
from distprefix.redis.integrity import Report, check_integrity
from distprefix.redis.link import Link
from distprefix.results import entry_of, pack_metadata, result_of

__all__ = ["PrefixCacheOptimizer"]

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
        self._root = chain_root(config.hash_algorithm, config.salt.encode())
        self._lock = threading.RLock()
        self._l1 = L1(config.chunk_size, config.max_run, config.l1_max_bytes, config.l1_ttl_s, config.hot_threshold)
        self._sequences: OrderedDict[str, tuple[Node, int]] = OrderedDict()
        self._counts: Counter[str] = Counter()
        self._unusable = ""
        self._link = Link(config, client)
        self._outbox = Outbox(self._link, config.holder)
        self._stop = threading.Event()
        self._background: threading.Thread | None = None
        if config.touch_interval_s > 0:
            self._background = threading.Thread(target=self._work, name="distprefix", daemon=True)
            self._background.start()
        _open.add(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<PrefixCacheOptimizer {self.config.holder} in {self.config.namespace!r}, epoch {self._link.epoch}>"

    @property
    def url(self) -> str:
        """Where the shared tree is; a private server's socket too."""
        return self._link.url

    # Look up

    def find_longest_cache_hit(self, token_ids: Any, *, blocks_of: str | None = None) -> CacheHitResult:
        """The longest prefix of a prompt that some live holder has, in whole chunks.

        `blocks_of` names a holder whose block ids are wanted, and asks Redis for them; by default this worker's own.
        Redis calls: 0 when L1 answers, else 1 for every 4,096 chunks. Redis failing gives a miss, or what L1 has.
        Raises InvalidInputError for what is no prompt, and what went wrong with Redis only when `strict`.
        """
        began = time.perf_counter_ns()
        prompt, now = self._read(token_ids), time.monotonic()
        calls, blocks = 0, None if blocks_of is None else b""
        with self._lock:
            found = self._l1.find(prompt, now)
            answered = found.chunks
            if found.fresh == prompt.chunks and blocks_of is None:
                return self._conclude(prompt, found, answered, 0, None, began)
            start = found.resume if blocks_of is None else 0
            hashes = self._hashes(prompt, found, start)
        views, calls = self._ask(operations.walk(hashes, start, blocks_of or ""))
        with self._lock:
            if views is not None:
                answered = found.fresh
                reached = views[-1].start + views[-1].matched if views else start
                self._l1.learn(prompt, hashes, start, views, now)
                if reached < found.chunks:
                    self._l1.cut(prompt, reached)
                if blocks_of is not None:
                    blocks = self._blocks_of(views, blocks_of)
            result = self._conclude(prompt, self._l1.find(prompt, now), answered, calls, blocks, began)
            self._l1.shrink()  # not before: the prompt may be larger than the budget
            return result

    def get_computed_blocks(self, token_ids: Any) -> list[int]:
        """This worker's own block ids for the leading chunks that it holds itself. No Redis call."""
        prompt = self._read(token_ids)
        with self._lock:
            found = self._l1.find(prompt, time.monotonic())
            return list(self._l1.own_blocks(found.path, found.chunks))

    def get_prewarm_candidates(self, limit: int = 10) -> list[PrefixEntry]:
        """The nodes that this process knows with at least `prewarm_threshold` hits, most hits first. No Redis call."""
        self._check_usable()
        if not self.config.enable_prewarm:
            return []
        with self._lock:
            nodes = self._l1.hottest(self.config.prewarm_threshold)[:limit]
            size, touches = self.config.chunk_size, self._outbox.touches
            tier = CacheTier.HOT
            return [entry_of(node, node.stop, size, tier, touches, used_now=False)() for node in nodes]

    # Publish

    def cache_prefix(
        self, token_ids: Any, block_ids: Iterable[int] | None = None, metadata: Mapping[str, Any] | None = None
    ) -> str:
        """Say that this worker has the KV of a prompt's full chunks. Returns the prefix's hash (hex).

        `block_ids`: one a full chunk. `metadata`: up to 4 KiB as msgpack, kept with the prompt's last node.
        Redis calls: 1 for every 4,096 chunks that this worker has not just published. When Redis fails, this process
        knows the prefix, the others do not, and it is counted as dropped. Raises InvalidInputError, and when `strict`
        what went wrong with Redis.
        """
        prompt = self._read(token_ids)
        least = max(self.config.min_prefix_length, self.config.chunk_size)
        if prompt.length < least or not prompt.chunks:
            raise InvalidInputError(
                f"the prompt has {prompt.length} tokens, and the shortest prefix that is cached has {least} "
                f"(chunk_size {self.config.chunk_size}, min_prefix_length {self.config.min_prefix_length}, "
                f"max_prefix_length {self.config.max_prefix_length}): publish longer prompts only, or change these"
            )
        blocks = pack_block_ids(block_ids, prompt.length // self.config.chunk_size)[: 4 * prompt.chunks]
        return self._publish(prompt, blocks, pack_metadata(metadata))

    def update_prefix_state(self, prefix_hash: str, new_block_ids: Iterable[int]) -> bool:
        """The KV of a prefix that this process published lies in other blocks now. Redis calls as `cache_prefix`.

        False when the hash names nothing that this process still knows.
        """
        self._check_usable()
        with self._lock:
            node, depth = self._sequences.get(prefix_hash, (None, 0))
            at = self._l1.node_at(node, depth - 1) if node else None
            if at is None:
                return False
            prompt, _ = self._l1.recall(at, depth)
        self._publish(prompt, pack_block_ids(new_block_ids, depth), b"")
        return True

    def remove_skipped_blocks(self, block_ids: Iterable[int]) -> int:
        """This worker no longer has these blocks: no look-up counts on them, or on what lies behind them, any more.

        Returns how many of them it had. Redis calls: one for every radix node that the blocks lie in; the cost is in
        proportion to the blocks named. When Redis fails, or the deadline of a publish passes, the rest is kept and sent
        later, before anything else is published.
        """
        self._check_usable()
        ids = array("I", pack_block_ids(block_ids, None))
        with self._lock:
            removed, cuts = self._l1.remove_blocks(ids)
            for node, depth in cuts.items():
                self._l1.retract(node, self.config.holder, depth)
                self._outbox.retractions.append(self._l1.recall(node, depth + 1)[1])
        if cuts:
            self._outbox.send_retractions(self._link.publish_deadline())
        return removed

    def clear(self) -> None:
        """Empty the namespace, for everybody, and forget everything here. One Redis call for every 500 nodes.

        Raises UnavailableError when Redis fails.
        """
        self._check_usable()
        with contextlib.suppress(NotAttachedError):  # flushed: there is nothing left
            self._link.administer(operations.drop())
        with self._lock:
            self._l1.clear()
            self._sequences.clear()

    # Look into it

    def get_metrics(self) -> dict[str, Any]:
        """What happened so far in this process, and how large L1 is. No Redis call."""
        counts = self._counts
        return {
            "lookups": counts["lookups"],
            "hits": counts["hits"],
            "misses": counts["lookups"] - counts["hits"],
            "hit_rate": counts["hits"] / counts["lookups"] if counts["lookups"] else 0.0,
            "chunks_looked_up": counts["chunks"],
            "chunks_hit": counts["chunks_hit"],
            "chunks_hit_l1": counts["chunks_hit_l1"],
            "publishes": counts["publishes"],
            "publishes_dropped": counts["publishes_dropped"],
            "redis_calls_lookup": self._link.lookups.calls,
            "redis_calls_publish": self._link.publishes.calls,
            "redis_failures": dict(self._link.failures),
            "breaker": str(self._link.breaker.state),
            "breaker_opened": self._link.breaker.opened,
            "touches_dropped": self._outbox.touches.dropped,
            "retractions_waiting": len(self._outbox.retractions),
            "l1_bytes": self._l1.bytes,
            "l1_chunks": self._l1.chunks,
            "l1_nodes": self._l1.nodes,
            "l1_evicted_chunks": self._l1.evicted_chunks,
            "epoch": self._link.epoch,
        }

    def check_integrity(self) -> Report:
        """Read the whole shared tree and hold it to its invariants; changes nothing. One call for every key."""
        self._check_usable()
        return check_integrity(self._link.admin.redis, self._link.keys, self.config.max_run)

    def flush(self) -> None:
        """Tell Redis now what otherwise goes in the background: touches, retractions. Never raises on Redis failing.

        One call for 300 nodes touched, one for a retraction, one for the epochs; at most three publish deadlines.
        """
        self._check_usable()
        self._outbox.send()
        self._link.refresh()

    def close(self) -> None:
        """Send what waits, as `flush` does, and close. The tree keeps what was published. May be called again."""
        if self._unusable:
            return
        self.flush()
        self._unusable = "this cache is closed: open another one"
        self._stop.set()
        if self._background is not None:
            self._background.join(timeout=1)
        self._link.close()

    # Inside

    def _check_usable(self) -> None:
        if self._unusable:
            raise (ForkedProcessError() if self._unusable == "forked" else DistPrefixError(self._unusable))

    def _read(self, token_ids: Any) -> Prompt:
        if self._unusable:
            self._check_usable()
        prompt = read_prompt(token_ids, self.config.chunk_size, self.config.max_prefix_length)
        if not prompt.length:
            raise InvalidInputError("an empty prompt has no prefix: pass at least one token")
        return prompt

    def _hashes(self, prompt: Prompt, found: Found, start: int) -> bytes:
        """Chunk hashes from `start` on: those that L1 knows, then computed ones. Under the lock that found the path."""
        if prompt.is_chain:
            return bytes(prompt.view[start * HASH_BYTES :])
        known = self._l1.hashes(found.path, start, found.chunks)
        parent = known[-HASH_BYTES:] or self._l1.hashes(found.path, start - 1, start) or self._root
        rest = prompt.view[found.chunks * prompt.stride :]
        return known + chain_hashes(self.config.hash_algorithm, parent, rest, prompt.stride)

    def _blocks_of(self, views: list[NodeView], holder: str) -> bytes:
        """A holder's block ids up to its first gap; none that an older process of its worker id left behind."""
        blocks: list[bytes] = []
        for view in views:
            epoch, covered = view.holders.get(holder, (0, 0))
            if not covered or not self._link.is_live(holder, epoch):
                break
            blocks.append(view.blocks[: 4 * min(covered, view.matched)])
            if len(blocks[-1]) < 4 * view.matched:
                break
        return b"".join(blocks)

    def _ask(self, operation: Any) -> tuple[Any, int]:
        if not self.config.strict:
            try:
                return self._link.look_up(operation)
            except NotAttachedError:
                return [], 1
        return self._link.look_up(operation)

    def _conclude(
        self, prompt: Prompt, found: Found, answered: int, calls: int, blocks: bytes | None, began: int
    ) -> CacheHitResult:
        coverage = self._l1.coverage(found.path, found.chunks, self._link.is_live)
        matched = max(coverage.values()) if coverage else 0
        if matched * self.config.chunk_size < self.config.min_prefix_length:
            matched, coverage = 0, {}
        counts = self._counts
        counts["lookups"] += 1
        counts["chunks"] += prompt.chunks
        path = found.path
        if matched:
            end = len(path)
            while path[end - 1].start >= matched:
                end -= 1
            path, node = path[:end], path[end - 1]
            self._l1.touch(node, time.monotonic())
            if node.value is not None:
                self._outbox.touches.add(node.value.head)
            counts["hits"] += 1
            counts["chunks_hit"] += matched
            counts["chunks_hit_l1"] += min(matched, answered)
        return result_of(
            prompt,
            path,
            matched,
            coverage,
            min(matched, answered),
            calls,
            blocks,
            began,
            self.config.chunk_size,
            self._l1,
            self._outbox.touches,
        )

    def _publish(self, prompt: Prompt, blocks: bytes, metadata: bytes) -> str:
        holder, link, now = self.config.holder, self._link, time.monotonic()
        deadline = link.publish_deadline()
        with self._lock:
            found = self._l1.find(prompt, now)
            start = self._l1.published_up_to(found, holder, link.epoch, blocks)
            hashes = self._hashes(prompt, found, 0)
        self._counts["publishes"] += 1
        try:
            if self._outbox.retractions and not self._outbox.send_retractions(deadline):
                # Sent afterwards, they would take back what is published now.
                raise UnavailableError("Redis has not taken earlier retractions yet")
            published = self._insert(hashes, start, blocks, metadata, deadline)
        except DistPrefixError:
            self._counts["publishes_dropped"] += 1
            with self._lock:
                self._l1.assume(prompt, hashes, 0, holder, link.epoch)
            if self.config.strict:
                raise
        else:
            with self._lock:
                begin = published.views[0].start
                self._l1.learn(prompt, hashes[begin * HASH_BYTES :], begin, published.views, now)
        with self._lock:
            path = self._l1.find(prompt, now).path
            if blocks:
                self._l1.set_blocks(path, blocks)
            self._l1.shrink()
            name = hashes[-HASH_BYTES:].hex()
            if path:
                self._sequences[name] = (path[-1], prompt.chunks)
                self._sequences.move_to_end(name)
                if len(self._sequences) > self.config.max_cached_sequences:
                    self._sequences.popitem(last=False)
        return name

    def _insert(
        self, hashes: bytes, start: int, blocks: bytes, metadata: bytes, deadline: float
    ) -> operations.Published:
        while True:
            epoch = self._link.epoch
            operation = operations.publish(
                hashes[start * HASH_BYTES :],
                start,
                self.config.holder,
                epoch,
                now_ms=int(time.time() * 1000),
                max_run=self.config.max_run,
                blocks=blocks[4 * start :],
                metadata=metadata,
            )
            try:
                published = self._link.publish(operation, deadline)
            except NoParentError:  # evicted meanwhile
                if start == 0:
                    raise
            except NotAttachedError:  # flushed meanwhile
                self._link.attach_again(epoch, deadline)
            else:
                if epoch == self._link.settled_epoch():
                    return published  # else another thread attached meanwhile, and the old epoch counts for nothing
            start = 0

    def _work(self) -> None:
        while not self._stop.wait(self.config.touch_interval_s):
            if not self._unusable:
                self.flush()


def _refuse_after_fork() -> None:
    for cache in _open:
        cache._unusable = "forked"


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_refuse_after_fork)
