"""The L1 tree against a model: a dict from prefixes to values."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from distprefix import PrefixTree, RadixTreeNode
from distprefix.errors import InvalidInputError

STRIDE = 2
Key = tuple[int, ...]
KEYS = st.lists(st.integers(0, 2), max_size=12).map(tuple)
VALUES = [object() for _ in range(3)]


def key(chunks: Key) -> bytes:
    """Two bytes a chunk that differ only in the second."""
    return b"".join(bytes((7, chunk)) for chunk in chunks)


def hashes(chunks: Key) -> bytes:
    """Sixteen bytes a chunk that depend on all before it, as real ones do."""
    return b"".join(hash(chunks[:i]).to_bytes(16, "big", signed=True) for i in range(1, len(chunks) + 1))


def values_of(tree: PrefixTree[Any]) -> dict[Key, Any]:
    """Every prefix in the tree with its value."""
    found: dict[Key, Any] = {}
    for node in tree.iter_nodes():
        chunks = tuple(tree.key_of(node)[1::2])
        for depth in range(node.start + 1, node.stop + 1):
            found[chunks[:depth]] = node.value
    return found


def longest(model: dict[Key, Any], chunks: Key) -> int:
    """Leading chunks that the model has."""
    return max((i for i in range(len(chunks) + 1) if not i or chunks[:i] in model), default=0)


class TreeMachine(RuleBasedStateMachine):
    """Any order of insert, remove and cut leaves what the dictionary says."""

    @initialize(max_run=st.sampled_from([1, 2, 5, 256]))
    def begin(self, max_run: int) -> None:
        """An empty tree and an empty dictionary."""
        self.tree: PrefixTree[Any] = PrefixTree(STRIDE, max_run)
        self.model: dict[Key, Any] = {}

    @rule(chunks=KEYS, value=st.sampled_from(VALUES), start=st.integers(0, 12), with_hashes=st.booleans())
    def insert(self, chunks: Key, value: Any, start: int, with_hashes: bool) -> None:
        """All prefixes longer than `start` get the value; a start that is not in the tree is refused."""
        if start > longest(self.model, chunks):
            with pytest.raises(InvalidInputError):
                self.tree.insert(key(chunks), value, start=start)
            return
        path = self.tree.insert(key(chunks), value, start=start, hashes=hashes(chunks) if with_hashes else b"")
        assert b"".join(node.run for node in path) == key(chunks)
        self.model |= {chunks[:i]: value for i in range(start + 1, len(chunks) + 1)}

    @rule(chunks=KEYS)
    def remove(self, chunks: Key) -> None:
        """A key goes with all that extends it; one that is not there removes nothing."""
        gone = [k for k in self.model if chunks and chunks in self.model and k[: len(chunks)] == chunks]
        assert self.tree.remove(key(chunks)) == len(gone)
        for each in gone:
            del self.model[each]

    @rule(chunks=KEYS, depth=st.integers(0, 12))
    def cut(self, chunks: Key, depth: int) -> None:
        """Cutting a node at a depth removes what lies on and below it from there."""
        path = self.tree.find_longest_prefix(key(chunks)).path
        if not path or not path[-1].start <= depth < path[-1].stop:
            return
        prefix = tuple(self.tree.key_of(path[-1])[1::2])[: depth + 1]
        gone = [k for k in self.model if k[: depth + 1] == prefix]
        assert self.tree.cut(path[-1], depth) == len(gone)
        for each in gone:
            del self.model[each]

    @rule(chunks=KEYS, extra=st.integers(0, 1))
    def find(self, chunks: Key, extra: int) -> None:
        """The longest prefix is found, whatever partial chunk follows, and from below any node on the way."""
        match = self.tree.find_longest_prefix(key(chunks) + b"\x07" * extra)
        assert match.chunks == longest(self.model, chunks)
        assert (
            b"".join(node.run for node in match.path)[: STRIDE * match.chunks] == key(chunks)[: STRIDE * match.chunks]
        )
        for node in match.path:
            if node.stop <= match.chunks:
                below = self.tree.find_longest_prefix(memoryview(key(chunks)), node)
                assert (below.chunks, below.path) == (match.chunks, match.path[match.path.index(node) + 1 :])

    @invariant()
    def agrees(self) -> None:
        """The tree keeps its invariants and has exactly the model's prefixes, values and hashes."""
        self.tree.check_integrity()
        assert values_of(self.tree) == self.model
        assert len(self.tree) == len(self.model)
        ends = [k for k in self.model if not any(other[:-1] == k for other in self.model)]
        assert sorted(self.tree) == sorted(map(key, ends))
        for node in self.tree.iter_nodes():
            chunks = tuple(self.tree.key_of(node)[1::2])
            assert node.hashes in (b"", hashes(chunks)[16 * node.start :])


