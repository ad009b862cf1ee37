"""Which of this worker's blocks its chunks lie in: its own truth, whatever L1 or Redis loses. No Redis, no lock.

Kept by chunk hash, so that a prompt is the same one whether it comes as tokens or as a chain.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterable, Iterator

from distprefix.chunking import HASH_BYTES
from distprefix.radix import PrefixTree, RadixTreeNode

__all__ = ["OwnBlocks", "UnnamedChains", "node_at"]

Node = RadixTreeNode[bool]
_FEW_REFERENCES = 64
_MAX_UNNAMED_BYTES = 16 * 2**20


def node_at(node: RadixTreeNode[bool], depth: int) -> Node | None:
    """The node that has the chunk at `depth` on the way to `node`, which may have been split; None when it is gone."""
    if depth >= node.stop:
        return None
    current: Node | None = node
    while current is not None and current.start > depth:
        current = current.parent
    return None if current is None or current.gone else current


class OwnBlocks:
    """A tree of the worker's chains with a block id for every chunk; a node's value: whether Redis was told of it.

    Closed under prefix: a chunk whose block is gone takes along what lies behind it. Bounded: the chain published
    longest ago is given up, from its tail on.

    A change that an exception cut short leaves it torn: then it has no blocks for anybody, until it is reset.
    """

    def __init__(self, max_run: int, max_chunks: int) -> None:
        self._max_run = max_run
        self._max_chunks = max_chunks
        self.reset()

    def reset(self) -> None:
        """Begin anew, empty, whatever state it is in."""
        self.is_torn = True  # an interrupt before the end has all of it done again
        self._tree: PrefixTree[bool] = PrefixTree(HASH_BYTES, self._max_run)
        self._references: dict[int, list[tuple[Node, int]]] = {}
        """Block to the nodes and depths that it was given to; what moved or went is skipped when it is read."""
        self._leaves: OrderedDict[Node, None] = OrderedDict()
        """Longest ago published first."""
        self.is_torn = False

    def __len__(self) -> int:
        return len(self._tree)

    def has(self, node: Node) -> bool:
        """Whether a node is in the tree, which a reset replaces, or was there when it was taken out."""
        return self._tree.leads_to(node)

    def remember(self, hashes: bytes, blocks: bytes, *, told: bool) -> tuple[Node, int | None]:
        """The chain's chunks lie in these blocks; `told` says whether Redis knows.

        Returns its last node, and the depth of the first chunk that lay in another block until now.
        """
        path = self._tree.insert(hashes, told)
        moved: int | None = None
        ids = array("I", blocks)
        for node in path:
            new = ids[node.start : node.stop]
            old = array("I", node.blocks)
            if new == old:
                continue
            for i, block in enumerate(new):
                if i >= len(old) or old[i] != block:
                    if i < len(old) and old[i] != 0xFFFFFFFF and moved is None:
                        moved = node.start + i
                    self._refer(block, node, node.start + i)
            node.blocks = new.tobytes()
        last = path[-1]
        self._leaves.pop(last, None)
        if not last.children:
            self._leaves[last] = None
        return last, moved

    def tell(self, hashes: bytes, depth: int) -> tuple[Node | None, int]:
        """Redis was told of the chain's chunks up to `depth`.

        Returns the node of the chain's last chunk that this worker still has, and how many it has.
        """
        path, held = self._tree.find_longest_prefix(hashes)
        told = min(held, depth)
        if told:
            self._tree.insert(hashes[: told * HASH_BYTES], True)
        if told == held:
            return path[-1] if path else None, held
        return self._tree.find_longest_prefix(hashes).path[-1], held

    def give_up(self) -> list[bytes]:
        """Forget what is over the bound. Returns the chains whose last chunk, and all behind it, is forgotten."""
        lost: list[bytes] = []
        while len(self._tree) > self._max_chunks:
            leaf, _ = self._leaves.popitem(last=False)
            if not leaf.gone and not leaf.children:
                lost.append(self._cut(leaf, leaf.start))
        return lost

    def ids(self, hashes: bytes) -> tuple[int, ...]:
        """The blocks of a chain's leading chunks, as many as this worker has."""
        if self.is_torn:
            return ()
        path, matched = self._tree.find_longest_prefix(hashes)
        return tuple(array("I", b"".join(node.blocks for node in path)[: 4 * matched]))

    def told_up_to(self, hashes: bytes, blocks: bytes) -> int:
        """How many leading chunks Redis was told to lie in just these blocks."""
        depth = 0
        for node in self._tree.find_longest_prefix(hashes).path:
            if not node.value or node.blocks != blocks[4 * node.start : 4 * node.stop]:
                break
            depth = node.stop
        return depth

    def leaves(self) -> list[Node]:
        """The last node of every chain, published longest ago first."""
        return list(self._leaves)

    def chain_to(self, node: Node) -> tuple[bytes, bytes]:
        """The chunk hashes and blocks from the root to a node's end, or to what precedes it when it was removed."""
        last: Node | None = node
        while last is not None and last.gone:
            last = last.parent
        path = [] if last is None else PrefixTree.path_to(last)
        return b"".join(part.run for part in path), b"".join(part.blocks for part in path)

    def confirm(self, hashes: bytes, blocks: bytes) -> int:
        """Redis has a chain in these blocks. Returns how many of its leading chunks still lie in them."""
        depth = 0
        for node in self._tree.find_longest_prefix(hashes).path:
            if node.blocks != blocks[4 * node.start : 4 * node.stop]:
                break
            self._tree.set_value(node, True)
            depth = node.stop
        return depth

    def forget_told(self) -> None:
        """Redis knows none of it any more."""
        for node in self._tree.iter_nodes():
            self._tree.set_value(node, False)

    def remove(self, block_ids: Iterable[int]) -> tuple[int, list[bytes]]:
        """Forget blocks, and what lies behind them.

        Returns how many were known, and the chains whose last chunk, and all behind it, this worker no longer has.
        """
        removed, places = 0, list[tuple[int, Node]]()
        for block in block_ids:
            found = [(depth, node) for node, depth in self._valid(block, self._references.pop(block, []))]
            removed += bool(found)
            places += found
        places.sort(key=lambda place: place[0])
        lost: list[bytes] = []
        for depth, reference in places:
            node = node_at(reference, depth)
            if node is not None:
                lost.append(self._cut(node, depth))
        return removed, lost

    def clear(self) -> None:
        """Forget everything."""
        self.reset()

    def _valid(self, block: int, references: list[tuple[Node, int]]) -> list[tuple[Node, int]]:
        valid: list[tuple[Node, int]] = []
        for reference, depth in references:
            node = node_at(reference, depth)
            if node is not None:
                at = 4 * (depth - node.start)
                if node.blocks[at : at + 4] == array("I", (block,)).tobytes():
                    valid.append((node, depth))
        return valid

    def _refer(self, block: int, node: Node, depth: int) -> None:
        references = self._references.setdefault(block, [])
        if len(references) >= _FEW_REFERENCES and len(references) & (len(references) - 1) == 0:
            references = self._references[block] = self._valid(block, references)
        references.append((node, depth))

    def _cut(self, node: Node, depth: int) -> bytes:
        chain = self._tree.key_of(node)[: (depth + 1) * HASH_BYTES]
        stack, lost = [node], array("I", node.blocks[4 * (depth - node.start) :])
        while stack:
            part = stack.pop()
            self._leaves.pop(part, None)
            stack += part.children.values()
            for child in part.children.values():
                lost.frombytes(child.blocks)
        parent = node.parent
        self._tree.cut(node, depth)
        for block in set(lost):
            left = self._valid(block, self._references.pop(block, []))
            if left:
                self._references[block] = left
        above = node.parent or parent
        if above is not None and above.parent is not None and not above.gone and not above.children:
            self._leaves[above] = None
        return chain


class UnnamedChains:
    """The chains that this worker published last without naming blocks, up to 16 MiB of hashes."""

    def __init__(self, max_bytes: int = _MAX_UNNAMED_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        self._chains: OrderedDict[bytes, None] = OrderedDict()

    def __iter__(self) -> Iterator[bytes]:
        """Longest ago first."""
        return iter(self._chains)

    def add(self, chain: bytes) -> None:
        """It was published now."""
        if chain in self._chains:
            self._chains.move_to_end(chain)
            return
        self._chains[chain] = None
        self._bytes += len(chain)
        while self._bytes > self._max_bytes:
            self._bytes -= len(self._chains.popitem(last=False)[0])

    def clear(self) -> None:
        """Forget all of them."""
        self._chains.clear()
        self._bytes = 0
