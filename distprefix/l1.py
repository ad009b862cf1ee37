"""L1: what this process knows of the shared tree. No Redis; the clock is passed in; the caller holds a lock.

A tree for prompts that come as tokens, one for chains, one budget for both. Every node carries a snapshot of the L2
node it was learned from.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from distprefix.chunking import HASH_BYTES, Prompt
from distprefix.nodes import NodeView, Snapshot
from distprefix.radix import PrefixTree, RadixTreeNode

__all__ = ["L1", "Found", "Live", "Node"]

_UNCONFIRMED = float("-inf")
_NOTHING = (0, 0)  # epoch and end of who covers nothing
# Measured: node object, snapshot, children's dictionary and its key, queue entry. A test holds it to tracemalloc.
_NODE_BYTES = 830
_HOLDER_BYTES = 85

Node = RadixTreeNode[Snapshot]
Live = Callable[[str, int], bool]
P = ParamSpec("P")
T = TypeVar("T")


def _weigh(snapshot: Snapshot | None) -> int:
    return _HOLDER_BYTES * len(snapshot.holders) if snapshot else 0


class Found(NamedTuple):
    """A prompt's path in L1."""

    path: list[Node]
    chunks: int
    fresh: int
    """Leading chunks whose snapshots are young enough to be trusted."""
    resume: int
    """Depth of the L2 head that a walk has to begin at."""

    def path_to(self, depth: int) -> list[Node]:
        """The path as far as the node that the chunk before `depth` is in."""
        end = len(self.path)
        while self.path[end - 1].start >= depth:
            end -= 1
        return self.path if end == len(self.path) else self.path[:end]


def _change(method: Callable[Concatenate[L1, P], T]) -> Callable[Concatenate[L1, P], T]:
    """A change that a signal handler's exception may cut short: what it leaves is cleared before it is used again."""

    @wraps(method)
    def changed(self: L1, *args: P.args, **kwargs: P.kwargs) -> T:
        if self.is_torn:
            self.reset()
        try:
            return method(self, *args, **kwargs)
        except BaseException:
            self.is_torn = True
            raise

    return changed


