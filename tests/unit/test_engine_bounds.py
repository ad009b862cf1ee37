"""What one engine can make an ingester keep and log, part by part."""

from __future__ import annotations

import logging
import struct
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprefix.errors import ConfigError
from distprefix.events.changes import changes
from distprefix.events.frames import Frame, Removed, Stored
from distprefix.events.holdings import Holdings
from distprefix.events.inbox import Arrival, Connected, Disconnected, Inbox
from distprefix.events.limits import EngineLimits
from distprefix.events.pace import Pace
from distprefix.events.parking import Parking
from distprefix.events.reports import EngineReports
from distprefix.hashing import ChunkHasher
from distprefix.printable import printable

MIB = 1 << 20
HASHER = ChunkHasher("blake2b", bytes(32))


class Clock:
    """A clock that goes when it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """The time."""
        return self.now


def holdings(chunk: int = 16, *, engine_chains: bool = False, max_blocks: int = 1_000_000, **limits: int) -> Holdings:
    """Of an engine that holds nothing."""
    made = EngineLimits(**limits)
    return Holdings(chunk, HASHER, engine_chains=engine_chains, max_blocks=max_blocks, limits=made)


def stored(
    keys: range | list[int],
    parent: int | None = None,
    size: int = 16,
    medium: str = "gpu",
    names: tuple[bytes, ...] = (),
    first: int = 0,
) -> Stored:
    """Blocks in a row."""
    tokens = b"".join(struct.pack("<I", first + key % 1000) * size for key in keys)
    return Stored(tuple(keys), parent, tokens, size, medium, 0, "full_attention", (), names)


# The inbox


def frame(seq: int, size: int = 100) -> Frame:
    """A frame of so many bytes."""
    return Frame(seq, bytes(size))


@given(st.lists(st.tuples(st.sampled_from("fffcdt"), st.integers(0, 400)), max_size=80))
def test_an_inbox_never_has_more_than_its_bytes(steps: list[tuple[str, int]]) -> None:
    """Whatever comes and is taken in whichever order, it is in order, bounded, and each gap is told of by a notice."""
    dropped = Counter[str]()
    inbox, kept = Inbox(2000, dropped), list[Arrival]()
    for number, (what, size) in enumerate(steps):
        if what == "t":
            kept += inbox.take(1 + size % 3, 300)
        else:
            inbox.put([frame(number, size) if what == "f" else Connected() if what == "c" else Disconnected()])
        assert inbox.bytes <= 2000
    while taken := inbox.take(5, 10**9):
        kept += taken
    assert (inbox.bytes, len(inbox)) == (0, 0)
    numbers = [each.seq for each in kept if isinstance(each, Frame)]
    assert numbers == sorted(numbers)
    sent = [number for number, (what, _) in enumerate(steps) if what == "f"]
    assert len(numbers) + dropped["queue"] == len(sent)
    if dropped["queue"]:
        assert any(isinstance(each, Connected | Disconnected) for each in kept)


def test_a_full_inbox_says_where_frames_are_missing() -> None:
    """A Connected stands in the place of what was dropped, so that the engine is asked, also when it says no more."""
    dropped = Counter[str]()
    inbox = Inbox(1000, dropped)
    inbox.put([frame(seq) for seq in range(10)])
    assert inbox.take(100, MIB) == [*(frame(seq) for seq in range(3)), Connected()]
    assert dropped == {"queue": 7}


def test_a_frame_larger_than_the_inbox_fits_an_empty_one() -> None:
    """A single message is never too large: what is received is bounded elsewhere."""
    inbox = Inbox(1000, Counter())
    inbox.put([frame(0, 5000)])
    assert inbox.take(1, 1) == [frame(0, 5000)]


def test_a_storm_of_connections_takes_no_room() -> None:
    """Of notices in a row the last two are kept."""
    inbox = Inbox(1000, Counter())
    for _ in range(1000):
        inbox.put([Connected(), Disconnected()])
    assert [type(each) for each in inbox.take(9, MIB)] == [Connected, Disconnected]


# Pace and reports


def test_a_pace_allows_a_burst_and_then_a_rate() -> None:
    """So many at once, then as many as the time that passed allows, and never more than a burst."""
    clock = Clock()
    pace = Pace(3, 2.0, clock)
    assert [pace.take() for _ in range(5)] == [True, True, True, False, False]
    clock.now += 0.5
    assert [pace.take() for _ in range(2)] == [True, False]
    clock.now += 1000
    assert [pace.take() for _ in range(5)].count(True) == 3
    pace.spend()
    assert not pace.is_open


def test_each_cause_is_logged_once_and_then_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    """A storm of 10,000 lines of two causes makes two lines, and after half a minute a sum of each."""
    clock = Clock()
    reports = EngineReports("w/0", clock)
    with caplog.at_level(logging.INFO, "distprefix"):
        for i in range(10_000):
            reports.warning("a", "first %d", i)
            reports.info("b", "second %s", "text")
        assert caplog.messages == ["w/0: first 0", "w/0: second text"]
        reports.flush()
        clock.now += 31
        reports.flush()
        assert caplog.messages[2:] == [f"w/0: {cause}: 9999 more times within 30 s" for cause in "ab"]
        for _ in range(10):
            reports.flush()
            reports.warning("a", "first")
        assert len(caplog.messages) == 4
        clock.now += 31
        reports.warning("a", "again")
        assert caplog.messages[4:] == ["w/0: a: 10 more times within 30 s"]
        clock.now += 100
        reports.flush()
        clock.now += 100
        reports.warning("a", "again")
        assert caplog.messages[-1] == "w/0: again"


def test_what_an_engine_says_is_escaped_and_cut(caplog: pytest.LogCaptureFixture) -> None:
    """No control character reaches a log, and no endless text."""
    hostile = "\x1b[2J\r\nINFO all is well\u202e\x00\udc80" + "x" * 10_000
    assert printable("plain text, ü 漢") == "plain text, ü 漢"
    assert printable(hostile, 300).isprintable()
    reports = EngineReports("w/0")
    with caplog.at_level(logging.WARNING, "distprefix"):
        reports.warning("a", "said %s, and %s", hostile, ValueError(hostile))
    (line,) = caplog.messages
    assert line.isprintable()
    assert len(line) < 1000
    assert "\\x1b[2J\\r\\n" in line


def test_a_traceback_is_escaped_too(caplog: pytest.LogCaptureFixture) -> None:
    """Every line of it is printable, whatever the exception says, and it is bounded."""
    reports = EngineReports("w/0")
    try:
        raise ValueError("\x1b]0;owned\x07 %s %d\r" * 1000)
    except ValueError:
        reports.exception("failed", "it failed %s", "here")
    (line,) = caplog.messages
    assert line.startswith("w/0: it failed here\n  Traceback")
    assert all(each.isprintable() for each in line.split("\n"))
    assert len(line) < 40 * 400


@pytest.mark.parametrize("name", EngineLimits.__slots__)
def test_limits_that_cannot_be(name: str) -> None:
    """Each names itself, what it was and what is allowed."""
    bad: list[Any] = [0, -1, 1.5, True, 1 << 60]
    for value in bad:
        with pytest.raises(ConfigError, match=rf"{name} is .*: it must lie between \d+ and \d+"):
            EngineLimits(**{name: value})


# Parking


def test_parked_events_are_bounded_in_bytes() -> None:
    """Blocks of many tokens, many names or long extras wait in no more than the bytes that they may."""
    counts = Counter[str]()
    parking = Parking(100_000, counts, MIB)
    for i in range(500):
        event = stored([i], parent=10**6 + i, size=5000)
        parking.park([event, event._replace(extras=(b"x" * 20_000,)), event._replace(names=(b"y" * 20_000,))][i % 3])
        assert parking.bytes <= MIB
    assert counts["parked_dropped"] + parking.blocks == 500
    parking.clear()
    assert parking.bytes == 0


def test_removals_that_wait_are_bounded_in_bytes() -> None:
    """The same block may be removed again and again while it waits."""
    counts = Counter[str]()
    parking = Parking(100_000, counts, MIB)
    parking.park(stored([1], parent=2))
    for _ in range(5000):
        parking.remove(1, Removed((1,), "gpu", 0))
        assert parking.bytes <= MIB
    assert counts["parked_dropped"]


def test_an_event_larger_than_the_parking_evicts_nothing() -> None:
    """It is dropped and counted, and what waited before it still does."""
    counts = Counter[str]()
    parking = Parking(100_000, counts, MIB)
    parking.park(stored([1], parent=2))
    parking.park(stored([3], parent=4, size=MIB))
    assert (parking.blocks, counts) == (1, {"parked_dropped": 1})
    assert not parking.remove(3, Removed((3,), "gpu", 0))


# Holdings


def test_blocks_are_bounded_in_chunks() -> None:
    """Blocks of many chunks each count as what they are: `max_own_chunks` bounds chunks too."""
    tested = holdings(max_blocks=1000)
    for i in range(20):
        tested.store(stored([i], size=16 * 100, first=i))
    assert len(tested) == 10
    assert tested.counts["forgotten"] == 10
    assert tested.bytes == 1000 * 16


@pytest.mark.parametrize("size", [8, 1])
def test_blocks_are_bounded_in_bytes(size: int) -> None:
    """Tokens that wait for the end of a long chunk are bounded, and what is forgotten is counted."""
    tested = holdings(chunk=4096, held_bytes=MIB)
    for i in range(40):
        keys = range(1000 * i, 1000 * i + 400)
        tested.store(stored(keys, size=size, first=i))
        assert tested.bytes <= MIB
    if size == 8:
        assert tested.counts["forgotten"]
    tested.clear()
    assert tested.bytes == 0


def test_sizes_come_back_to_nothing() -> None:
    """Whatever was stored and removed again, nothing is counted as held."""
    tested = holdings(chunk=32)
    tested.store(stored(range(100), size=16))
    tested.store(stored(range(200, 220), parent=50, size=16))
    tested.remove(Removed(tuple(range(300)), "gpu", 0))
    assert (len(tested), tested.bytes, tested.chunks["gpu"]) == (0, 0, 0)


def test_an_event_of_more_blocks_than_may_be_held_is_cut() -> None:
    """Its leading blocks are held; the others are counted as forgotten, not made first."""
    tested = holdings(max_blocks=50)
    tested.store(stored(range(500)))
    assert (len(tested), tested.counts["forgotten"]) == (50, 450)


def test_blocks_that_no_engine_has_are_misfits() -> None:
    """A block of more than 65,536 tokens, and an event that names no block."""
    tested = holdings()
    tested.store(stored([1], size=65_552))
    tested.store(stored([2])._replace(keys=()))
    assert (len(tested), tested.counts["misfits"]) == (0, 1)
    tested.store(stored([3], size=65_536))
    assert len(tested) == 1


@pytest.mark.parametrize("parent", [None, 77])
def test_events_without_keys_are_never_kept(parent: int | None) -> None:
    """With engine chains too, where tokens are not looked at: nothing waits that is counted as no block."""
    tested = holdings(engine_chains=True)
    for _ in range(100):
        tested.store(Stored((), parent, bytes(4000), 16, "gpu", 0, "full_attention", (), ()))
    assert (tested.parked, len(tested), tested._parking.bytes) == (0, 0, 0)


def test_media_are_bounded_after_a_restart_too() -> None:
    """More media in Redis than are allowed now are passed over and counted."""
    tested = holdings(media=2)
    tested.restore_state(b"\x93\x93\xa1a\x00\x10\x93\xa1b\x00\x10\x93\xa1c\x00\x10")
    tested.restore("c", [(1, None, b"x" * 16)])
    tested.store(stored([5], medium="d"))
    assert (len(tested), tested.counts["other_media"]) == (0, 2)


def test_what_comes_and_goes_between_two_writes_leaves_nothing() -> None:
    """Blocks that Redis was never told of need no withdrawal, so a storm of them waits for no write."""
    tested = holdings()
    for i in range(10_000):
        tested.store(stored([i]))
        tested.remove(Removed((i,), "gpu", 0))
    assert (len(tested), len(tested.changed["gpu"])) == (0, 0)
    assert changes(tested) == ([], True)


def test_a_conflict_at_the_root_forgets_nothing_else() -> None:
    """A block that begins a prompt and is known elsewhere leaves the root as it is, also where room is made later."""
    tested = holdings(max_blocks=3)
    tested.store(stored([1, 2, 3]))
    tested.store(stored([9, 2]))
    tested.store(stored([2]))
    assert tested.counts["conflicts"] == 2
    for key in range(20, 30):
        tested.store(stored([key]))
        assert len(tested) == 3


# Chains that an engine names itself


def named(*numbers: int) -> tuple[bytes, ...]:
    """Hashes as an engine sends them: only the first 16 bytes name a chunk."""
    return tuple(struct.pack("<QQQQ", number, 0, place, place) for place, number in enumerate(numbers))


def keyed(first: int, *numbers: int, parent: int | None = None) -> Stored:
    """Blocks with these chunk hashes."""
    return stored(range(first, first + len(numbers)), parent=parent, names=named(*numbers))


def test_a_chain_that_repeats_a_chunk_ends_before_it() -> None:
    """The blocks from the repeated chunk on are left out and counted, and what is told has each chunk once."""
    tested = holdings(engine_chains=True)
    tested.store(keyed(1, 10, 11, 12, 10, 13))
    assert (len(tested), tested.counts["repeats"]) == (3, 2)
    (change,), _ = changes(tested)
    assert change.chain == b"".join(name[:16] for name in named(10, 11, 12))


def test_a_chunk_has_one_place_over_several_events() -> None:
    """Also when the repetition comes later, in another prompt, or waited; what hangs behind it waits and is bounded."""
    tested = holdings(engine_chains=True)
    tested.store(keyed(1, 10, 11))
    tested.store(keyed(3, 12, 10, parent=2))
    tested.store(keyed(20, 11))
    tested.store(keyed(30, 12, parent=40))
    tested.store(keyed(40, 14))
    assert tested.counts["repeats"] == 3
    assert sorted(tested._blocks) == [1, 2, 3, 40]


def test_a_chunk_that_was_removed_may_come_back_elsewhere() -> None:
    """Its place is free again, and after a clear all are."""
    tested = holdings(engine_chains=True)
    tested.store(keyed(1, 10, 11))
    tested.remove(Removed((2,), "gpu", 0))
    tested.store(keyed(5, 12, 11))
    assert (len(tested), tested.counts["repeats"]) == (3, 0)
    tested.clear()
    tested.store(keyed(7, 11, 10))
    assert (len(tested), tested.counts["repeats"]) == (2, 0)


def test_a_repeated_chunk_in_redis_is_passed_over() -> None:
    """What was written before, by whomever, has one place as well."""
    tested = holdings(engine_chains=True)
    tested.restore("gpu", [(1, None, b"a" * 16), (2, 1, b"b" * 16), (3, 2, b"a" * 16)])
    assert (len(tested), tested.counts["repeats"]) == (2, 1)
