"""The decision records are all listed, and each has the number and title of its entry."""

from __future__ import annotations

import re
from pathlib import Path

_FOLDER = Path(__file__).parents[2] / "docs" / "adr"


def test_the_list_has_every_record() -> None:
    """The list names every record once, in order."""
    listed = re.findall(r"^(\d+)\. \[[^]]+\]\(([^)]+)\)$", (_FOLDER / "README.md").read_text(), re.MULTILINE)
    files = sorted(path.name for path in _FOLDER.glob("0*.md"))
    assert [name for _, name in listed] == files
    assert [int(number) for number, _ in listed] == [int(name[:4]) for name in files]


def test_every_record_begins_with_its_number() -> None:
    """The title of a record has the number of its file."""
    for path in _FOLDER.glob("0*.md"):
        assert path.read_text().startswith(f"# {int(path.name[:4])}. "), path.name
