"""The protocol without I/O: generators driven with the replies of a small model of the tree."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest

from distprefix import operations
from distprefix.operations import SCHEMA, WINDOW, Call


def chain_of(chunks: int) -> bytes:
    """A chain of so many different hashes."""
    return b"".join(i.to_bytes(16, "big") for i in range(1, chunks + 1))


class Tree:
    """Answers calls as a tree would that has one path of nodes with the given runs, `start` chunks down."""

    def __init__(self, chunks: int, run: int = 256, start: int = 0, lost: int | None = None) -> None:
        self.sizes = [min(run, chunks - at) for at in range(0, chunks, run)]
        self.calls: list[Call] = []
        self.start = start
        self.lost = lost

    def nodes(self, window: bytes) -> list[Any]:
        """What walk tells of a window that begins at a node's head."""
        first = int.from_bytes(window[:16], "big") - 1
        total, reply, at = first + len(window) // 16, list[Any](), 0
        for size in self.sizes:
            if first <= at < total and at != self.lost:
                matched = min(size, total - at)
                blocks = b"".join(i.to_bytes(4, "little") for i in range(at, at + size))
                reply += [size, matched, b"7", b"3", b"5", b"meta", blocks, 1, b"w/0@gpu", b"2:%d" % size]
            elif at >= first:
                break
            at += size
        return reply

    def run(self, operation: Generator[Call, Any, Any]) -> Any:
        """Drive an operation to its end."""
        reply: Any = None
        while True:
            try:
                call = operation.send(reply)
            except StopIteration as done:
                return done.value
            self.calls.append(call)
            if call.script == "walk":
                reply = self.nodes(call.args[2])
            elif call.script == "insert":
                taken = len(call.args[5]) // 16
                reply = [1, taken, 50, 900, 9000, 5, b"9", taken, *self.nodes(call.args[5])]
            elif call.script == "trim":
                reply = [2, 0, 0, b"" if len(self.calls) > 3 else b"%d" % len(self.calls)]
            elif call.script == "touch":
                reply = (len(call.args) - 2) // 3
            else:
                reply = [2, 8, b"" if len(self.calls) == 3 else b"%d" % len(self.calls)]


CALLS = [(1, 1), (4095, 1), (4096, 1), (4097, 2), (8192, 2), (9000, 3)]


