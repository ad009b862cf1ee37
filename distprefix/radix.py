"""A path-compressed tree over bytes with a fixed stride: the structure of L1. Pure: no Redis, no clock, no lock.

It maps every prefix in it (a whole number of chunks) to a value; neighbours with the same value share a node. Looking
a key up compares whole runs (memcmp) and hashes nothing but each node's first chunk, for the dictionary of children.

Not thread-safe: the caller holds a lock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, NamedTuple, TypeVar

from distprefix.errors import InvalidInputError

__all__ = ["PrefixMatch", "PrefixTree", "RadixTreeNode"]

V = TypeVar("V")
_HASH_BYTES, _BLOCK_BYTES = 16, 4


class RadixTreeNode(Generic[V]):
    """A run of chunks with no branch inside. When a node is split, the lower half keeps its identity."""

    __slots__ = (
        "accessed",
        "blocks",
        "children",
        "gone",
        "hashes",
        "hits",
        "parent",
        "recent",
        "run",
        "start",
        "stop",
        "value",
    )

    def __init__(self, run: bytes, start: int, stop: int, parent: RadixTreeNode[V] | None, value: V | None) -> None:
        self.run = run
        self.start = start
        """Depth of the first chunk."""
        self.stop = stop
        """Depth behind the last chunk."""
        self.parent = parent
        self.value = value
        self.hashes = b""
        """Chunk hashes, 16 bytes each, or empty when not known."""
        self.blocks = b""
        """Block ids, 4 bytes each, or empty."""
        self.children: dict[bytes, RadixTreeNode[V]] = {}
        self.accessed = 0.0
        self.hits = 0
        self.recent = 0
        """Hits since the value was set."""
        self.gone = False
        """Taken out. Its parent is still what it was, so that who remembers it finds what lies above."""

    def __repr__(self) -> str:
        return f"<RadixTreeNode [{self.start}, {self.stop}) {len(self.children)} children>"


class PrefixMatch(NamedTuple, Generic[V]):
    """The longest prefix of a key in the tree."""

    path: list[RadixTreeNode[V]]
    """Nodes from the root down; the last may be matched in part only."""
    chunks: int


class PrefixTree(Generic[V]):
    """A set of byte strings closed under prefix, in steps of `stride` bytes, with a value for every prefix.

    ``len(tree)`` is the number of prefixes (chunks); iterating gives the longest: keys that no other extends.
    """

    def __init__(self, stride: int = 64, max_run: int = 256, weigh: Callable[[V | None], int] = lambda _: 0) -> None:
        if stride < 1 or max_run < 1:
            raise InvalidInputError(f"stride and max_run are at least 1, not {stride} and {max_run}")
        self.stride = stride
        self.max_run = max_run
        self.weight = 0
        """What the nodes' values weigh together."""
        self.heads: dict[bytes, RadixTreeNode[V]] = {}
        """Nodes by the hash of their first chunk, those whose hashes are known."""
        self._weigh = weigh
        self.root: RadixTreeNode[V] = RadixTreeNode(b"", 0, 0, None, None)
        self.nodes = 0
        self._chunks = 0

    def __len__(self) -> int:
        return self._chunks

    def __iter__(self) -> Iterator[bytes]:
        for node in self.iter_nodes():
            if not node.children:
                yield self.key_of(node)

    def iter_nodes(self) -> Iterator[RadixTreeNode[V]]:
        """Every node but the root, parents before children."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def key_of(self, node: RadixTreeNode[V]) -> bytes:
        """The key that ends with the node's last chunk."""
        return b"".join(ancestor.run for ancestor in self.path_to(node))

    @staticmethod
    def path_to(node: RadixTreeNode[V]) -> list[RadixTreeNode[V]]:
        """The nodes from below the root to `node`."""
        path: list[RadixTreeNode[V]] = []
        while node.parent is not None:
            path.append(node)
            node = node.parent
        return path[::-1]

    def leads_to(self, node: RadixTreeNode[V]) -> bool:
        """Whether a node lies below this tree's root, or lay there before it was taken out."""
        while node.parent is not None:
            node = node.parent
        return node is self.root

    def find_longest_prefix(self, key: bytes | memoryview, below: RadixTreeNode[V] | None = None) -> PrefixMatch[V]:
        """The longest prefix of `key`, in whole chunks, that is in the tree. Changes nothing.

        With `below`, a node that `key` is known to pass in full, the path begins behind that node.
        """
        view, stride = memoryview(key), self.stride
        node = below or self.root
        end, pos = len(view) - len(view) % stride, node.stop * stride
        path: list[RadixTreeNode[V]] = []
        while pos < end:
            child = node.children.get(bytes(view[pos : pos + stride]))
            if child is None:
                break
            path.append(child)
            run = child.run
            stop = pos + len(run)
            if stop > end or not run.startswith(view[pos:stop]):
                pos += stride * self._common(run, view[pos : min(stop, end)])
                break
            pos = stop
            node = child
        return PrefixMatch(path, pos // stride)

    def insert(
        self,
        key: bytes | memoryview,
        value: V | None = None,
        *,
        hashes: bytes = b"",
        start: int = 0,
        below: RadixTreeNode[V] | None = None,
    ) -> list[RadixTreeNode[V]]:
        """Put `key` and all its prefixes in; those longer than `start` chunks get `value`. Returns the path.

        `hashes` are the chunk hashes of the whole key, or nothing. Nodes that reach over `start` or the key's end are
        split there; a leaf that has the same value and room takes new chunks in. `below` as in `find_longest_prefix`.
        """
        view, stride = memoryview(key), self.stride
        if len(view) % stride:
            raise InvalidInputError(f"a key is a whole number of chunks of {stride} bytes, not {len(view)} bytes")
        total, last = len(view) // stride, below or self.root
        matched = last.stop
        path: list[RadixTreeNode[V]] = []
        if bytes(view[matched * stride : (matched + 1) * stride]) in last.children:
            path, matched = self.find_longest_prefix(view, below)
        if matched < start:
            raise InvalidInputError(f"only {matched} chunks of the first {start} are in the tree")
        if path:
            self._give(path, matched, value, start)
            last = path[-1]
            if matched < total and not last.children and last.value is value and last.start >= start:
                stop = min(total, last.start + self.max_run)
                self._append(last, view[matched * stride : stop * stride], hashes[matched * 16 : stop * 16])
                matched = max(matched, stop)
        while matched < total:
            stop = min(total, matched + self.max_run)
            node = RadixTreeNode(bytes(view[matched * stride : stop * stride]), matched, stop, last, value)
            self._know(node, hashes[matched * _HASH_BYTES : stop * _HASH_BYTES])
            last.children[node.run[:stride]] = node
            self._add(node)
            self._chunks += stop - matched
            path.append(node)
            last, matched = node, stop
        return path

    def _give(self, path: list[RadixTreeNode[V]], matched: int, value: V | None, start: int) -> None:
        """Give the nodes of a path that ends at `matched` a value from chunk `start` on, and split them there."""
        if path[-1].stop > matched:
            path[-1] = self._split(path[-1], matched - path[-1].start)
        for i, node in enumerate(path):
            if node.start < start < node.stop:
                path.insert(i, self._split(node, start - node.start))
                break
        for node in path:
            if node.start >= start:
                self.set_value(node, value)
                node.recent = 0

    def set_value(self, node: RadixTreeNode[V], value: V | None) -> None:
        """Give a node another value."""
        self.weight += self._weigh(value) - self._weigh(node.value)
        node.value = value

    def split(self, node: RadixTreeNode[V], at: int) -> RadixTreeNode[V]:
        """Cut a node's run at chunk `at` of it, though nothing branches there. Returns the upper half."""
        return self._split(node, at)

    def remove(self, key: bytes | memoryview) -> int:
        """Take `key` and all that extends it out; its siblings and shorter prefixes stay. Returns the chunks removed.

        What is left of a run becomes a leaf, and a parent left with one child of the same value merges with it.
        """
        view = memoryview(key)
        path, matched = self.find_longest_prefix(view)
        if not path or matched * self.stride != len(view) or matched == 0:
            return 0
        return self.cut(path[-1], matched - 1)

    def cut(self, node: RadixTreeNode[V], depth: int) -> int:
        """Take out what lies on or below `node` from `depth` on. Returns the chunks removed."""
        if node.start < depth:
            self._split(node, depth - node.start)
        parent = node.parent
        if parent is None or node.gone:
            return 0
        before = self._chunks
        del parent.children[node.run[: self.stride]]
        self._forget(node)
        self._merge(parent)
        return before - self._chunks

    def check_integrity(self) -> None:
        """Raise AssertionError unless every invariant holds."""
        nodes = chunks = 0
        for node in self.iter_nodes():
            nodes, chunks = nodes + 1, chunks + node.stop - node.start
            size = node.stop - node.start
            parent = node.parent
            assert parent is not None, f"{node} has no parent"
            assert parent.children.get(node.run[: self.stride]) is node, f"{node} hangs loose"
            assert node.start == parent.stop, f"{node} does not go on where its parent ends"
            assert 0 < size <= self.max_run, f"{node} has a run of {size}"
            assert len(node.run) == size * self.stride, f"{node} has {len(node.run)} bytes"
            assert len(node.hashes) in (0, size * _HASH_BYTES), f"{node} has {len(node.hashes)} bytes of hashes"
            assert len(node.blocks) in (0, size * _BLOCK_BYTES), f"{node} has {len(node.blocks)} bytes of blocks"
            assert not node.hashes or self.heads.get(node.hashes[:_HASH_BYTES]) is node, f"{node} is not in heads"
        assert (nodes, chunks) == (self.nodes, self._chunks), "the counts are off"
        assert self.weight == sum(self._weigh(node.value) for node in self.iter_nodes()), "the weight is off"
        assert all(not node.gone for node in self.heads.values()), "heads names nodes that are gone"

    def _common(self, run: bytes, view: memoryview) -> int:
        """Leading chunks that `run` and `view` share, by bisection; at least one."""
        low, high, stride = 1, min(len(view), len(run)) // self.stride, self.stride
        while low < high:
            middle = (low + high + 1) // 2
            if run.startswith(view[low * stride : middle * stride], low * stride):
                low = middle
            else:
                high = middle - 1
        return low

    def _split(self, node: RadixTreeNode[V], at: int) -> RadixTreeNode[V]:
        """Cut a node at chunk `at`; returns the new upper half."""
        stride, parent = self.stride, node.parent
        assert parent is not None
        upper: RadixTreeNode[V] = RadixTreeNode(
            node.run[: at * stride], node.start, node.start + at, parent, node.value
        )
        self._know(upper, node.hashes[: at * _HASH_BYTES])
        upper.blocks, node.blocks = node.blocks[: at * _BLOCK_BYTES], node.blocks[at * _BLOCK_BYTES :]
        upper.accessed, upper.hits = node.accessed, node.hits
        parent.children[upper.run[:stride]] = upper
        node.run, node.start, node.parent = node.run[at * stride :], upper.stop, upper
        self._know(node, node.hashes[at * _HASH_BYTES :])
        upper.children[node.run[:stride]] = node
        self._add(upper)
        if node.hashes:
            self.heads[node.hashes[:_HASH_BYTES]] = node
        return upper

    def _append(self, node: RadixTreeNode[V], run: memoryview, hashes: bytes) -> None:
        added = len(run) // self.stride
        node.run += run
        if len(node.hashes) == (node.stop - node.start) * _HASH_BYTES and len(hashes) == added * _HASH_BYTES:
            self._know(node, node.hashes + hashes)
        else:
            self._lose_head(node)
            node.hashes = b""
        if node.blocks:
            node.blocks += b"\xff" * (added * _BLOCK_BYTES)
        node.stop += added
        self._chunks += added

    def _merge(self, upper: RadixTreeNode[V]) -> None:
        """Join a node with its only child when nothing tells them apart; the child keeps its identity."""
        parent = upper.parent
        if parent is None or len(upper.children) != 1:
            return
        (lower,) = upper.children.values()
        if lower.value is not upper.value or lower.stop - upper.start > self.max_run:
            return
        if bool(upper.hashes) != bool(lower.hashes) or upper.blocks or lower.blocks:
            return
        self._lose_head(lower)
        self.weight -= self._weigh(upper.value)
        lower.run = upper.run + lower.run
        self._know(lower, upper.hashes + lower.hashes)
        lower.start, lower.parent = upper.start, parent
        lower.accessed, lower.hits = max(lower.accessed, upper.accessed), max(lower.hits, upper.hits)
        parent.children[lower.run[: self.stride]] = lower
        upper.gone = True
        self.nodes -= 1
        if lower.hashes:
            self.heads[lower.hashes[:_HASH_BYTES]] = lower

    @staticmethod
    def _know(node: RadixTreeNode[V], hashes: bytes) -> None:
        """Set a node's chunk hashes: the very object that its run is when they are the key, which halves the memory."""
        node.hashes = node.run if hashes == node.run else hashes

    def _add(self, node: RadixTreeNode[V]) -> None:
        self.nodes += 1
        self.weight += self._weigh(node.value)
        if node.hashes:
            self.heads[node.hashes[:_HASH_BYTES]] = node

    def _lose_head(self, node: RadixTreeNode[V]) -> None:
        head = node.hashes[:_HASH_BYTES]
        if head and self.heads.get(head) is node:
            del self.heads[head]

    def _forget(self, top: RadixTreeNode[V]) -> None:
        stack = [top]
        while stack:
            node = stack.pop()
            self.nodes -= 1
            self._chunks -= node.stop - node.start
            self.weight -= self._weigh(node.value)
            self._lose_head(node)
            node.gone = True
            stack.extend(node.children.values())
            node.run = node.hashes = node.blocks = b""
            node.children = {}
