"""Turns: one thread at a time, until a deadline, and none left taken."""

from __future__ import annotations

import threading
import time

from distprefix.turns import Turn


def test_one_at_a_time() -> None:
    """The second thread waits for the first, or until its deadline; giving back lets it on."""
    turn, me, other = Turn(), object(), object()
    assert turn.take(me, time.monotonic())
    began = time.monotonic()
    assert not turn.take(other, began + 0.05)
    assert 0.05 <= time.monotonic() - began < 5
    taken: list[bool] = []
    thread = threading.Thread(target=lambda: taken.append(turn.take(other, time.monotonic() + 20)))
    thread.start()
    turn.holder = None
    thread.join(20)
    assert taken == [True]
    assert turn.holder is other


def test_waiting_ends_with_the_turn() -> None:
    """Who waits without a deadline goes on when the turn is given back."""
    turn, me = Turn(), object()
    turn.wait()
    assert turn.take(me, time.monotonic())
    thread = threading.Thread(target=turn.wait)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    turn.holder = None
    thread.join(20)
    assert not thread.is_alive()
