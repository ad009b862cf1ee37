"""What an engine that clears, lies and repeats itself can make an ingester do to Redis: little, and never wrong."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import pytest

from distprefix.errors import ReplayError
from distprefix.events.follower import Follower
from distprefix.events.frames import Frame
from tests.followers import Kept, follow, holders
from tests.servers import Backend

PROMPT = list(range(16))
OTHER = list(range(100, 116))
BURST = 32


def message(seq: int, *events: Any, at: float | None = None) -> Frame:
    """A message of these events."""
    return Frame(seq, msgpack.packb([time.time() if at is None else at, list(events), 0]) or b"")


def stored(key: int, tokens: list[int], parent: int | None = None, size: int = 4) -> list[Any]:
    """Blocks of a prompt, named from `key` on."""
    count = len(tokens) // size
    return ["BlockStored", list(range(key, key + count)), parent, tokens, size, None, "GPU", None, [None] * count]


CLEARED = ["AllBlocksCleared"]


def begun(backend: Backend, kept: Kept | None = None, **settings: Any) -> Follower:
    """A follower that leads."""
    follower, _ = follow(backend, kept or Kept(), chunk_size=4, **settings)
    assert follower.begin()
    return follower


def commits(follower: Follower, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on, how many changes each write to Redis has."""
    journal = follower._journal
    real = journal.commit
    seen: list[int] = []

    def commit(epoch: int, changes: Any, position: Any, state: bytes) -> Any:
        seen.append(len(changes))
        return real(epoch, changes, position, state)

    monkeypatch.setattr(journal, "commit", commit)
    return seen


def test_clears_within_a_message_make_no_epochs(real_server: Backend) -> None:
    """Of a thousand pairs of a block and a clear nothing is written; what follows the last clear is."""
    follower = begun(real_server)
    follower.take([message(0, stored(1, OTHER))])
    before = follower.epoch
    pairs = [event for key in range(1000) for event in (stored(10 * key, OTHER), CLEARED)]
    follower.take([message(1, *pairs, stored(7, PROMPT))])
    assert follower.epoch > before
    reader = real_server.open("reader", chunk_size=4)
    assert holders(reader, PROMPT) == {"w/0@gpu": 4}
    assert holders(reader, OTHER) == {}
    epoch = follower.epoch
    follower.take([message(2, *pairs[1:]), message(3, *pairs)])
    assert follower.epoch > epoch
    assert holders(reader, PROMPT) == {}


