"""Calls that resume one another: what gets on, and what is a circle."""

from __future__ import annotations

from itertools import cycle, islice

import pytest

from distprefix.damage import Progress


@pytest.mark.parametrize("length", [1, 2, 3, 50])
@pytest.mark.parametrize("before", [0, 1, 7, 100])
def test_a_circle_is_found(before: int, length: int) -> None:
    """However long a circle is and whatever precedes it, it is found within a few rounds."""
    progress = Progress()
    places = [*range(before), *islice(cycle(range(before, before + length)), 10 * (before + length))]
    assert not all(progress.goes_on(place) for place in places)


def test_a_way_without_circles_goes_on() -> None:
    """Places that all differ are never taken for a circle."""
    progress = Progress()
    assert all(progress.goes_on(place) for place in range(10_000))


def test_what_changes_something_gets_on() -> None:
    """The same place again is no circle where the call before has changed something."""
    progress = Progress()
    assert all(progress.goes_on("place", has_changed=True) for _ in range(100))
    assert not progress.goes_on("place")
