"""What one engine holds, by its events, and how that differs from what Redis was told. Pure: no Redis, no clock.

A block counts in a medium while the engine holds it there and everything before it. What lies behind a hole is
remembered, and counts again when the hole is filled: engines do not tell of it a second time.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from typing import Any, cast

import msgpack

from distprefix.chunking import HASH_BYTES
from distprefix.events.blocks import EVERY_MEDIUM, Block
from distprefix.events.frames import Removed, Stored
from distprefix.events.limits import EngineLimits
from distprefix.events.nameless import Nameless
from distprefix.events.parking import Parking
from distprefix.hashing import ChunkHasher

__all__ = ["Holdings"]

_INDEXED = frozenset({"full_attention", "mla_attention", "sink_full_attention"})
"""Groups all of whose blocks a prefix needs. A sliding window needs, and tells of, its last ones only."""
_GROUPS = 8
_MAX_BLOCK_TOKENS = 65_536
"""Engines have some thousand tokens in a block at most."""


class Holdings:
    """The blocks of one engine.

    Beyond `max_blocks` blocks or chunks, or `held_bytes` of the limits, the prompt that grew longest ago is forgotten
    from its end.

    `hasher` names their chunks. With `engine_chains` the engine's own hashes are the chunk hashes.
    """

    def __init__(
        self,
        chunk_size: int,
        hasher: ChunkHasher,
        *,
        engine_chains: bool = False,
        max_blocks: int = 1_000_000,
        max_parked: int = 100_000,
        limits: EngineLimits | None = None,
    ) -> None:
        limits = limits or EngineLimits()
        self.counts: Counter[str] = Counter()
        """Blocks that were left out, by reason."""
        self.changed: dict[str, dict[Block, None]] = {}
        """By medium: blocks that may differ from what Redis was told."""
        self.chunks: Counter[str] = Counter()
        """By medium: chunks that count."""
        self._chunk_size = chunk_size
        self._stride = 4 * chunk_size
        self._digest = hasher.one
        self._origin = hasher.root
        self._engine_chains = engine_chains
        self._max_blocks = max_blocks
        self._max_bytes = limits.held_bytes
        self._max_media = limits.media
        self._parking = Parking(max_parked, self.counts, limits.parked_bytes)
        self._media: dict[str, int] = {}
        self._need: list[int] = []
        """By medium: the groups that have to hold a block."""
        self._groups: dict[tuple[str, int], int] = {}
        """Medium and the engine's number of a group to its bit."""
        self._sizes: dict[int, int] = {}
        """By bit of a group: tokens in its blocks, the most that it named so far."""
        self._nameless = Nameless(max_parked)
        self._had_zero = False
        """Whether a block was called 0: then a parent of 0 is that block, and no beginning of a prompt."""
        self._restart()

    def _restart(self) -> None:
        self.root = Block(0, None, b"")
        self.root.covered = self.root.told = EVERY_MEDIUM
        self._blocks: dict[int, Block] = {}
        self._leaves: OrderedDict[Block, None] = OrderedDict()
        self._places: dict[bytes, int] = {}
        """Chunk hashes that the engine gave to the keys of their blocks: each has one place in the tree."""
        self._chunks_known = 0
        """Chunks of all blocks, whether they count or not."""
        self._bytes = 0
        """What blocks hold besides themselves."""

    def __len__(self) -> int:
        return len(self._blocks)

    @property
    def parked(self) -> int:
        """Blocks that wait for the one before them."""
        return self._parking.blocks

    @property
    def bytes(self) -> int:
        """Bytes of hashes, tokens and extras that the blocks hold."""
        return self._bytes

    @property
    def state(self) -> bytes:
        """What has to be known besides the tree in Redis to go on from there."""
        groups = [[*name, self._sizes.get(bit, 0)] for name, bit in self._groups.items()]
        return cast("bytes", msgpack.packb(groups))

    @property
    def has_tails(self) -> bool:
        """Whether blocks are smaller than chunks: of those behind the last full chunk Redis knows nothing."""
        return any(size < self._chunk_size for size in self._sizes.values())

    def mask(self, medium: str) -> int:
        """The bit of a medium."""
        return 1 << self._media[medium]

    def clear(self) -> None:
        """The engine holds nothing."""
        self._had_zero = self._had_zero or 0 in self._blocks
        self._restart()
        self._parking.clear()
        self._nameless.clear()
        self.changed = {medium: {} for medium in self.changed}
        self.chunks.clear()

    # What the engine tells

    def store(self, event: Stored) -> None:
        """The engine has these blocks. Telling it twice does the same as once."""
        if event.kind not in _INDEXED:
            self.counts["other_groups"] += len(event.keys)
            return
        bit = self._known_group(event)
        if not bit:
            return
        if not event.tokens:
            self._store_known(event, bit)
        elif not self._fits(event):
            self.counts["misfits"] += len(event.keys)
        elif self._sizes.get(bit) != event.block_size and not self._is_full_size(event, bit):
            self.counts["other_sizes"] += len(event.keys)
        elif event.is_told or self._engine_chains:  # an engine's own hash covers all that a block depends on
            self._store_all(event)
        else:
            self._store_untold(event, bit)

    def void(self, medium: str) -> None:
        """Nobody knows what the engine holds in this medium: nothing, until it says so."""
        index = self._media.get(medium)
        if index is None:
            return
        mask = 1 << index
        bits = ((1 << _GROUPS) - 1) << (_GROUPS * index)
        for child in self.root.children:
            if child.covered & mask:
                self._uncover(child, medium)
        for block in self._blocks.values():
            block.held &= ~bits
        for leaf in list(self._leaves):
            self._forget(leaf)
        self._nameless.void(bits)
        self._parking.void(medium)

    def remove(self, event: Removed) -> None:
        """The engine no longer has these blocks."""
        bit = self._groups.get((event.medium, event.group), 0)
        if not bit:
            self.counts["other_groups"] += len(event.keys)
            return
        mask = self.mask(event.medium)
        for key in event.keys:
            block = self._blocks.get(key)
            if block is None:
                if not self._nameless.remove(key, bit) and not self._parking.remove(key, event):
                    self.counts["unknown_removals"] += 1
                continue
            block.held &= ~bit
            if block.covered & mask:
                self._uncover(block, event.medium)
            if not block.held:
                self._forget(block)

    def _store_known(self, event: Stored, bit: int) -> None:
        """An offload tier names blocks without their tokens."""
        for key in event.keys:
            block = self._blocks.get(key)
            if block is None:
                self.counts["unknown_blocks"] += 1
            else:
                self._credit(block, bit, event.medium)

    def _store_untold(self, event: Stored, bit: int) -> None:
        """What the blocks depend on besides tokens is not told: those known by their hash are held, others nobody's."""
        for key in event.keys:
            block = self._blocks.get(key)
            if block is None:
                self.counts["untold"] += 1
                self._nameless.add(key, bit)
            else:
                self._credit(block, bit, event.medium)

    def _is_full_size(self, event: Stored, bit: int) -> bool:
        """Whether the group's blocks are as large as these: smaller ones are tails, or of another cache beside it.

        The first larger one shows that what the group told until then was such: it counts no more.
        """
        size = self._sizes.setdefault(bit, event.block_size)
        if event.block_size <= size:
            return event.block_size == size
        self._sizes[bit] = event.block_size
        self.void(event.medium)
        return True

    def _known_group(self, event: Stored) -> int:
        """The bit of the event's group; 0 when it has none, which is counted."""
        bit = self._group(event.medium, event.group)
        if not bit and event.medium not in self._media:
            self.counts["other_media"] += len(event.keys)
        elif not bit:
            self.counts["other_groups"] += len(event.keys)
        return bit

    def _fits(self, event: Stored) -> bool:
        size, chunk = event.block_size, self._chunk_size
        if size > _MAX_BLOCK_TOKENS or not event.keys:
            return False
        if self._engine_chains and (size != chunk or len(event.names) != len(event.keys)):
            return False
        whole = size > 0 and (size % chunk == 0 or chunk % size == 0)
        return whole and len(event.tokens) == 4 * size * len(event.keys)

    def _store_all(self, event: Stored) -> None:
        parent = self.root if event.parent is None else self._blocks.get(event.parent)
        if parent is not None and not self._parking.blocks:  # nearly always
            self._append(event, parent)
            self._shrink()
            return
        waiting: deque[Stored | Removed] = deque((event,))
        while waiting:
            event_now = waiting.popleft()
            if isinstance(event_now, Removed):
                self.remove(event_now)
                continue
            parent = self._parent_of(event_now)
            if parent is None and event_now.parent in self._nameless.held:
                self._store_untold(event_now, self._group(event_now.medium, event_now.group))
                continue
            if parent is None:
                self._parking.park(event_now)
                continue
            self._append(event_now, parent)
            if self._parking.blocks:
                waiting.extend(self._parking.take(event_now.keys))
        self._shrink()

    def _parent_of(self, event: Stored) -> Block | None:
        """The block that the event goes on from; None when it is not known."""
        if event.parent is None or (event.parent == 0 and 0 not in self._blocks and not self._had_zero):
            return self.root
        return self._blocks.get(event.parent)

    def _append(self, event: Stored, parent: Block) -> None:
        blocks, bit, size = self._blocks, self._group(event.medium, event.group), 4 * event.block_size
        for i, key in enumerate(event.keys):
            block = blocks.get(key)
            if block is None:
                self._append_new(event, i, parent, bit, size)
                break
            if block.parent is not parent:  # the engine's hash names two contents: neither can be relied on
                self.counts["conflicts"] += len(event.keys) - i
                return
            if block.rest is None and parent.rest is not None and event.is_told and not self._engine_chains:
                self._add_rest(block, parent, event, i)
            self._credit(block, bit, event.medium)
            parent = block
        if self._nameless.held:
            self._name(event.keys)

    def _append_new(self, event: Stored, start: int, parent: Block, bit: int, size: int) -> None:
        """Make the blocks from `start` on, each a leaf behind the one before: most of what an ingest does."""
        if parent.rest is None:  # ends inside a chunk, and was told of before a restart
            self.counts["unknown_blocks"] += len(event.keys) - start
            return
        blocks, index, tokens, extras = self._blocks, self._media[event.medium], event.tokens, event.extras
        changed = self.changed[event.medium]
        mask = 1 << index
        counts = parent.covered & mask and bit == self._need[index]  # then all of them do
        self._leaves.pop(parent, None)
        last, extra, digest = parent.last or self._origin, b"", self._digest
        is_chunk = size == self._stride and not parent.rest and not self._engine_chains
        chunk_bytes = spare_bytes = 0
        for i in range(start, self._stop(event, start)):
            key = event.keys[i]
            if key in blocks:  # see above
                self.counts["conflicts"] += len(event.keys) - i
                break
            if extras:
                extra = extras[i]
            if is_chunk:
                last = digest(last + tokens[i * size : (i + 1) * size] + extra)
                block = Block(key, parent, last)
            else:
                made = self._make(event, i, parent, last, extra)
                if made is None:
                    self.counts["repeats"] += len(event.keys) - i
                    break
                block = made
                last = block.chunks[-HASH_BYTES:] or last
                spare_bytes += block.spare_bytes
            blocks[key] = block
            parent.add_child(block)
            block.held = bit
            chunk_bytes += len(block.chunks)
            if counts:
                block.covered = mask
                changed[block] = None
            parent = block
        if parent is not self.root and parent.is_leaf:
            self._leaves[parent] = None
        self._add_sizes(chunk_bytes, spare_bytes)
        if counts:
            self.chunks[event.medium] += chunk_bytes // HASH_BYTES

    def _name(self, keys: Iterable[int]) -> None:
        """Blocks that were nobody's have been told of: they are held where they were said to be."""
        for key in keys:
            bits, block = self._nameless.take(key), self._blocks.get(key)
            if not bits or block is None:
                continue
            for (medium, _), bit in self._groups.items():
                if bits & bit:
                    self._credit(block, bit, medium)

    def _stop(self, event: Stored, start: int) -> int:
        """Where the blocks of an event end that may be held, if all else is forgotten. The others are counted."""
        stop = min(len(event.keys), start + self._max_blocks)
        if stop < len(event.keys):
            self.counts["forgotten"] += len(event.keys) - stop
        return stop

    def _add_sizes(self, chunk_bytes: int, spare_bytes: int) -> None:
        self._bytes += chunk_bytes + spare_bytes
        self._chunks_known += chunk_bytes // HASH_BYTES

    def _make(self, event: Stored, at: int, parent: Block, last: bytes, extra: bytes) -> Block | None:
        """A block with the hashes of the chunks that end in it; what else it depends on goes into the first of them.

        None for a chunk that the engine names a second time: chained hashes cover all before them, and do not repeat.
        """
        key = event.keys[at]
        if self._engine_chains:
            chunk = event.names[at][:HASH_BYTES]
            return Block(key, parent, chunk) if self._places.setdefault(chunk, key) == key else None
        size, stride, hashes = 4 * event.block_size, self._stride, list[bytes]()
        tokens = event.tokens[at * size : (at + 1) * size]
        if parent.rest:
            tokens, extra = parent.rest + tokens, parent.extras + extra
        begin = 0
        while begin + stride <= len(tokens):
            last = self._digest(last + tokens[begin : begin + stride] + extra)
            hashes.append(last)
            extra = b""
            begin += stride
        return Block(key, parent, b"".join(hashes), tokens[begin:], extra)

    def _add_rest(self, block: Block, parent: Block, event: Stored, at: int) -> None:
        """A block that ends inside a chunk, and was restored, is told of again: its tokens are known now."""
        size = 4 * event.block_size
        block.rest = (parent.rest or b"") + event.tokens[at * size : (at + 1) * size]
        block.extras = parent.extras + (event.extras[at] if event.extras else b"")
        self._add_sizes(0, block.spare_bytes)

    # Who counts

    def _group(self, medium: str, group: int) -> int:
        """The bit of an attention group in a medium; 0 when there are too many of either."""
        bit = self._groups.get((medium, group))
        if bit is not None:
            return bit
        if medium not in self._media and len(self._media) >= self._max_media:
            return 0
        index = self._media.setdefault(medium, len(self._media))
        if index == len(self._need):
            self._need.append(0)
            self.changed[medium] = {}
        number = sum(known == medium for known, _ in self._groups)
        if number >= _GROUPS:
            return 0
        bit = self._groups[medium, group] = 1 << (_GROUPS * index + number)
        self._need[index] |= bit
        for block in list(self._blocks.values()):  # what only the groups known so far hold no longer counts
            if block.covered >> index & 1 and not block.held & bit:
                self._uncover(block, medium)
        return bit

    def _credit(self, block: Block, bit: int, medium: str) -> None:
        block.held |= bit
        index = self._media[medium]
        need, parent = self._need[index], block.parent
        if not block.covered >> index & 1 and block.held & need == need and parent and parent.covered >> index & 1:
            self._cover(block, medium)

    def _cover(self, top: Block, medium: str) -> None:
        """The block counts, and what lies behind it without a hole."""
        index, changed, stack = self._media[medium], self.changed[medium], [top]
        mask, need, chunks = 1 << index, self._need[index], 0
        while stack:
            block = stack.pop()
            block.covered |= mask
            changed[block] = None
            chunks += len(block.chunks)
            if not block.is_leaf:
                stack += [child for child in block.children if child.held & need == need]
        self.chunks[medium] += chunks // HASH_BYTES

    def _uncover(self, top: Block, medium: str) -> None:
        """Neither the block nor what lies behind it counts any more."""
        mask, changed, stack, chunks = self.mask(medium), self.changed[medium], [top], 0
        while stack:
            block = stack.pop()
            block.covered &= ~mask
            if block.told & mask:
                changed[block] = None
            else:  # Redis was never told of it
                changed.pop(block, None)
            chunks += len(block.chunks)
            if not block.is_leaf:
                stack += [child for child in block.children if child.covered & mask]
        self.chunks[medium] -= chunks // HASH_BYTES

    def _forget(self, block: Block) -> None:
        """Forget what is held nowhere and has nothing behind it."""
        while not block.held and block.is_leaf and block.parent is not None:
            parent = block.parent
            if not block.key:
                self._had_zero = True
            del self._blocks[block.key]
            self._add_sizes(-len(block.chunks), -block.spare_bytes)
            if self._engine_chains:
                self._places.pop(block.chunks, None)
            self._leaves.pop(block, None)
            parent.drop_child(block)
            if parent.is_leaf and parent.parent is not None:
                self._leaves[parent] = None
                self._leaves.move_to_end(parent, last=False)  # what is left of a prompt goes on to go first
            block = parent

    def _shrink(self) -> None:
        while self._is_too_much():
            leaf, _ = self._leaves.popitem(last=False)
            leaf.held = 0
            for medium in self._media:
                if leaf.covered & self.mask(medium):
                    self._uncover(leaf, medium)
            self.counts["forgotten"] += 1
            self._forget(leaf)

    def _is_too_much(self) -> bool:
        most = self._max_blocks
        return len(self._blocks) > most or self._chunks_known > most or self._bytes > self._max_bytes

    # After a restart of the ingest

    def restore_state(self, state: bytes) -> None:
        """Know the groups that were known. What another hand wrote is passed over."""
        try:
            known: Any = msgpack.unpackb(state) if state else []
            for medium, group, size in known:
                bit = self._group(str(medium), int(group))
                if bit and size:
                    self._sizes[bit] = int(size)
        except (ValueError, TypeError):
            self.counts["state_unreadable"] += 1

    def restore(self, medium: str, blocks: Iterable[tuple[int, int | None, bytes]]) -> None:
        """Redis was told that the medium holds these blocks: key, key of the one before, chunks; parents come first."""
        if medium not in self._media and not self._group(medium, 0):  # the state was unreadable
            self.counts["other_media"] += sum(1 for _ in blocks)
            return
        mask, groups = self.mask(medium), self._need[self._media[medium]]
        for key, before, chunks in blocks:
            parent = self.root if before is None else self._blocks.get(before)
            if parent is None or not parent.covered & mask:
                continue
            block = self._blocks.get(key)
            if block is None:
                if self._engine_chains and self._places.setdefault(chunks, key) != key:
                    self.counts["repeats"] += 1
                    continue
                block = self._blocks[key] = Block(key, parent, chunks, b"" if chunks else None)
                self._add_sizes(len(chunks), 0)
                self._leaves.pop(parent, None)
                self._leaves[block] = None
                parent.add_child(block)
            if not block.covered & mask:
                self.chunks[medium] += len(chunks) // HASH_BYTES
            block.held |= groups
            block.covered |= mask
            block.told |= mask
