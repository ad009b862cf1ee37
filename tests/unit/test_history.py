"""What a process makes of the generation and the number of its writes that each reply has. Pure."""

from __future__ import annotations

from distprefix.history import History, Loss


def test_what_grows_is_well() -> None:
    """Replies with as many writes as were acknowledged, or more, lose nothing, and the highest is kept."""
    history = History(b"g", 7, b"4 7 w/0")
    assert history.check(0, b"g", 0, 1) is None
    assert history.check(1, b"g", 1, 2) is None
    assert history.check(2, b"g", 2, 2) is None
    assert (history.acked, history.is_lost) == (2, False)


def test_one_write_less_is_lost() -> None:
    """A write whose reply says that one before it is missing shows a loss, though the number itself did not fall."""
    history = History(b"g")
    assert history.check(0, b"g", 0, 1) is None
    assert history.check(1, b"g", 0, 1) is Loss.POSITION


def test_replies_may_overtake_each_other() -> None:
    """A reply is compared with what was acknowledged when its call was sent, not with what came meanwhile."""
    history = History(b"g")
    assert history.check(0, b"g", 1, 2) is None
    assert history.check(0, b"g", 0, 1) is None
    assert history.acked == 2


def test_another_generation_is_lost() -> None:
    """A shard of another generation has lost everything, whatever number it says."""
    assert History(b"g").check(0, b"h", 9, 9) is Loss.GENERATION


def test_a_newer_process_says_nothing() -> None:
    """Where a newer process has the worker's name, the reply says nothing of this one's writes."""
    history = History(b"g")
    assert history.check(5, b"g", -1, -1) is None
    assert history.acked == 0


def test_a_loss_is_said_once() -> None:
    """The first who notices says so, and no other."""
    history = History(b"g")
    assert [history.lose(), history.lose()] == [True, False]
    assert history.is_lost
