"""One test in two lengths: a short one by default, and a long one for `-m long`."""

from __future__ import annotations

import pytest

__all__ = ["short_or_long"]


def short_or_long(name: str, short: int | None, long: int | None) -> pytest.MarkDecorator:
    """Run a test with `name=short`, and with `name=long`, for ten minutes at most, only where `-m long` selects it."""
    marks = [pytest.mark.long, pytest.mark.timeout(600)]
    return pytest.mark.parametrize(name, [pytest.param(short, id="short"), pytest.param(long, id="long", marks=marks)])