@pytest.mark.parametrize(("chunks", "calls"), CALLS)
@pytest.mark.parametrize("run", [1, 100, 255, 256])
def test_a_walk_goes_in_windows(chunks: int, calls: int, run: int) -> None:
    """A walk is one call for every 4,096 chunks, none longer than a window and a run, and tells each node once."""
    tree = Tree(chunks, run)
    views = tree.run(operations.walk(chain_of(chunks), 0, "w/0@gpu"))
    assert len(tree.calls) == calls
    assert all(len(call.args[2]) // 16 <= WINDOW + run for call in tree.calls)
    assert all(call.args[:2] == (SCHEMA, "w/0@gpu") for call in tree.calls)
    assert [view.start for view in views] == list(range(0, chunks, run))
    assert sum(view.matched for view in views) == chunks
    assert b"".join(view.blocks for view in views) == b"".join(i.to_bytes(4, "little") for i in range(chunks))


def test_a_walk_stops_at_a_hole() -> None:
    """Nothing is asked behind the place where the tree ends."""
    tree = Tree(9000, 256, lost=512)
    assert sum(view.matched for view in tree.run(operations.walk(chain_of(9000), 0))) == 512
    assert len(tree.calls) == 1
    tree = Tree(9000, 256, lost=4096)
    assert sum(view.matched for view in tree.run(operations.walk(chain_of(9000), 0))) == 4096
    assert len(tree.calls) == 2
    assert Tree(0).run(operations.walk(chain_of(3), 0)) == []


def test_views_are_read_as_told() -> None:
    """Each node's numbers, metadata, blocks and holders are taken over, with its depth."""
    (view,) = Tree(3).run(operations.walk(chain_of(2), 40))
    assert (view.start, view.size, view.matched, view.accessed, view.hits, view.created) == (40, 3, 2, 7, 3, 5)
    assert (view.metadata, len(view.blocks), view.holders) == (b"meta", 12, {"w/0@gpu": (2, 43)})


@pytest.mark.parametrize(("chunks", "calls"), CALLS)
@pytest.mark.parametrize("run", [1, 100, 256])
def test_a_publish_goes_in_windows(chunks: int, calls: int, run: int) -> None:
    """A publish is one call for every 4,096 chunks; each begins at a node's head, the last carries the metadata."""
    tree, blocks = Tree(chunks, run), b"".join(i.to_bytes(4, "little") for i in range(chunks))
    published = tree.run(
        operations.publish(chain_of(chunks), 500, "w/0@gpu", 2, max_run=run, blocks=blocks, metadata=b"m")
    )
    assert len(tree.calls) == calls
    assert (published.nodes_made, published.usage) == (calls, (50, 900, 9000, 5))
    assert [view.start for view in published.views] == [500 + at for at in range(0, chunks, run)]
    for i, call in enumerate(tree.calls):
        schema, max_run, holder, epoch, depth, window, ids, metadata = call.args
        assert (schema, max_run, holder, epoch) == (SCHEMA, run, "w/0@gpu", 2)
        assert len(window) // 16 <= WINDOW + run
        assert (depth - 500) % run == 0
        assert window == chain_of(chunks)[16 * (depth - 500) :][: len(window)]
        assert ids == blocks[4 * (depth - 500) :][: len(window) // 4]
        assert metadata == (b"m" if i == calls - 1 else b"")


@pytest.mark.parametrize(("there", "chunks"), [(0, 1), (0, 250), (0, 4500), (300, 1000), (300, 300), (4000, 4500)])
def test_a_publish_knows_what_it_made(there: int, chunks: int) -> None:
    """What insert made, it does not tell: those nodes are as they were sent, the metadata is with the last."""
    tree = Tree(there, 100)
    published = tree.run(operations.publish(chain_of(chunks), 40, "w/0@gpu", 2, max_run=100, metadata=b"of the prompt"))
    assert [(view.start, view.size, view.matched) for view in published.views] == [
        (40 + at, min(100, chunks - at), min(100, chunks - at)) for at in range(0, chunks, 100)
    ]
    made = [view for view in published.views if view.start >= 40 + there]
    assert all((view.accessed, view.hits, view.created, view.blocks) == (9, 0, 9, b"") for view in made)
    assert all(view.holders == {"w/0@gpu": (2, view.start + view.size)} for view in made)
    assert [view.metadata for view in made] == [b""] * (len(made) - 1) + [b"of the prompt"] * bool(made)


def test_a_trim_is_called_until_it_is_done() -> None:
    """A trim repeats while branches are left, and adds up the coverage taken."""
    tree = Tree(10)
    assert tree.run(operations.trim(chain_of(10), "w", 1)) == 8
    assert [call.script for call in tree.calls] == ["trim"] * 4
    assert tree.calls[0].args[:4] == (SCHEMA, "w", 1, chain_of(10))
    assert [call.args[4] for call in tree.calls] == [b"", b"1", b"2", b"3"]


def test_a_long_trim_walks_first() -> None:
    """A chain over one window is walked to find the node to begin at, so that the call stays small."""
    tree = Tree(9000)
    tree.run(operations.trim(chain_of(9000), "w", 1))
    assert [call.script for call in tree.calls] == ["walk", "walk", "walk", "trim"]
    assert tree.calls[-1].args[3] == chain_of(9000)[16 * 8960 :]


@pytest.mark.parametrize(("touches", "calls"), [(0, 0), (1, 1), (100, 1), (101, 2), (300, 3)])
def test_touches_go_in_batches(touches: int, calls: int) -> None:
    """Touches go 100 a call, each as head, hits and time, and the nodes found are added up."""
    tree = Tree(0)
    assert tree.run(operations.touch([(i.to_bytes(16, "big"), 2, 1000 + i) for i in range(touches)])) == touches
    assert len(tree.calls) == calls
    if calls:
        assert tree.calls[0].args[:5] == (SCHEMA, 0, "00" * 16, 2, 1000)
        assert max(len(call.args) for call in tree.calls) <= 2 + 3 * 100


def test_a_drop_is_called_until_it_is_done() -> None:
    """A drop repeats until nothing is left and adds up what went."""
    tree = Tree(0)
    assert tree.run(operations.drop("ab")) == (6, 24)
    units = operations.WORK_A_CALL
    assert [call.args for call in tree.calls] == [(SCHEMA, "ab", resume, units) for resume in (b"", b"1", b"2")]