def test_clears_between_two_writes_make_one_epoch(real_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages that are taken together are written together: one new epoch for all that they clear."""
    follower = begun(real_server)
    follower.take([message(0, stored(1, PROMPT))])
    renewals: list[int] = []
    real = follower._journal.renew
    monkeypatch.setattr(follower._journal, "renew", lambda: renewals.append(0) or real())
    follower.take([message(seq, stored(seq, OTHER), CLEARED) for seq in range(1, 200)])
    assert len(renewals) == 1


def test_clears_in_quick_succession_are_void_at_once_and_published_slowly(real_server: Backend) -> None:
    """After a burst of new epochs there are no more, whatever is cleared; nothing that was cleared is answered."""
    now = [0.0]
    follower = begun(real_server, ticks=lambda: now[0])
    reader = real_server.open("reader", chunk_size=4)
    epochs: set[int] = set()
    for seq in range(0, 400, 2):
        follower.take([message(seq, stored(seq, PROMPT))])
        follower.take([message(seq + 1, CLEARED)])
        epochs.add(follower.epoch)
        if seq % 50 == 0:
            assert holders(reader, PROMPT) == {}
    assert len(epochs) <= BURST
    follower.take([message(400, stored(1, OTHER))])
    assert holders(reader, OTHER) == {}
    assert not follower.is_written
    now[0] += 2.0
    follower.take([])
    assert follower.is_written
    assert holders(reader, OTHER) == {"w/0@gpu": 4}
    follower.take([message(401, CLEARED)])
    assert holders(reader, OTHER) == {}


def test_unreadable_messages_make_few_epochs(real_server: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """A storm of them, with blocks in between, is bounded in epochs and in log lines, and counted."""
    follower = begun(real_server, ticks=lambda: 0.0)
    first = follower.epoch
    epochs = {first}
    with caplog.at_level(logging.WARNING, "distprefix"):
        for seq in range(0, 600, 2):
            follower.take([message(seq, stored(seq, PROMPT))])
            follower.take([Frame(seq + 1, b"\xc1")])
            epochs.add(follower.epoch)
    assert len(epochs) <= BURST + 1
    assert follower.counts["messages_unreadable"] == 300
    assert len(caplog.messages) == 1


@pytest.mark.parametrize("event", [["Heartbeat", 1], ["BlockRemoved", [5], "GPU"], ["BlockStored"], {"type": 1}])
def test_messages_that_change_nothing_are_written_rarely(
    real_server: Backend, monkeypatch: pytest.MonkeyPatch, event: Any
) -> None:
    """A storm of tiny messages does not become a storm of writes; how far the stream is gets there all the same."""
    now = [0.0]
    follower = begun(real_server, ticks=lambda: now[0])
    seen = commits(follower, monkeypatch)
    for seq in range(1000):
        follower.take([message(seq, event)])
    assert len(seen) <= 100
    now[0] += 1.0
    follower.take([])
    assert follower.is_written
    assert follower.position is not None
    assert follower.position.seq == 999


class Asked(Kept):
    """An engine that counts how often it is asked."""

    count = 0

    def replay(self, start: int, timeout_s: float, **_: Any) -> Iterator[Frame]:
        """Nothing."""
        self.count += 1
        raise ReplayError


def test_gaps_in_quick_succession_ask_for_few_replays(real_server: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """A storm of messages with numbers far apart asks a burst of times; what is lost is counted, and logged once."""
    asked = Asked()
    follower = begun(real_server, asked, ticks=lambda: 0.0)
    top = 2**64 - 2
    with caplog.at_level(logging.WARNING, "distprefix"):
        follower.take([message(seq, ["Heartbeat"]) for seq in range(0, top, top // 500)])
    assert asked.count <= 100
    assert follower.counts["messages"] == 501
    assert follower.counts["messages_lost"] > 2**63
    assert len(caplog.messages) <= 3


def test_a_rank_that_names_many_media_has_few_holders(real_server: Backend) -> None:
    """Each medium would be a field of every node: beyond eight they are left out and counted."""
    follower = begun(real_server)
    events = [[*stored(1, PROMPT)[:6], f"medium-{i}\x1b[2J", *stored(1, PROMPT)[7:]] for i in range(300)]
    follower.take([message(0, *events)])
    reader = real_server.open("reader", chunk_size=4)
    found = holders(reader, PROMPT)
    assert len(found) == 8
    assert all(name.isprintable() for name in found)
    assert follower.holdings.counts["other_media"] == 292 * 4


@pytest.mark.parametrize("at", [1, 256, 300])
def test_a_repeated_chunk_is_never_written(real_server: Backend, at: int) -> None:
    """With engine chains, what precedes the repetition is in the tree, and the tree is sound."""
    follower = begun(real_server, engine_chains=True)
    hashes = [bytes([i % 256, i // 256]) * 16 for i in range(1, 601)]
    hashes[at] = hashes[0][:16] + b"another tail"
    follower.take([message(0, ["BlockStored", hashes, None, [1] * 2400, 4, None, "GPU", None, [None] * len(hashes)])])
    assert follower.holdings.counts["repeats"] == 600 - at
    assert follower.holdings.chunks["gpu"] == at
    reader = real_server.open("reader", chunk_size=4)
    assert reader.check_integrity().problems == []


@pytest.mark.parametrize("at", [float("nan"), -1e300, 1e300, 2**63, None])
def test_times_that_cannot_be_are_not_believed(real_server: Backend, at: Any) -> None:
    """A message without a sound time changes nothing about how far behind the stream is said to be."""
    follower = begun(real_server)
    payload = msgpack.packb([at, [stored(1, PROMPT)], 0]) or b""
    follower.take([Frame(0, payload)])
    assert follower.lag_s == 0.0
    assert follower.is_written
