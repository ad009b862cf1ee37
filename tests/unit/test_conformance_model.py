"""The corpus for readers of KV events: its files are what they should be, and a simple model agrees with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.make import FOLDER, files
from tests.conformance.model import run

_NAMES = ["name", "why", "engine", "chunk_size", "frames", "replay", "queries"]
_CASES = sorted(FOLDER.glob("*.json"))


def test_the_files_are_what_the_generator_makes() -> None:
    """Each file is there, unchanged, and no other; ``python tests/conformance/make.py`` writes them."""
    assert {path.name: path.read_text() for path in _CASES} == files()
    assert 40 <= len(_CASES) <= 80


@pytest.mark.parametrize("path", _CASES, ids=lambda path: path.stem)
def test_the_model_finds_what_is_expected(path: Path) -> None:
    """A model written without the index gives each query of a case the answer that the file has."""
    case: dict[str, Any] = json.loads(path.read_text())
    assert list(case) == [name for name in _NAMES if name != "replay" or "replay" in case]
    assert case["name"] == path.stem
    assert case["why"].endswith(".")
    assert run(case) == [query["holders"] for query in case["queries"]]
