"""docs/security.md: each promise names tests that there are."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@cache
def names_in(path: str) -> set[str]:
    """Names of the tests of a file."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize(("path", "name"), NAMED)
def test_named_tests_exist(path: str, name: str) -> None:
    """A test that a promise rests on is where the page says."""
    assert name in names_in(path)


def test_every_promise_has_a_test() -> None:
    """Each row of a table of promises names at least one test."""
    tables = re.findall(r"\| promise \| held by \|\n\| --- \| --- \|\n((?:\|.*\n)+)", PAGE)
    assert len(tables) >= 7
    for row in "".join(tables).splitlines():
        assert "::test_" in row, row