class L1:
    """A tree of snapshots, bounded in bytes: leaves go first, hot ones last, each by age of use."""

    def __init__(self, chunk_size: int, max_run: int, max_bytes: int, ttl_s: float, hot_threshold: int) -> None:
        self.max_bytes = max_bytes
        self.ttl_s = ttl_s
        self.evicted_chunks = 0
        self._hot_threshold = hot_threshold
        self._chunk_size = chunk_size
        self._max_run = max_run
        self._queued = 0
        self.reset()

    def reset(self) -> None:
        """Begin anew, empty, whatever state it is in."""
        self.is_torn = True  # an interrupt before the end has all of it done again
        """Whether a change was cut short: the counts, the queue or a node may be wrong."""
        self._trees: dict[bool, PrefixTree[Snapshot]] = {
            False: PrefixTree(4 * self._chunk_size, self._max_run, _weigh),
            True: PrefixTree(HASH_BYTES, self._max_run, _weigh),
        }
        self._queue: list[tuple[bool, float, int, Node, PrefixTree[Snapshot]]] = []
        self.is_torn = False

    @property
    def bytes(self) -> int:
        """Memory in use, an estimate held to within a fifth of the truth."""
        tokens, chains = self._trees[False], self._trees[True]
        runs = len(tokens) * (tokens.stride + HASH_BYTES) + len(chains) * HASH_BYTES  # the run of a chain is its hashes
        return runs + (tokens.nodes + chains.nodes) * _NODE_BYTES + tokens.weight + chains.weight

    @property
    def chunks(self) -> int:
        """Chunks in both trees."""
        return sum(len(tree) for tree in self._trees.values())

    @property
    def nodes(self) -> int:
        """Nodes in both trees."""
        return sum(tree.nodes for tree in self._trees.values())

    @property
    def chains(self) -> int:
        """Chunks in the tree of chains."""
        return len(self._trees[True])

    def tree(self, prompt: Prompt) -> PrefixTree[Snapshot]:
        """The tree that this kind of prompt is compared with."""
        return self._trees[prompt.is_chain]

    def has(self, node: Node) -> bool:
        """Whether a node is in one of the trees, which a reset replaces, or was there when it was taken out."""
        return any(tree.leads_to(node) for tree in self._trees.values())

    def iter_nodes(self) -> Iterable[Node]:
        """Every node of both trees."""
        for tree in self._trees.values():
            yield from tree.iter_nodes()

    def find(self, prompt: Prompt, now: float, ttl_s: float | None = None) -> Found:
        """The longest known prefix, and how much of it may be trusted: what was told within `ttl_s`."""
        if self.is_torn:
            self.reset()
        path, chunks = self._trees[prompt.is_chain].find_longest_prefix(prompt.view)
        oldest, resume = now - (self.ttl_s if ttl_s is None else ttl_s), 0
        for node in path:
            snapshot = node.value
            if snapshot is None or not snapshot.head:
                return Found(path, chunks, node.start, resume)
            resume = snapshot.start
            if snapshot.at < oldest:
                return Found(path, chunks, node.start, resume)
        return Found(path, chunks, chunks, resume)

    def published_up_to(self, found: Found, holder: str, epoch: int, told: int) -> int:
        """The L2 head that a publish can begin at: Redis just said that the holder covers all above it.

        `told`: depth up to which it knows the block ids as well.
        """
        begin = 0
        for node in found.path:
            snapshot = node.value
            if snapshot is None or node.stop > min(found.fresh, told):
                break
            held_epoch, end = snapshot.holders.get(holder, _NOTHING)
            if held_epoch != epoch or end < node.stop:
                break
            begin = snapshot.start
        return begin

    @_change
    def assume(self, prompt: Prompt, hashes: bytes, holder: str, epoch: int, told: int = 0) -> None:
        """The holder has the prompt's chunks, but Redis was told of the first `told` only: look-ups ask again."""
        tree = self._trees[prompt.is_chain]
        path, chunks = tree.find_longest_prefix(prompt.view)
        for node in path:
            if node.value is not None and node.stop > told:
                holders = {**node.value.holders, holder: (epoch, min(node.stop, chunks))}
                tree.set_value(node, node.value._replace(holders=holders, at=_UNCONFIRMED))
        snapshot = Snapshot(b"", chunks, prompt.chunks, {holder: (epoch, prompt.chunks)}, 0, 0, 0, b"", _UNCONFIRMED)
        for node in tree.insert(prompt.view, snapshot, hashes=hashes, start=chunks):
            self._enqueue(node, tree)

    @_change
    def retract(self, chain: bytes, holder: str) -> None:
        """The holder no longer has the chain's last chunk, nor anything behind it."""
        depth = len(chain) // HASH_BYTES - 1
        for tree in self._trees.values():
            node = _node_on(tree, chain, depth)
            stack = [node] if node else []
            while stack:
                part = stack.pop()
                if part.value is not None and holder in part.value.holders:
                    epoch, end = part.value.holders[holder]
                    holders = {**part.value.holders, holder: (epoch, min(end, depth))}
                    tree.set_value(part, part.value._replace(holders=holders))
                    stack.extend(part.children.values())

    @_change
    def learn(
        self, prompt: Prompt, hashes: bytes, offset: int, views: list[NodeView], now: float, *, sure: bool = True
    ) -> list[Node]:
        """Take over what a script told of the prompt's path from depth `offset` on; `hashes` begin there as well.

        Not `sure`: it may be outdated already, so that look-ups ask again.
        Returns the path's nodes from the first view on; nothing when L1 forgot the way there meanwhile.
        """
        tree, stride = self._trees[prompt.is_chain], prompt.stride
        whole = bytes(offset * HASH_BYTES) + hashes if offset else hashes
        below: Node | None = None
        if offset:
            known = tree.find_longest_prefix(prompt.view[: offset * stride])
            if known.chunks < offset:
                return []
            below = known.path[-1] if known.path[-1].stop == offset else None
        learned: list[Node] = []
        for view in views:
            start, snapshot = view.start, _snapshot_of(view, whole, now if sure else _UNCONFIRMED)
            key = prompt.view[: (start + view.matched) * stride]
            path = tree.insert(key, snapshot, hashes=whole, start=start, below=below)
            if path[0].start < start:
                path = [node for node in path if node.start >= start]
            learned += path
            below = path[-1]
        for node in learned:
            node.accessed = max(node.accessed, now)
        if learned:
            self._enqueue(learned[-1], tree)  # only the last can be a leaf
        return learned

    def credible(self, hashes: bytes, offset: int, views: list[NodeView]) -> list[NodeView]:
        """What was told of a chain, up to a node whose head L1 knows at another depth: that chain has a chunk twice."""
        heads = self._trees[True].heads
        for i, view in enumerate(views):
            at = (view.start - offset) * HASH_BYTES
            node = heads.get(hashes[at : at + HASH_BYTES])
            if node is not None and node.start != view.start:
                return views[:i]
        return views

    def distrust(self, nodes: Iterable[Node]) -> None:
        """What was told of these nodes may be outdated: look-ups ask again."""
        for node in nodes:
            if node.value is not None:
                node.value = node.value._replace(at=_UNCONFIRMED)

    @_change
    def adopt(self, prompt: Prompt, hashes: bytes, now: float) -> None:
        """Let a prompt of tokens know what a chain with its `hashes` does: what came as hashes learns its tokens."""
        chains, tree = self._trees[True], self._trees[False]
        known, there = chains.find_longest_prefix(hashes), tree.find_longest_prefix(prompt.view).chunks
        for node in known.path:
            if node.value is None or not node.value.head:
                return
            end = min(node.stop, known.chunks)
            if end <= there:
                continue  # what this tree knows may be newer
            start = max(node.start, there)
            path = tree.insert(prompt.view[: end * prompt.stride], node.value, hashes=hashes, start=start)
            path[-1].accessed = now
            self._enqueue(path[-1], tree)

    @_change
    def as_chain(self, node: Node, depth: int) -> bytes:
        """Let the tree of chains know the way to `depth` as well. Returns it; empty when it is gone."""
        path = PrefixTree.path_to(node)
        chain = b"".join(part.hashes for part in path)
        if not self.has(node) or node.gone or node.stop != depth or len(chain) != depth * HASH_BYTES:
            return b""
        for part in path:
            if part.value is None or not part.value.head:
                return b""
            if part.run != part.hashes:
                known = self._trees[True].insert(
                    chain[: part.stop * HASH_BYTES], part.value, hashes=chain, start=part.start
                )
                self._enqueue(known[-1], self._trees[True])
        return chain

    @_change
    def learn_chain(self, chain: bytes, view: NodeView, now: float, *, sure: bool = True) -> bool:
        """Take over a node that came without being asked for: `chain` ends with its run.

        Whether it could be: L1 knows all that precedes the node, and its head at no other depth.
        """
        tree = self._trees[True]
        known = tree.find_longest_prefix(chain[: view.start * HASH_BYTES]).chunks
        if known < view.start or not self.credible(chain[view.start * HASH_BYTES :], view.start, [view]):
            return False
        snapshot = _snapshot_of(view, chain, now if sure else _UNCONFIRMED)
        path = tree.insert(chain, snapshot, hashes=chain, start=view.start)
        path[-1].accessed = now
        self._enqueue(path[-1], tree)
        return True

    @_change
    def cut(self, prompt: Prompt, depth: int) -> None:
        """Forget what L1 has of the prompt's path from `depth` on: Redis does not have it."""
        tree = self._trees[prompt.is_chain]
        for node in tree.find_longest_prefix(prompt.view).path:
            if node.stop > depth:
                parent = node.parent
                tree.cut(node, max(depth, node.start))
                self._requeue_leaf(parent, tree)
                return

    def coverage(self, path: list[Node], chunks: int, live: Live) -> dict[str, int]:
        """How many leading chunks of the path each live holder has.

        Who covers a node covers all above it, so what a node tells counts for the whole path, unless something above
        it has been read more recently and does not name the holder.
        """
        reached: dict[str, int] = {}
        alive: dict[str, int] = {}  # epochs found live: mostly the same all along the path
        newest = _UNCONFIRMED
        for node in path:
            snapshot = node.value
            if snapshot is None:
                break
            start, stop, at = node.start, node.stop, snapshot.at
            for name, (epoch, end) in snapshot.holders.items():
                if (
                    end > start
                    and (at >= newest or reached.get(name, 0) == start)
                    and (alive.get(name) == epoch or live(name, epoch))
                ):
                    alive[name] = epoch
                    reached[name] = end if end < stop else stop  # noqa: FURB136 - min() takes longer than all else here
            if at > newest:  # noqa: PLR1730 - likewise
                newest = at
        return reached if not path or path[-1].stop <= chunks else {name: min(k, chunks) for name, k in reached.items()}

    def hashes(self, path: list[Node], start: int, stop: int) -> bytes:
        """Chunk hashes [start, stop) of a path."""
        parts = [node.hashes for node in path if node.stop > start and node.start < stop]
        if not parts:
            return b""
        first = next(node.start for node in path if node.stop > start)
        return b"".join(parts)[(start - first) * HASH_BYTES : (stop - first) * HASH_BYTES]

    def touch(self, node: Node, now: float, hits: int = 1) -> None:
        """The node was used: it and what precedes it stay longer."""
        node.accessed = now
        node.hits += hits
        node.recent += hits

    @_change
    def clear(self) -> None:
        """Forget everything."""
        for tree in self._trees.values():
            for child in list(tree.root.children.values()):
                tree.cut(child, child.start)
        self._queue.clear()

    # What the log tells

    @_change
    def forget(self, head: str) -> None:
        """The L2 node is gone, and with it all that lay behind it."""
        for tree in self._trees.values():
            node = tree.heads.get(bytes.fromhex(head))
            if node is not None:
                parent = node.parent
                tree.cut(node, node.start)
                self._requeue_leaf(parent, tree)

    @_change
    def split(self, upper: str, lower: str) -> None:
        """The L2 node `upper` ends before the chunk `lower` now, which is a node's head."""
        head = bytes.fromhex(lower)
        for tree, parts in self._parts(upper):
            for node in parts:
                at = node.hashes.find(head)
                if at >= 0 and at % HASH_BYTES == 0:
                    if at:
                        tree.split(node, at // HASH_BYTES)
                    self._relabel(tree, parts, node, head)
                    break

    @_change
    def trim(self, head: str, size: int) -> None:
        """The L2 node has only so many chunks left."""
        for tree, parts in self._parts(head):
            depth = parts[0].start + size
            for node in parts:
                if node.stop > depth and not node.gone:
                    tree.cut(node, max(depth, node.start))
                    self._requeue_leaf(node.parent, tree)
                for part in (node, node.parent):
                    if part and not part.gone and part.value and part.value.head == bytes.fromhex(head):
                        tree.set_value(part, _cut_at(part.value, depth))

    @_change
    def doubt(self, head: str) -> None:
        """Who covers the L2 node has changed: ask again."""
        for _, parts in self._parts(head):
            self.distrust(parts)

    def _parts(self, head: str) -> list[tuple[PrefixTree[Snapshot], list[Node]]]:
        """For each tree that knows the L2 node: its parts there, from the top down."""
        name, found = bytes.fromhex(head), list[tuple[PrefixTree[Snapshot], list[Node]]]()
        for tree in self._trees.values():
            node = tree.heads.get(name)
            parts: list[Node] = [node] if node is not None else []
            for part in parts:
                parts += [child for child in part.children.values() if child.value and child.value.head == name]
            if parts:
                found.append((tree, parts))
        return found

    @staticmethod
    def _relabel(tree: PrefixTree[Snapshot], parts: list[Node], lower: Node, head: bytes) -> None:
        depth = lower.start
        for part in [*parts, lower.parent]:
            if part is None or part.value is None:
                continue
            if part.start >= depth:
                tree.set_value(part, part.value._replace(head=head, start=depth))
            elif part.value.stop > depth:
                tree.set_value(part, _cut_at(part.value, depth))

    # Budget

    @_change
    def shrink(self) -> int:
        """Evict leaves until the budget holds. Returns the chunks evicted."""
        if self.bytes <= self.max_bytes:
            return 0
        before = self.chunks
        while self._queue and self.bytes > self.max_bytes:
            hot, accessed, _, node, tree = heapq.heappop(self._queue)
            if node.gone or node.children:
                continue  # gone, or not a leaf: queued again when it becomes one
            if (node.hits >= self._hot_threshold, node.accessed) > (hot, accessed):
                self._enqueue(node, tree)
                continue
            parent = node.parent
            if parent is None:
                continue
            parent.accessed = max(parent.accessed, node.accessed)
            tree.cut(node, node.start)
            self._requeue_leaf(parent, tree)
        evicted = before - self.chunks
        self.evicted_chunks += evicted
        return evicted

    def _enqueue(self, node: Node, tree: PrefixTree[Snapshot]) -> None:
        if node.children or node.gone or node.parent is None:
            return
        self._queued += 1
        hot = node.hits >= self._hot_threshold
        heapq.heappush(self._queue, (hot, node.accessed, self._queued, node, tree))
        queued = len(self._queue)
        if queued > 64 and queued > 64 + 4 * self.nodes:  # entries of nodes that are gone or were queued again
            self._requeue_all()

    def _requeue_leaf(self, node: Node | None, tree: PrefixTree[Snapshot]) -> None:
        if node is not None and not node.children:
            self._enqueue(node, tree)

    def _requeue_all(self) -> None:
        self._queue.clear()
        for tree in self._trees.values():
            for node in tree.iter_nodes():
                if not node.children:
                    self._queued += 1
                    hot = node.hits >= self._hot_threshold
                    self._queue.append((hot, node.accessed, self._queued, node, tree))
        heapq.heapify(self._queue)

    def hottest(self, threshold: int) -> list[Any]:
        """Nodes with at least so many hits, most first."""
        nodes = [node for node in self.iter_nodes() if node.value and node.value.hits + node.recent >= threshold]
        return sorted(nodes, key=lambda node: -(node.recent + (node.value.hits if node.value else 0)))


def _snapshot_of(view: NodeView, hashes: bytes, at: float) -> Snapshot:
    """What to remember of a node; `hashes` are those of its path, from the root on."""
    head, stop = hashes[view.start * HASH_BYTES : (view.start + 1) * HASH_BYTES], view.start + view.size
    return Snapshot(head, view.start, stop, view.holders, view.hits, view.accessed, view.created, view.metadata, at)


def _cut_at(snapshot: Snapshot, depth: int) -> Snapshot:
    """The snapshot of a node that ends at `depth` now; metadata belongs to the end that it had."""
    return snapshot._replace(stop=depth, metadata=b"") if snapshot.stop > depth else snapshot


def _node_on(tree: PrefixTree[Snapshot], chain: bytes, depth: int) -> Node | None:
    """The node that has the chain's chunk at `depth`: the nearest head above it belongs to it, if the tree has it."""
    wanted = chain[depth * HASH_BYTES : (depth + 1) * HASH_BYTES]
    for start in range(depth, max(-1, depth - tree.max_run), -1):
        node = tree.heads.get(chain[start * HASH_BYTES : (start + 1) * HASH_BYTES])
        if node is not None:
            at = (depth - node.start) * HASH_BYTES
            return node if node.hashes[at : at + HASH_BYTES] == wanted else None
    return None
