"""Publishing: what this worker has, and what it no longer has."""

from __future__ import annotations

import contextlib
import time
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, cast

from distprefix import operations
from distprefix.budget import keep_within
from distprefix.chunking import HASH_BYTES, Prompt, pack_block_ids
from distprefix.errors import DistPrefixError, NoParentError, NotAttachedError, OrphansError, UnavailableError
from distprefix.l1 import Found
from distprefix.operations import Published
from distprefix.own import node_at
from distprefix.radix import PrefixTree
from distprefix.results import pack_metadata
from distprefix.state import State

__all__ = ["Publisher"]

_ATTEMPTS = 3
_HASHING_SHARE = 0.1
"""Of a publish's deadline: own blocks and Redis take several times as long for a chunk as hashing does."""
_MOST_AHEAD = 16 * operations.WINDOW
"""Chunks that this process knows and Redis does not, above which no further ones are hashed."""


class Publisher:
    """Keeps Redis told. Thread-safe."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._names: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        """Prefix hash to a node and a depth, of own blocks or of L1; the prefix named longest ago is first."""
        self._told_under = state.link.epoch
        self._retracted = 0
        """How often something was taken back."""

    def publish_tokens(
        self, token_ids: Any, block_ids: Iterable[int] | None, metadata: Mapping[str, Any] | None
    ) -> str:
        """See `PrefixCacheOptimizer.cache_prefix`."""
        state, config = self._state, self._state.config
        deadline = state.link.publish_deadline()
        prompt = state.read(token_ids)
        blocks = pack_block_ids(block_ids, prompt.length // config.chunk_size)[: 4 * prompt.chunks]
        packed = pack_metadata(metadata)
        if prompt.length < config.min_prefix_length or not prompt.chunks:
            with state.lock:
                state.counts["publishes_short"] += 1
            return ""
        # Reading a million numbers takes half of the time: something is to be published all the same.
        at_least = time.monotonic() + config.publish_timeout_s / 2
        return self.publish(prompt, blocks, packed, max(deadline, at_least))

    def publish(self, prompt: Prompt, blocks: bytes, metadata: bytes, deadline: float | None = None) -> str:
        """This worker has a prompt, in these blocks when it names any. Returns the prefix's hash (hex).

        What does not fit the deadline is left to the next publish of the prompt, and counted; the hash names what was
        hashed. Raises what went wrong with Redis when `strict`; otherwise it is counted as dropped.
        """
        state, link, config = self._state, self._state.link, self._state.config
        now, generation = time.monotonic(), state.feed.generation
        deadline = deadline or link.publish_deadline()
        with state.lock:
            self._mend()
            found = state.find(prompt, now)
        wanted = prompt.chunks
        if found.chunks < wanted:  # else L1 knows all of it
            prompt.check_chain()
            if found.chunks - found.fresh >= _MOST_AHEAD:
                prompt = prompt.leading(found.chunks)
        hashes = state.hashes(prompt, found, now + _HASHING_SHARE * (deadline - now), least=1)
        prompt = prompt.leading(len(hashes) // HASH_BYTES)
        if prompt.chunks < wanted:
            blocks = blocks[: 4 * prompt.chunks]
            metadata = b""  # of the end of the prompt
        published: Published | None = None
        failed: DistPrefixError | None = None
        moved: int | None = None
        retracted = self._retracted
        try:
            with state.lock:
                retracted = self._retracted
                start, moved = self._remember(prompt, found, hashes, blocks)
            try:
                if not state.outbox.send_retractions(deadline):
                    # Sent afterwards, they would take back what is published now.
                    raise UnavailableError("Redis has not taken earlier retractions yet")
                published = self._insert(hashes, start, blocks, metadata, deadline)
            except DistPrefixError as error:
                failed = error
            reached = _end_of(published)
            self._take_over(prompt, hashes, blocks, moved, published, now, generation)
        except BaseException:
            if moved is not None or retracted != self._retracted:
                # Redis may name the blocks of before, or chunks that were taken back meanwhile.
                state.own.is_torn = True
                link.attached = False
            raise
        self._count(failed, wanted, prompt.chunks, reached)
        if published is not None:
            state.reservations.fulfil(hashes[: reached * HASH_BYTES])
            state.usage = published.usage
            keep_within(state, published.usage)
        elif failed is not None and config.strict:
            raise failed
        return hashes[-HASH_BYTES:].hex()

    def publish_again(self, hashes: bytes, blocks: bytes) -> None:
        """Put back a chain that Redis has lost. Redis calls as `publish`; raises DistPrefixError.

        What this worker removed while the call was on its way is trimmed again.
        """
        state = self._state
        with state.lock:
            self._mend()
            self._notice_epoch()
        deadline = state.link.publish_deadline()
        if not state.outbox.send_retractions(deadline):
            raise UnavailableError("Redis has not taken earlier retractions yet")
        published = self._insert(hashes, 0, blocks, b"", deadline)
        state.usage = published.usage
        if blocks:
            with state.lock:
                held = state.own.confirm(hashes, blocks)
                if held < _end_of(published):
                    self._retract([hashes[: (held + 1) * HASH_BYTES]])
        keep_within(state, published.usage)

    def move_blocks(self, prefix_hash: str, blocks: bytes) -> bool:
        """A published prefix lies in other blocks now. False when it is not known any more."""
        state = self._state
        with state.lock:
            self._mend()
            node, depth = self._names.get(prefix_hash, (None, 0))
            at = node_at(node, depth - 1) if node else None
            if at is None or not (state.own.has(at) or state.l1.has(cast("Any", at))):
                return False
            prompt = recall(at, depth)
        self.publish(prompt, blocks, b"")
        return True

    def chunks_of(self, prefix_hash: str) -> int:
        """How many chunks a published prefix has; 0 when it is not known any more."""
        return self._names.get(prefix_hash, (None, 0))[1] if isinstance(prefix_hash, str) else 0  # pyright: ignore[reportUnnecessaryIsInstance]

    def remove_blocks(self, block_ids: Iterable[int]) -> int:
        """This worker no longer has these blocks, nor what lies behind them. Returns how many it had."""
        state = self._state
        with state.lock:
            self._mend()
            try:
                removed, lost = state.own.remove(block_ids)
                self._retract(lost)
            except BaseException:  # forgotten here, and Redis may never be told
                state.own.is_torn = True
                state.link.attached = False
                raise
        if lost:
            state.outbox.send_retractions(state.link.publish_deadline())
        return removed

    def clear(self) -> None:
        """Empty the namespace, and forget everything here. Raises UnavailableError when Redis fails."""
        state = self._state
        with contextlib.suppress(NotAttachedError):  # flushed: there is nothing left
            state.link.administer(operations.drop())
        with state.lock:
            state.l1.clear()
            state.own.clear()
            state.unnamed.clear()
            self._names.clear()

    def _insert(self, hashes: bytes, start: int, blocks: bytes, metadata: bytes, deadline: float) -> Published:
        link, config, attempts = self._state.link, self._state.config, 0
        while True:
            epoch = link.epoch
            operation = operations.publish(
                hashes[start * HASH_BYTES :],
                start,
                config.holder,
                epoch,
                max_run=config.max_run,
                blocks=blocks[4 * start :],
                metadata=metadata,
                in_part=True,
            )
            try:
                if not link.attached:
                    raise NotAttachedError
                published = link.publish(operation, deadline)
            except OrphansError:  # a part of them is removed with each call
                continue
            except NoParentError:  # evicted meanwhile, or between two windows of a long prompt
                attempts += start == 0
                if attempts > _ATTEMPTS:
                    raise
            except NotAttachedError:  # flushed meanwhile, or more was taken back than could be kept
                link.attach_again(epoch, deadline)
            else:
                if epoch == link.settled_epoch() and link.attached:
                    return published  # else another epoch counts now, or none: the reply showed that history was lost
            start = 0

    def _mend(self) -> None:
        """Where an exception cut a change of own blocks short: forget them, and have all that Redis was told be void.

        Under the lock, before own blocks are used.
        """
        state = self._state
        if state.own.is_torn:
            state.link.attached = False
            state.outbox.void()
            self._names.clear()
            state.own.reset()

    def _remember(self, prompt: Prompt, found: Found, hashes: bytes, blocks: bytes) -> tuple[int, int | None]:
        """Own blocks know the prompt before Redis does: then nothing that Redis is told of is ever unknown here.

        Returns the depth that a publish has to begin at, and that of the first chunk which lay in another block.
        """
        state = self._state
        self._mend()
        self._notice_epoch()
        told = state.own.told_up_to(hashes, blocks) if blocks else prompt.chunks
        start = state.l1.published_up_to(found, state.config.holder, state.link.epoch, told)
        state.counts["publishes"] += 1
        if not blocks:
            return start, None
        try:
            return start, state.own.remember(hashes, blocks, told=False)[1]
        except BaseException:
            state.own.is_torn = True
            state.link.attached = False
            raise

    def _take_over(
        self,
        prompt: Prompt,
        hashes: bytes,
        blocks: bytes,
        moved: int | None,
        published: Published | None,
        now: float,
        generation: int,
    ) -> None:
        """L1 and own blocks learn what was published, and what would have been."""
        state = self._state
        reached = _end_of(published)
        with state.lock:
            l1, config = state.l1, state.config
            if published is not None:
                begin = published.views[0].start
                is_sure = generation == state.feed.generation
                l1.learn(prompt, hashes[begin * HASH_BYTES :], begin, published.views, now, sure=is_sure)
            if reached < prompt.chunks:
                l1.assume(prompt, hashes, config.holder, state.link.epoch, reached)
            if blocks and not state.own.is_torn:
                try:
                    self._settle(hashes, moved, reached)
                except BaseException:
                    state.own.is_torn = True
                    state.link.attached = False
                    raise
            elif not blocks:
                state.unnamed.add(hashes)
                path = l1.find(prompt, now).path
                if path:
                    self._name(hashes, path[-1], prompt.chunks)
            l1.shrink()

    def _settle(self, hashes: bytes, moved: int | None, reached: int) -> None:
        """Own blocks learn that Redis was told of `reached` chunks; what may be wrong in Redis is taken back."""
        state = self._state
        last, held = state.own.tell(hashes, reached)
        if held < len(hashes) // HASH_BYTES:
            # Taken back while it was published: Redis may have heard of that first.
            self._retract([hashes[: (held + 1) * HASH_BYTES]])
        if moved is not None and max(moved, reached) < held:
            # Redis still names the old blocks: better that it names none.
            state.outbox.retract(hashes[: (max(moved, reached) + 1) * HASH_BYTES])
        self._retract(state.own.give_up())
        if last is not None:
            self._name(hashes, last, held)

    def _count(self, failed: DistPrefixError | None, wanted: int, hashed: int, reached: int) -> None:
        """Count a publish that Redis did not take, and what one that it took left out."""
        state = self._state
        with state.lock:
            if failed is not None:
                state.counts["publishes_dropped"] += 1
                state.drops[type(failed).__name__] += 1
                if isinstance(failed, UnavailableError) and failed.is_full:
                    state.is_full = True
                    state.wake()  # to make room: publishes wait for nothing
            elif reached < wanted:
                state.counts["publishes_cut"] += 1
                state.unpublished["hashing"] += wanted - hashed
                state.unpublished["redis"] += hashed - reached

    def _name(self, hashes: bytes, node: Any, depth: int) -> None:
        name = hashes[-HASH_BYTES:].hex()
        self._names[name] = (node, depth)
        self._names.move_to_end(name)
        while len(self._names) > self._state.config.max_cached_sequences:
            self._names.popitem(last=False)

    def _notice_epoch(self) -> None:
        """Under a new epoch Redis knows nothing of what this worker has, whoever took it. Under the lock."""
        if self._told_under != self._state.link.epoch:
            self._told_under = self._state.link.epoch
            self._state.own.forget_told()

    def _retract(self, chains: list[bytes]) -> None:
        self._retracted += len(chains)
        for chain in chains:
            self._state.outbox.retract(chain)
            self._state.l1.retract(chain, self._state.config.holder)


def _end_of(published: Published | None) -> int:
    """The depth up to which Redis was told."""
    if published is None or not published.views:
        return 0
    last = published.views[-1]
    return last.start + last.matched


def recall(node: Any, depth: int) -> Prompt:
    """A known prefix as a prompt again."""
    run = b"".join(part.run for part in PrefixTree[Any].path_to(node))
    hashed = b"".join(part.hashes for part in PrefixTree[Any].path_to(node))
    stride = len(run) // node.stop
    view = memoryview(run)[: depth * stride]
    return Prompt(view, stride, depth, (), 1, not hashed or run == hashed, depth)
