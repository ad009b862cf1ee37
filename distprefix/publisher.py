"""Publishing: what this worker has, and what it no longer has."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from distprefix import operations
from distprefix.budget import keep_within
from distprefix.chunking import HASH_BYTES, Prompt
from distprefix.errors import DistPrefixError, NoParentError, NotAttachedError, UnavailableError
from distprefix.operations import Published
from distprefix.own import node_at
from distprefix.radix import PrefixTree
from distprefix.state import State

__all__ = ["Publisher"]

_ATTEMPTS = 3


class Publisher:
    """Keeps Redis told. Thread-safe."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._names: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        """Prefix hash to a node and a depth, of own blocks or of L1; the prefix named longest ago is first."""
        self._told_under = state.link.epoch

    def publish(self, prompt: Prompt, blocks: bytes, metadata: bytes) -> str:
        """This worker has a prompt, in these blocks when it names any. Returns the prefix's hash (hex).

        Raises what went wrong with Redis when `strict`; otherwise it is counted as dropped.
        """
        state, holder = self._state, self._state.config.holder
        now, generation = time.monotonic(), state.feed.generation
        with state.lock:
            found = state.find(prompt, now)
        hashes = state.hashes(prompt, found)
        with state.lock:
            self._notice_epoch()
            told = state.own.told_up_to(hashes, blocks) if blocks else prompt.chunks
            start = state.l1.published_up_to(found, holder, state.link.epoch, told)
            state.counts["publishes"] += 1
        deadline = state.link.publish_deadline()
        published = None
        try:
            if not state.outbox.send_retractions(deadline):
                # Sent afterwards, they would take back what is published now.
                raise UnavailableError("Redis has not taken earlier retractions yet")
            published = self._insert(hashes, start, blocks, metadata, deadline)
        except DistPrefixError as error:
            with state.lock:
                state.counts["publishes_dropped"] += 1
                state.drops[type(error).__name__] += 1
            if state.config.strict:
                raise
        finally:
            self._take_over(prompt, hashes, blocks, published, now, generation)
        if published is not None:
            state.reservations.fulfil(hashes)
            state.usage = published.usage
            keep_within(state, published.usage)
        return hashes[-HASH_BYTES:].hex()

    def publish_again(self, hashes: bytes, blocks: bytes) -> None:
        """Put back a chain that Redis has lost. One call for every 4,096 chunks; raises DistPrefixError.

        What this worker removed while the call was on its way is trimmed again.
        """
        state = self._state
        with state.lock:
            self._notice_epoch()
        deadline = state.link.publish_deadline()
        if not state.outbox.send_retractions(deadline):
            raise UnavailableError("Redis has not taken earlier retractions yet")
        published = self._insert(hashes, 0, blocks, b"", deadline)
        state.usage = published.usage
        if blocks:
            with state.lock:
                held = state.own.confirm(hashes, blocks)
                if held * HASH_BYTES < len(hashes):
                    self._retract([hashes[: (held + 1) * HASH_BYTES]])
        keep_within(state, published.usage)

    def move_blocks(self, prefix_hash: str, blocks: bytes) -> bool:
        """A published prefix lies in other blocks now. False when it is not known any more."""
        state = self._state
        with state.lock:
            node, depth = self._names.get(prefix_hash, (None, 0))
            at = node_at(node, depth - 1) if node else None
            if at is None:
                return False
            prompt = recall(at, depth)
        self.publish(prompt, blocks, b"")
        return True

    def chunks_of(self, prefix_hash: str) -> int:
        """How many chunks a published prefix has; 0 when it is not known any more."""
        return self._names.get(prefix_hash, (None, 0))[1]

    def remove_blocks(self, block_ids: Iterable[int]) -> int:
        """This worker no longer has these blocks, nor what lies behind them. Returns how many it had."""
        state = self._state
        with state.lock:
            removed, lost = state.own.remove(block_ids)
            self._retract(lost)
        if lost:
            state.outbox.send_retractions(state.link.publish_deadline())
        return removed

    def clear(self) -> None:
        """Forget every name."""
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
            )
            try:
                if not link.attached:
                    raise NotAttachedError
                published = link.publish(operation, deadline)
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

    def _take_over(
        self, prompt: Prompt, hashes: bytes, blocks: bytes, published: Published | None, now: float, generation: int
    ) -> None:
        """L1 and own blocks learn what was published, or what would have been."""
        state = self._state
        with state.lock:
            l1, config = state.l1, state.config
            if published is None:
                l1.assume(prompt, hashes, config.holder, state.link.epoch)
            else:
                begin = published.views[0].start
                learned = l1.learn(prompt, hashes[begin * HASH_BYTES :], begin, published.views, now)
                if generation != state.feed.generation:
                    l1.distrust(learned)
            if blocks:
                last, moved = state.own.remember(hashes, blocks, told=published is not None)
                if published is None and moved is not None:
                    # Redis still names the old blocks: better that it names none.
                    state.outbox.retract(hashes[: (moved + 1) * HASH_BYTES])
                self._retract(state.own.give_up())
                self._name(hashes, last, prompt.chunks)
            else:
                state.unnamed.add(hashes)
                path = l1.find(prompt, now).path
                if path:
                    self._name(hashes, path[-1], prompt.chunks)
            l1.shrink()

    def _name(self, hashes: bytes, node: Any, depth: int) -> None:
        name = hashes[-HASH_BYTES:].hex()
        self._names[name] = (node, depth)
        self._names.move_to_end(name)
        if len(self._names) > self._state.config.max_cached_sequences:
            self._names.popitem(last=False)

    def _notice_epoch(self) -> None:
        """Under a new epoch Redis knows nothing of what this worker has, whoever took it. Under the lock."""
        if self._told_under != self._state.link.epoch:
            self._told_under = self._state.link.epoch
            self._state.own.forget_told()

    def _retract(self, chains: list[bytes]) -> None:
        for chain in chains:
            self._state.l1.retract(chain, self._state.config.holder)
            self._state.outbox.retract(chain)


def recall(node: Any, depth: int) -> Prompt:
    """A known prefix as a prompt again."""
    run = b"".join(part.run for part in PrefixTree[Any].path_to(node))
    hashed = b"".join(part.hashes for part in PrefixTree[Any].path_to(node))
    stride = len(run) // node.stop
    view = memoryview(run)[: depth * stride]
    return Prompt(view, stride, depth, (), 1, not hashed or run == hashed, depth)
