"""A worker's own blocks: closed under prefix, exact through splits and moves, bounded."""

from __future__ import annotations

from array import array
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprefix import own
from distprefix.own import OwnBlocks, node_at


def chain(*chunks: int) -> bytes:
    """Chunk hashes that cover what lies before them, as real ones do."""
    return b"".join(bytes(chunks[: i + 1]).ljust(16, b"\xee") for i in range(len(chunks)))


def pack(*ids: int) -> bytes:
    """Block ids as they are kept."""
    return array("I", ids).tobytes()


def new(max_chunks: int = 1000) -> OwnBlocks:
    """Nothing yet, with short runs."""
    return OwnBlocks(4, max_chunks)


def test_blocks_are_those_of_the_leading_chunks() -> None:
    """Own blocks come in order, up to the first chunk that has none, through splits too."""
    blocks = new()
    blocks.remember(chain(*range(6)), pack(10, 11, 12, 13, 14, 15), told=True)
    blocks.remember(chain(0, 1, 2, 7), pack(10, 11, 12, 17), told=True)
    assert blocks.ids(chain(*range(5))) == (10, 11, 12, 13, 14)
    assert blocks.ids(chain(0, 1, 2, 7, 8)) == (10, 11, 12, 17)
    assert blocks.ids(chain(3)) == ()
    assert len(blocks) == 7


def test_removed_blocks_take_along_what_lies_behind() -> None:
    """All blocks named count, and one retraction covers each branch that they lie on."""
    blocks = new()
    blocks.remember(chain(8, 8, 8), pack(80, 81, 82), told=True)
    blocks.remember(chain(*range(6)), pack(10, 11, 12, 13, 14, 15), told=True)
    assert blocks.remove([12, 14, 99]) == (2, [chain(0, 1, 2)])
    assert blocks.ids(chain(*range(6))) == (10, 11)
    assert blocks.remove([12, 15]) == (0, [])
    assert blocks.ids(chain(8, 8, 8)) == (80, 81, 82)


def test_removal_reads_only_the_nodes_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a removal is in proportion to the blocks named: as many nodes are visited with 10 as with 100."""
    visits: list[int] = []
    for size in (10, 100):
        blocks, seen = new(), 0
        for i in range(size):
            blocks.remember(chain(i, i, i), pack(3 * i, 3 * i + 1, 3 * i + 2), told=True)

        def counted(node: Any, depth: int) -> Any:
            nonlocal seen
            seen += 1
            return node_at(node, depth)

        with monkeypatch.context() as patch:
            patch.setattr(own, "node_at", counted)
            patch.setattr(blocks._tree, "iter_nodes", None)
            assert blocks.remove([4, 7])[0] == 2
        visits.append(seen)
    assert visits[0] == visits[1]


def test_a_block_that_moved_is_known_where_it_is() -> None:
    """A chunk published with another block is no longer in the old one, and the first such depth is told."""
    blocks = new()
    assert blocks.remember(chain(1, 2, 3), pack(5, 6, 7), told=True)[1] is None
    assert blocks.remember(chain(1, 2, 3, 4), pack(5, 9, 7, 8), told=True)[1] == 1
    assert blocks.remove([6])[0] == 0
    assert blocks.remove([9]) == (1, [chain(1, 2)])


def test_what_redis_was_told_ends_at_the_first_difference() -> None:
    """Only chunks in the same blocks, of which Redis knows, need not be published again."""
    blocks = new()
    blocks.remember(chain(*range(6)), pack(*range(6)), told=True)
    assert blocks.told_up_to(chain(*range(6)), pack(*range(6))) == 6
    assert blocks.told_up_to(chain(*range(6)), pack(0, 1, 2, 3, 9, 5)) == 4
    blocks.remember(chain(*range(6)), pack(*range(6)), told=False)
    assert blocks.told_up_to(chain(*range(6)), pack(*range(6))) == 0
    blocks.remember(chain(*range(6)), pack(*range(6)), told=True)
    blocks.forget_told()
    assert blocks.told_up_to(chain(*range(6)), pack(*range(6))) == 0


def test_a_worker_that_recycles_block_ids_stays_bounded() -> None:
    """Chains over the bound are given up, longest ago published first, and told so that they go in Redis."""
    blocks, lost = new(max_chunks=20), list[bytes]()
    for i in range(50):
        blocks.remember(chain(7, i, i), pack(1, 2, 3), told=True)
        lost += blocks.give_up()
    assert len(blocks) <= 20
    assert lost[0] == chain(7, 0)
    assert blocks.ids(chain(7, 49, 49)) == (1, 2, 3)
    assert sum(map(len, blocks._references.values())) <= 20


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["publish", "publish", "remove", "move"]),
            st.lists(st.integers(0, 1), min_size=1, max_size=9).map(tuple),
            st.integers(1, 9),
        ),
        max_size=40,
    )
)
def test_histories_agree_with_a_dictionary(steps: list[tuple[str, tuple[int, ...], int]]) -> None:
    """Whatever is published, moved and removed, every chain has just the blocks that a dict of prefixes says."""
    blocks, model, fresh = new(), dict[tuple[int, ...], int](), count(100)
    for action, chunks, length in steps:
        prefixes = [chunks[:i] for i in range(1, len(chunks) + 1)]
        if action == "remove":
            block = model.get(chunks[:length])
            wanted = 0 if block is None else 1
            assert blocks.remove([10**6 if block is None else block])[0] == wanted
            if wanted:
                model = {key: value for key, value in model.items() if key[: len(chunks[:length])] != chunks[:length]}
        else:
            for prefix in prefixes:
                if action == "move" or prefix not in model:
                    model[prefix] = next(fresh)
            blocks.remember(chain(*chunks), pack(*(model[prefix] for prefix in prefixes)), told=True)
        for prefix in prefixes:
            assert list(blocks.ids(chain(*prefix))) == [
                model[prefix[:i]] for i in range(1, len(prefix) + 1) if prefix[:i] in model
            ]
        blocks._tree.check_integrity()
        assert len(blocks) == len(model)
