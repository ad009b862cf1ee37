"""The circuit breaker on a clock of our own."""

from __future__ import annotations

import pytest

from distprefix.redis.breaker import Breaker, BreakerState


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Now."""
        return self.now


@pytest.fixture
def clock() -> Clock:
    """A clock at a hundred seconds."""
    return Clock()


def breaker(clock: Clock, failures: int = 3) -> Breaker:
    """Opens after so many failures for two seconds, without jitter."""
    return Breaker(failures, 2.0, clock, lambda: 1.0)


def fail(tested: Breaker, times: int) -> None:
    """So many failures in a row."""
    for _ in range(times):
        tested.fail()


def test_it_opens_after_failures_in_a_row(clock: Clock) -> None:
    """A success in between starts the count anew."""
    tested = breaker(clock)
    fail(tested, 2)
    tested.succeed()
    fail(tested, 2)
    assert tested.allow()
    tested.fail()
    assert (tested.allow(), tested.state, tested.opened) == (False, BreakerState.OPEN, 1)


def test_one_probe_at_a_time(clock: Clock) -> None:
    """When the time has come exactly one caller may ask, until it tells how it went."""
    tested = breaker(clock)
    fail(tested, 3)
    clock.now += 1.99
    assert not tested.allow()
    clock.now += 0.02
    assert (tested.allow(), tested.allow(), tested.state) == (True, False, BreakerState.HALF_OPEN)
    tested.succeed()
    assert (tested.allow(), tested.allow(), tested.state) == (True, True, BreakerState.CLOSED)


def test_failed_probes_wait_longer(clock: Clock) -> None:
    """Each failed probe doubles the wait, up to five seconds; a success makes it short again."""
    tested = breaker(clock)
    fail(tested, 3)
    for wait in (2, 4, 5, 5):
        clock.now += wait - 0.01
        assert not tested.allow()
        clock.now += 0.02
        assert tested.allow()
        tested.fail()
    clock.now += 31
    assert tested.allow()
    tested.succeed()
    fail(tested, 3)
    clock.now += 2.01
    assert tested.allow()


def test_a_prober_that_never_tells_blocks_nobody(clock: Clock) -> None:
    """A probe whose outcome is never reported makes way for another after a while."""
    tested = breaker(clock)
    fail(tested, 3)
    clock.now += 2.01
    assert tested.allow()
    clock.now += 2.01
    assert tested.allow()


def test_late_failures_do_not_count_as_openings(clock: Clock) -> None:
    """Calls that were under way when it opened may still fail without opening it again."""
    tested = breaker(clock)
    fail(tested, 7)
    assert tested.opened == 1


def test_jitter_spreads_probes(clock: Clock) -> None:
    """The wait is multiplied by the jitter."""
    tested = Breaker(1, 2.0, clock, lambda: 1.25)
    tested.fail()
    clock.now += 2.4
    assert not tested.allow()
    clock.now += 0.11
    assert tested.allow()
