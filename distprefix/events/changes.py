"""From what an engine holds and what Redis was told of it to what Redis has to be told, and back. Pure."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from distprefix.chunking import HASH_BYTES
from distprefix.events.blocks import Block
from distprefix.events.holdings import Holdings

__all__ = ["KEY_BYTES", "Change", "Covered", "blocks_of", "changes", "confirm", "confirm_part", "reject"]

KEY_BYTES = 8
_MOST_CHUNKS = 4096
_MOST_CHANGES = 200
_NO_KEY = bytes(KEY_BYTES)


class Change(NamedTuple):
    """One thing to tell: the medium holds a chain, or it no longer holds a chain's last chunk and what lies behind."""

    medium: str
    publish: bool
    depth: int
    """Where the chain begins: with a node's head, as far as is known."""
    chain: bytes
    labels: bytes
    """The engine's keys of the blocks, so that whoever takes over knows them: as many bytes for every chunk."""
    path: Sequence[Block]
    """The blocks whose chunks the chain is made of; the last one is the one lost."""


class Covered(NamedTuple):
    """What Redis says that a medium holds of one radix node."""

    medium: str
    parent: bytes
    """Hash of the chunk before the node; empty for a root."""
    depth: int
    chunks: bytes
    """Those of the node's chunks that are held."""
    labels: bytes


def changes(holdings: Holdings) -> tuple[list[Change], bool]:
    """What Redis has to be told next, and whether that is all. Each is to be confirmed or rejected.

    At most about 4,096 chunks; what was lost comes before what is new.
    """
    found = list[Change]()
    for medium, changed in holdings.changed.items():
        mask = holdings.mask(medium)
        for block in changed:
            if block.told & mask and not block.covered & mask and block.chunks and _goes_on(block, mask):
                found.append(_withdrawal(block, medium, mask))
                if len(found) >= _MOST_CHANGES:
                    return found, False
    left = _MOST_CHUNKS
    for medium, changed in holdings.changed.items():
        mask = holdings.mask(medium)
        for tip in _tips(changed, mask):
            if left <= 0 or len(found) >= _MOST_CHANGES:
                return found, False
            change = _publication(tip, medium, mask)
            found.append(change)
            left -= len(change.chain) // HASH_BYTES if change.path[-1] is tip else left
    if not found:
        for medium, changed in holdings.changed.items():
            _settle(changed, holdings.mask(medium))
    return found, left > 0


def _goes_on(lost: Block, mask: int) -> bool:
    """Whether what lies before a lost block still counts: else that is what has to be told."""
    return lost.anchor is not None and bool(lost.anchor.covered & mask)


def _tips(changed: Iterable[Block], mask: int) -> list[Block]:
    """New blocks with nothing new behind them."""
    fresh = [block for block in changed if block.covered & mask and not block.told & mask and block.chunks]
    inner = {block.anchor for block in fresh}
    return [block for block in fresh if block not in inner]


def _settle(changed: dict[Block, None], mask: int) -> None:
    """Blocks that end inside a chunk are told of with the one that ends it."""
    for block in changed:
        block.told = block.told & ~mask | block.covered & mask
    changed.clear()


def _withdrawal(lost: Block, medium: str, mask: int) -> Change:
    path = _path(lost, mask)
    chain = b"".join([block.chunks for block in path[:-1]]) + lost.chunks[:HASH_BYTES]
    return Change(medium, False, _start(path[0]), chain, b"", path)


def _publication(tip: Block, medium: str, mask: int) -> Change:
    path, chunks = _path(tip, mask), 0
    for i, block in enumerate(path):
        chunks += len(block.chunks) // HASH_BYTES
        if chunks >= _MOST_CHUNKS:
            path = path[: i + 1]  # the rest goes on from a head that the reply tells
            break
    chain = b"".join([block.chunks for block in path])
    return Change(medium, True, _start(path[0]), chain, _labels(path), path)


