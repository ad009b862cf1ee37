"""The benchmark of longest script calls runs on every tree, and measures each script that it names."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # a script's folder, no package
longest_scripts: Any = importlib.import_module("longest_scripts")

pytestmark = pytest.mark.timeout(180)


def test_every_tree_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    """Small trees of each kind are built and every step goes well; the package's scripts are in the table."""
    rows = longest_scripts.measure(0.002, full=True)
    assert capsys.readouterr().err == "", "a step failed"
    assert {row.tree for row in rows} == set(longest_scripts.trees(0.002, full=True))
    measured = {row.script for row in rows}
    assert measured >= {
        *("walk", "insert", "ingest", "store", "where", "lease", "evict", "prewarm", "idle", "guess", "hot", "touch"),
        *("trim", "drop", "sweep", "census", "roster", "register", "move"),
    }
    assert all(row.longest_ms >= row.median_ms >= 0 and row.calls > 0 for row in rows)


def test_a_row_says_where_the_longest_call_was() -> None:
    """Each row names the step that the longest call was part of, and sums up all calls."""
    for row in longest_scripts.measure(0.002, "holders"):
        assert row.longest_in
        assert row.total_ms >= row.longest_ms - 0.1