TestTree = settings(max_examples=150, stateful_step_count=30)(TreeMachine).TestCase


def test_the_lower_half_of_a_split_keeps_its_identity() -> None:
    """Splitting a node leaves the object for its lower half and its children, and makes a new upper one."""
    tree: PrefixTree[str] = PrefixTree(STRIDE)
    (node,) = tree.insert(key((0, 1, 2, 0)), "a", hashes=hashes((0, 1, 2, 0)))
    node.blocks = bytes(range(16))
    upper, other = tree.insert(key((0, 1, 1)), "b")
    assert tree.path_to(node) == [upper, node]
    assert (node.start, node.stop, node.run, node.value) == (2, 4, key((2, 0)), "a")
    assert (upper.start, upper.stop, upper.value, other.value) == (0, 2, "b", "b")
    assert (upper.blocks, node.blocks) == (bytes(range(8)), bytes(range(8, 16)))


def test_siblings_survive_removal() -> None:
    """Removing one branch leaves the others and the shared prefix."""
    tree: PrefixTree[str] = PrefixTree(STRIDE)
    for last in range(3):
        tree.insert(key((0, 0, last, 1)), "a")
    assert tree.remove(key((0, 0, 1))) == 2
    assert sorted(tree) == [key((0, 0, 0, 1)), key((0, 0, 2, 1))]
    assert tree.remove(key((0, 0, 1))) == 0
    assert tree.remove(b"") == 0


def test_a_parent_left_with_one_child_merges() -> None:
    """After a removal a run without a branch is one node again, when one value holds for all of it."""
    tree: PrefixTree[str] = PrefixTree(STRIDE)
    tree.insert(key((0, 0, 0, 1)), "a")
    tree.insert(key((0, 0, 2)), "a")
    assert tree.nodes == 3
    tree.remove(key((0, 0, 2)))
    assert (tree.nodes, list(tree)) == (1, [key((0, 0, 0, 1))])
    tree.insert(key((0, 0, 2)), "b")
    tree.remove(key((0, 0, 2)))
    assert tree.nodes == 2


def test_leaves_grow_up_to_max_run() -> None:
    """A leaf with the same value takes chunks in up to max_run; what is over becomes further nodes."""
    tree: PrefixTree[str] = PrefixTree(STRIDE, max_run=4)
    for length in range(1, 11):
        tree.insert(key((1,) * length), "a")
    assert [node.stop - node.start for node in tree.path_to(max(tree.iter_nodes(), key=lambda n: n.stop))] == [4, 4, 2]


def test_damage_is_found() -> None:
    """check_integrity raises when a node does not hold what its place says."""
    tree: PrefixTree[str] = PrefixTree(STRIDE)
    (node,) = tree.insert(key((1, 2)), "a")
    node.stop = 3
    with pytest.raises(AssertionError, match="bytes"):
        tree.check_integrity()


def test_wrong_arguments() -> None:
    """Keys that are no whole number of chunks, and sizes below one, are refused."""
    with pytest.raises(InvalidInputError, match="chunks of 2 bytes, not 3"):
        PrefixTree(STRIDE).insert(b"abc")
    for wrong in ((0, 1), (1, 0)):
        with pytest.raises(InvalidInputError, match="at least 1"):
            PrefixTree(*wrong)


def test_nodes_show_themselves() -> None:
    """A node's repr tells its place and how many children it has."""
    node: RadixTreeNode[str] = RadixTreeNode(b"ab", 3, 4, None, None)
    assert repr(node) == "<RadixTreeNode [3, 4) 0 children>"