def _path(block: Block, mask: int) -> list[Block]:
    """The blocks with chunks from the nearest known head, which Redis was told of, down to this one."""
    path = [block]
    while True:
        above = block.anchor
        if above is None or above.anchor is None or (block.is_head and above.told & mask):
            path.reverse()
            return path
        block = above
        path.append(block)


def _start(block: Block) -> int:
    return block.depth - len(block.chunks) // HASH_BYTES


def _labels(path: Sequence[Block]) -> bytes:
    """For each chunk of a block: nothing but for the last, or the keys of all blocks that lie in the chunk."""
    keys = array("Q")
    for block in path:
        above, anchor, size = block.parent, block.anchor, len(block.chunks)
        if size > HASH_BYTES:
            keys.extend([0] * (size // HASH_BYTES - 1))
        if above is not anchor:
            inner: list[int] = []
            while above is not None and above is not anchor:
                inner.append(above.key)
                above = above.parent
            keys.extend(reversed(inner))
        keys.append(block.key)
    if sys.byteorder == "big":
        keys.byteswap()
    return keys.tobytes()


def confirm(holdings: Holdings, change: Change, heads: Iterable[int] = ()) -> None:
    """Redis knows it now; `heads`: chunks of the chain that nodes begin with."""
    mask, changed = holdings.mask(change.medium), holdings.changed[change.medium]
    if not change.publish:
        stack = [change.path[-1]]
        while stack:
            block = stack.pop()
            block.told &= ~mask
            stack += [child for child in block.children if child.told & mask or not child.chunks]
        return
    starts, at = set(heads), 0
    for block in change.path:
        if not block.told & mask:
            block.told |= mask
            if block.covered & mask:
                changed.pop(block, None)
        block.is_head = at in starts
        at += len(block.chunks) // HASH_BYTES


def confirm_part(holdings: Holdings, change: Change, chunks: int, heads: Iterable[int]) -> bool:
    """Redis knows the leading chunks of a publication now; the rest follows. Whether any block of them is new.

    Where none is, as in a block of more nodes than one call takes, the change is given up: it would never end.
    """
    mask = holdings.mask(change.medium)
    count = 0
    at = 0
    for block in change.path:
        at += len(block.chunks) // HASH_BYTES
        if at > chunks:
            break
        count += 1
    is_new = any(not block.told & mask for block in change.path[:count])
    confirm(holdings, change._replace(path=change.path[:count]) if is_new else change, heads)
    return is_new


def reject(holdings: Holdings, change: Change) -> None:
    """The chain does not begin with a node's head, or its parent is not covered: next time it goes from the root."""
    if not change.depth and not change.publish:
        confirm(holdings, change)  # Redis knows nothing of it
    block: Block | None = change.path[-1]
    while block is not None:
        block.is_head = False
        block = block.anchor


def blocks_of(covered: Iterable[Covered]) -> Iterator[tuple[str, list[tuple[int, int | None, bytes]]]]:
    """The engine's blocks, node by node with its medium, as `Holdings.restore` takes them, from what Redis was told."""
    ends: dict[tuple[str, bytes], tuple[int | None, bytes]] = {}
    for part in sorted(covered, key=lambda part: part.depth):
        end = ends.get((part.medium, part.parent)) if part.parent else (None, b"")
        size = len(part.chunks) // HASH_BYTES
        if end is None or not size or len(part.labels) % (size * KEY_BYTES):
            continue  # a hole above, or another hand wrote it
        before, pending = end
        blocks, width = list[tuple[int, int | None, bytes]](), len(part.labels) // size
        for at in range(size):
            chunk = part.chunks[at * HASH_BYTES : (at + 1) * HASH_BYTES]
            label = part.labels[at * width : (at + 1) * width]
            pending += chunk
            if label == _NO_KEY:
                continue
            for i in range(0, width, KEY_BYTES):
                key = int.from_bytes(label[i : i + KEY_BYTES], "little")
                blocks.append((key, before, pending if i == width - KEY_BYTES else b""))
                before = key
            pending = b""
        ends[part.medium, part.chunks[-HASH_BYTES:]] = (before, pending)
        yield part.medium, blocks
