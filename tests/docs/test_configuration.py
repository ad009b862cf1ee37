"""docs/configuration.md has every setting, with the default and the bounds that the code has."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

from distprefix import PrefixCacheConfig
from distprefix.errors import ConfigError

PAGE = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
ROWS = {
    name: (default, allowed)
    for name, default, allowed in re.findall(r"^\| `(\w+)` \| `(.*?)` \| (.*?) \|", PAGE, re.MULTILINE)
}
_BOUNDS = re.compile(r"(\S+) to ([^\s,]+)(?:, or none)?")
BOUNDS = {name: found for name, (_, text) in ROWS.items() if (found := _BOUNDS.fullmatch(text))}


def _number(text: str) -> float:
    base, _, power = text.partition("^")
    return float(base) ** float(power) if power else float(base)


def test_page_has_every_setting_and_no_other() -> None:
    """Each field of PrefixCacheConfig has one row."""
    assert sorted(ROWS) == sorted(field.name for field in fields(PrefixCacheConfig))


@pytest.mark.parametrize("name", sorted(ROWS))
def test_default_is_the_one_in_the_code(name: str) -> None:
    """The default on the page is the default of the field."""
    default = next(field.default for field in fields(PrefixCacheConfig) if field.name == name)
    assert ROWS[name][0] == repr(default)


@pytest.mark.parametrize("name", sorted(BOUNDS))
def test_bounds_are_those_in_the_code(name: str) -> None:
    """Both bounds on the page are accepted, and what lies beyond them is refused."""
    default = getattr(PrefixCacheConfig(), name)
    kind = int if default is None else type(default)
    low, high = (_number(text) for text in BOUNDS[name].groups())
    for value in (low, high):
        PrefixCacheConfig.from_mapping({name: kind(value)})
    for value in (low - 1, high * 2):
        with pytest.raises(ConfigError, match=name):
            PrefixCacheConfig.from_mapping({name: kind(value)})
