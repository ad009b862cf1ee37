"""What an engine holds and what Redis has to be told of it, against a dictionary."""

from __future__ import annotations

import itertools
import struct
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprefix.chunking import HASH_BYTES
from distprefix.events.changes import KEY_BYTES, Change, Covered, blocks_of, changes, confirm, reject
from distprefix.events.frames import Removed, Stored
from distprefix.events.holdings import Holdings
from distprefix.events.parking import Parking
from distprefix.hashing import ChunkHasher

HASHER = ChunkHasher("blake2b", bytes(32))
CHUNK = 16
MEDIA = ("gpu", "cpu")
Path = tuple[int, ...]


def make(*, max_blocks: int = 1_000_000, max_parked: int = 100_000, engine_chains: bool = False) -> Holdings:
    """Of an engine that holds nothing."""
    return Holdings(CHUNK, HASHER, engine_chains=engine_chains, max_blocks=max_blocks, max_parked=max_parked)


def key(path: Path) -> int:
    """The engine's hash of a block."""
    value = 1
    for letter in path:
        value = value * 5 + letter
    return value


def stored(
    paths: Iterable[Path], medium: str = "gpu", group: int = 0, *, size: int = CHUNK, kind: str = "full_attention"
) -> Stored:
    """Blocks in a row."""
    blocks = list(paths)
    tokens = b"".join(struct.pack("<I", block[-1]) * size for block in blocks)
    parent = key(blocks[0][:-1]) if len(blocks[0]) > 1 else None
    return Stored(tuple(map(key, blocks)), parent, tokens, size, medium, group, kind, (), ())


def steps(path: Path) -> list[Path]:
    """All that a block begins with, and itself."""
    return [path[:i] for i in range(1, len(path) + 1)]


def removed(*paths: Path, medium: str = "gpu", group: int = 0) -> Removed:
    """Blocks that are gone."""
    return Removed(tuple(map(key, paths)), medium, group)


def chain(path: Path, size: int = CHUNK) -> list[bytes]:
    """Hashes of the chunks of a prompt."""
    tokens = b"".join(struct.pack("<I", letter) * size for letter in path)
    tokens = tokens[: len(tokens) // (4 * CHUNK) * 4 * CHUNK]
    hashes = HASHER.chain(HASHER.root, memoryview(tokens), 4 * CHUNK)
    return [hashes[i : i + HASH_BYTES] for i in range(0, len(hashes), HASH_BYTES)]


class Tree:
    """What Redis was told: by medium each chunk with the one before it and its label."""

    def __init__(self) -> None:
        self.held: dict[str, dict[bytes, tuple[bytes, int, bytes]]] = {medium: {} for medium in MEDIA}

    def tell(self, holdings: Holdings, heads: Iterable[int] = (), *, moves: bool = False) -> list[Change]:
        """Take all that has to be told; the chunks of `heads` are those that nodes begin with."""
        told: list[Change] = []
        for turn in itertools.count():
            batch, complete = changes(holdings)
            for change in batch:
                if moves and turn % 2 == 0 and change.depth:
                    reject(holdings, change)
                    continue
                self._take(change)
                confirm(holdings, change, heads)
            told += batch
            if complete and not batch:
                return told
            assert turn < 1000
        raise AssertionError

    def _take(self, change: Change) -> None:
        held = self.held.setdefault(change.medium, {})
        hashes = [change.chain[i : i + HASH_BYTES] for i in range(0, len(change.chain), HASH_BYTES)]
        if not change.publish:
            self._drop(held, hashes[-1])
            return
        assert len(change.labels) % (len(hashes) * KEY_BYTES) == 0
        width = len(change.labels) // len(hashes)
        before = b""
        if change.depth:
            # It goes on from a node's head, which is told of this medium or another; its parent is of this one.
            before, depth, _ = next(each[hashes[0]] for each in self.held.values() if hashes[0] in each)
            assert depth == change.depth
            assert before in held
        for i, chunk in enumerate(hashes):
            assert not before or before in held
            held[chunk] = (before, change.depth + i, change.labels[i * width : (i + 1) * width])
            before = chunk

    def _drop(self, held: dict[bytes, tuple[bytes, int, bytes]], chunk: bytes) -> None:
        held.pop(chunk, None)
        for child in [each for each, (before, _, _) in held.items() if before == chunk]:
            self._drop(held, child)

    def covered(self) -> list[Covered]:
        """A node for every chunk."""
        return [
            Covered(medium, before, depth, chunk, labels)
            for medium, held in self.held.items()
            for chunk, (before, depth, labels) in held.items()
        ]


class Naive:
    """The same, as simply as it can be said."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, int], set[Path]] = {}

    def store(self, paths: Iterable[Path], medium: str, group: int) -> None:
        """Blocks that are held."""
        self.held.setdefault((medium, group), set()).update(paths)

    def remove(self, paths: Iterable[Path], medium: str, group: int) -> None:
        """Blocks that are not."""
        self.held.get((medium, group), set()).difference_update(paths)

    def known(self, path: Path) -> bool:
        """Whether the block is held, or one behind it."""
        return any(path == each[: len(path)] for held in self.held.values() for each in held)

    def counted(self, medium: str) -> set[Path]:
        """Blocks that all groups of the medium hold, with all that is before them."""
        groups = [held for (each, _), held in self.held.items() if each == medium]
        every = set[Path].intersection(*groups) if groups else set[Path]()
        return {path for path in every if all(each in every for each in steps(path))}

    def chunks(self, medium: str, size: int) -> set[bytes]:
        """Hashes of the chunks that count."""
        return {each for path in self.counted(medium) for each in chain(path, size)}


PATHS = st.lists(st.integers(1, 2), min_size=1, max_size=5).map(tuple)
EVENT = st.tuples(
    st.sampled_from(["store", "store", "remove", "tell", "move"]),
    PATHS,
    st.sampled_from(MEDIA),
    st.integers(0, 1),
    st.integers(1, 5),
    st.lists(st.integers(0, 5)),
)


@pytest.mark.parametrize("size", [8, 16, 32])
@given(st.data())
def test_holdings_are_a_dictionarys(size: int, data: st.DataObject) -> None:
    """Whatever is stored and removed in whichever order, what counts and what is told is what a dictionary says."""
    holdings, naive, tree = make(), Naive(), Tree()
    groups = data.draw(st.sampled_from([1, 2]))
    for what, path, medium, number, start, heads in data.draw(st.lists(EVENT, max_size=30)):
        group = number % groups
        if what == "store":
            row = steps(path)[min(start, len(path)) - 1 :]
            if len(row[0]) == 1 or naive.known(row[0][:-1]):
                holdings.store(stored(row, medium, group, size=size))
                naive.store(row, medium, group)
        elif what == "remove":
            holdings.remove(removed(path, medium=medium, group=group))
            naive.remove([path], medium, group)
        else:
            tree.tell(holdings, heads, moves=what == "move")
            for each in MEDIA:
                assert set(tree.held[each]) == naive.chunks(each, size)
        for each in MEDIA:
            assert holdings.chunks[each] == len(naive.chunks(each, size))
        blocks = {each for held in naive.held.values() for path in held for each in steps(path)}
        assert len(holdings) == len(blocks)
    assert holdings.parked == 0


@pytest.mark.parametrize("size", [8, 16, 32])
@given(st.data())
def test_what_redis_was_told_gives_the_same_blocks(size: int, data: st.DataObject) -> None:
    """Blocks read back from labels are those that were told, count as much, and need not be told again."""
    first, naive, tree = make(), Naive(), Tree()
    for path, medium in data.draw(st.lists(st.tuples(PATHS, st.sampled_from(MEDIA)), max_size=12)):
        first.store(stored(steps(path), medium, size=size))
        naive.store(steps(path), medium, 0)
    tree.tell(first)
    second = make()
    second.restore_state(first.state)
    known: dict[str, set[int]] = {}
    for medium, blocks in blocks_of(tree.covered()):
        known.setdefault(medium, set()).update(each[0] for each in blocks)
        second.restore(medium, blocks)
    for medium, keys in known.items():
        ends = {
            path[:i] for path in naive.counted(medium) for i in range(1, len(path) + 1) if len(path) * size % CHUNK == 0
        }
        assert keys == set(map(key, ends))
    assert +second.chunks == +first.chunks
    assert changes(second) == ([], True)
    before = {medium: dict(held) for medium, held in tree.held.items()}
    for path, medium in data.draw(st.lists(st.tuples(PATHS, st.sampled_from(MEDIA)), max_size=6)):
        second.remove(removed(path, medium=medium))
        naive.remove([path], medium, 0)
    tree.tell(second)
    for medium in MEDIA:
        assert set(tree.held[medium]) <= set(before[medium])
        assert set(tree.held[medium]) == naive.chunks(medium, size)


@given(st.lists(st.tuples(PATHS, st.booleans()), max_size=30), st.integers(1, 6))
def test_bounds_hold_and_nothing_more_is_told(events: list[tuple[Path, bool]], most: int) -> None:
    """There are never more blocks than allowed; what was forgotten is taken back from Redis, and counted."""
    holdings, naive, tree = make(max_blocks=most), Naive(), Tree()
    for path, goes in events:
        if goes:
            holdings.remove(removed(path))
            naive.remove([path], "gpu", 0)
        else:
            holdings.store(stored(steps(path)))
            naive.store(steps(path), "gpu", 0)
        assert len(holdings) <= most
        tree.tell(holdings)
        assert len(tree.held["gpu"]) == holdings.chunks["gpu"] <= most
        assert set(tree.held["gpu"]) <= naive.chunks("gpu", CHUNK)
    if holdings.chunks["gpu"] < len(naive.chunks("gpu", CHUNK)):
        assert holdings.counts["forgotten"]


@given(st.lists(st.tuples(PATHS, st.booleans()), max_size=40), st.randoms())
def test_a_child_may_come_before_its_parent(events: list[tuple[Path, bool]], order: object) -> None:
    """Blocks that wait for the one before them count once that comes, unless they were removed while they waited."""
    holdings, held = make(), set[Path]()
    roots = {path[:1] for path, _ in events}
    for path, goes in events:
        if len(path) < 2:
            continue
        if goes:
            holdings.remove(removed(path))
            held.discard(path)
        else:
            holdings.store(stored([path]))
            held.add(path)
    assert holdings.chunks["gpu"] == 0
    for root in sorted(roots):
        holdings.store(stored([root]))
    held |= roots
    naive = Naive()
    naive.store(held, "gpu", 0)
    assert holdings.chunks["gpu"] <= len(naive.chunks("gpu", CHUNK))
    tree = Tree()
    tree.tell(holdings)
    assert set(tree.held["gpu"]) == naive.chunks("gpu", CHUNK)


def test_a_removal_waits_behind_what_it_removes() -> None:
    """A block that was stored and removed before its parent was told of does not count when that comes."""
    holdings = make()
    holdings.store(stored([(1, 1), (1, 1, 1)]))
    holdings.remove(removed((1, 1, 1)))
    assert holdings.parked == 3
    holdings.store(stored([(1,)]))
    assert (holdings.parked, holdings.chunks["gpu"], len(holdings)) == (0, 2, 2)


def test_parking_is_bounded_and_forgets_places() -> None:
    """The longest waiting goes first and is counted; of what is dropped nothing is remembered, however it came."""
    counts = Counter[str]()
    parking = Parking(2, counts)
    for i in range(1, 50):
        parking.park(stored([(i, i), (i, i, i), (i, i, i, i)]))
    assert (parking.blocks, counts["parked_dropped"]) == (0, 147)
    assert not parking._place
    parking.park(stored([(1, 2)]))
    parking.park(stored([(2, 2)]))
    parking.park(stored([(3, 2)]))
    assert parking.blocks == 2
    assert not parking.remove(key((1, 2)), removed((1, 2)))
    assert parking.take([key((3,))]) == [stored([(3, 2)])]
    parking.clear()
    assert (parking.blocks, parking.take([key((2,))])) == (0, [])


def test_every_group_has_to_hold_a_block() -> None:
    """A block counts while all indexed groups of its medium hold it; sliding windows and the like are left out."""
    holdings, tree = make(), Tree()
    holdings.store(stored(steps((1, 1)), group=0))
    tree.tell(holdings)
    holdings.store(stored(steps((1,)), group=3))
    assert holdings.chunks["gpu"] == 1
    tree.tell(holdings)
    assert len(tree.held["gpu"]) == 1
    holdings.store(stored(steps((1, 1)), group=5, kind="sliding_window"))
    assert holdings.counts["other_groups"] == 2
    holdings.store(stored([(1, 1)], group=3))
    assert holdings.chunks["gpu"] == 2
    holdings.remove(removed((1,), group=0))
    tree.tell(holdings)
    assert not tree.held["gpu"]
    for group in range(10, 20):
        holdings.store(stored(steps((2,)), group=group))
    assert holdings.counts["other_groups"] == 2 + 4


@pytest.mark.parametrize("group", [0, 1])
def test_a_restored_engine_goes_on_with_its_groups(group: int) -> None:
    """After a restart new blocks count although the engine's only indexed group is not number 0."""
    first, tree = make(), Tree()
    first.store(stored(steps((1, 1)), group=group))
    tree.tell(first)
    second = make()
    second.restore_state(first.state)
    for medium, blocks in blocks_of(tree.covered()):
        second.restore(medium, blocks)
    second.store(stored([(1, 1, 1)], group=group))
    assert second.chunks["gpu"] == 3
    second.remove(removed((1, 1, 1), (1, 1), (1,), group=group))
    assert len(second) == 0
    tree.tell(second)
    assert not tree.held["gpu"]


def test_a_group_that_appears_after_a_restart_counts() -> None:
    """What only the groups known before a restart hold counts no more once another one appears, as without one."""
    first, tree = make(), Tree()
    first.store(stored(steps((1, 1))))
    tree.tell(first)
    second = make()
    second.restore_state(first.state)
    for medium, blocks in blocks_of(tree.covered()):
        second.restore(medium, blocks)
    for each in (first, second):
        each.store(stored([(1,)], group=1))
        assert each.chunks["gpu"] == 1


def test_a_hash_of_two_contents_counts_where_it_was_first() -> None:
    """A key behind another parent is a conflict: it stays where it is, and what follows it in the event is left out."""
    holdings = make()
    holdings.store(stored(steps((1, 1))))
    other = stored(steps((2, 2)))
    holdings.store(other._replace(keys=(other.keys[0], key((1, 1)))))
    assert (holdings.counts["conflicts"], holdings.chunks["gpu"]) == (1, 3)
    twice = stored(steps((2, 1, 1)))
    holdings.store(twice._replace(keys=(twice.keys[0], twice.keys[1], twice.keys[1])))
    assert (holdings.counts["conflicts"], holdings.chunks["gpu"]) == (2, 4)


def test_blocks_that_fit_no_chunk_are_left_out() -> None:
    """Blocks of a size that does not divide the chunk, nor the other way round, and tokens too few are counted."""
    holdings = make()
    holdings.store(stored(steps((1, 1)), size=24))
    holdings.store(stored(steps((1, 1)))._replace(tokens=b"\0" * 4))
    assert (holdings.counts["misfits"], len(holdings)) == (4, 0)


def test_an_offload_tier_names_known_blocks() -> None:
    """Blocks without tokens count in their medium when they were told of before, and are counted when not."""
    holdings, tree = make(), Tree()
    holdings.store(stored(steps((1, 1))))
    bare = stored(steps((1, 1)), "cpu")._replace(tokens=b"", block_size=0, parent=None)
    holdings.store(bare)
    holdings.store(bare._replace(keys=(key((9,)),)))
    tree.tell(holdings)
    assert (len(tree.held["cpu"]), holdings.counts["unknown_blocks"]) == (2, 1)
    holdings.remove(removed((1,), (1, 1)))
    tree.tell(holdings)
    assert (len(tree.held["gpu"]), len(tree.held["cpu"])) == (0, 2)


def test_what_is_lost_and_stored_again_at_once_is_told_in_order() -> None:
    """Blocks forgotten and made anew between two writes are taken back before they are told again."""
    holdings, tree = make(), Tree()
    paths = steps((1, 2, 1, 2))
    holdings.store(stored(paths))
    tree.tell(holdings)
    holdings.remove(removed(*reversed(paths)))
    assert len(holdings) == 0
    holdings.store(stored(paths))
    told = tree.tell(holdings)
    assert [change.publish for change in told] == [False, True]
    assert list(tree.held["gpu"]) == chain((1, 2, 1, 2))


def test_engine_chains_take_the_engines_hashes() -> None:
    """With the engine's own hashes as chunk hashes the chain is made of them; events without them do not fit."""
    holdings = make(engine_chains=True)
    names = (b"a" * 32, b"b" * 32)
    holdings.store(stored(steps((1, 1)))._replace(names=names))
    holdings.store(stored(steps((2, 1))))
    (change,), complete = changes(holdings)
    assert (change.chain, complete) == (b"a" * 16 + b"b" * 16, True)
    assert holdings.counts["misfits"] == 2


def test_many_changes_come_in_portions() -> None:
    """More than one call can take comes in several, each resumed behind a head that the reply told of."""
    holdings, tree = make(), Tree()
    path: Path = tuple(1 + i % 2 for i in range(9000))
    blocks = [each for i in range(0, 9000, 100) for each in [path[: i + 1]]]
    keys = tuple(range(1, 9001))
    tokens = b"".join(struct.pack("<I", letter) * CHUNK for letter in path)
    assert len(blocks) == 90
    holdings.store(Stored(keys, None, tokens, CHUNK, "gpu", 0, "full_attention", (), ()))
    told = tree.tell(holdings, range(0, 9000, 256))
    assert len(told) == 3
    assert len(tree.held["gpu"]) == 9000
    assert max(len(change.chain) for change in told) <= 4096 * HASH_BYTES


def test_what_another_hand_wrote_is_passed_over() -> None:
    """States, labels and holes that make no sense cost what they stand for, and nothing else."""
    holdings = make()
    for state in (b"\xc1", b"\x01", b"\x91\x01", b"\x91\x92\xa3gpu\xa1x"):
        holdings.restore_state(state)
    assert holdings.counts["state_unreadable"] >= 3
    good = Covered("gpu", b"", 0, b"a" * 16, struct.pack("<Q", 1))
    bad = [
        Covered("gpu", b"z" * 16, 3, b"b" * 16, struct.pack("<Q", 2)),
        Covered("cpu", b"", 0, b"c" * 16, b"short"),
        Covered("cpu", b"", 0, b"", b""),
    ]
    assert list(blocks_of([good, *bad])) == [("gpu", [(1, None, b"a" * 16)])]


def test_media_beyond_the_limit_are_left_out() -> None:
    """More media than a rank may have are counted as left out, and cost no memory for each."""
    holdings = make()
    for i in range(200):
        holdings.store(stored(steps((1,)), f"m{i}"))
    assert sum(holdings.chunks.values()) == 8
    assert holdings.counts["other_media"] == 192
    assert len(holdings.changed) == 8
