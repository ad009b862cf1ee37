"""docs/data-model.md names every key and every script, and its measured table has scripts of ours."""

from __future__ import annotations

import re
from pathlib import Path

from distprefix import operations
from distprefix.redis.keys import REGISTRY, RELIEVING, REMOVING, Keys
from distprefix.redis.scripts import SCRIPTS
from distprefix.tiers import operations as payloads

_PAGE = (Path(__file__).parents[2] / "docs" / "data-model.md").read_text(encoding="utf-8")
_BOUNDS = _PAGE.split("## What bounds a call")[1].split("<!-- longest -->")[0]
_LONGEST = _PAGE.split("<!-- longest -->\n")[1].split("<!-- end -->")[0]


def test_every_key_is_described() -> None:
    """Each key that the package builds has a row."""
    keys = Keys("NS")
    own = (value for value in vars(keys).values() if isinstance(value, str))
    parts = (keys.base, keys.every)
    names = [*keys.own, REGISTRY, RELIEVING, REMOVING, *(value for value in own if value not in parts)]
    for name in names:
        shown = name.replace("NS:0", "<ns>:<shard>").replace("NS", "<ns>")
        assert f"`{shown}`" in _PAGE, shown


def test_every_script_is_bounded() -> None:
    """The table of bounds names each script once."""
    named = [
        name
        for row in _BOUNDS.splitlines()
        if row.startswith("| `")
        for name in re.findall(r"`(\w+)`", row.split("|")[1])
    ]
    assert sorted(named) == sorted(SCRIPTS)


def test_numbers_are_those_of_the_code() -> None:
    """What the table says of sizes is what the code sends."""
    rows = {row.split("`")[1]: row for row in _BOUNDS.splitlines() if row.startswith("| `")}
    assert f"{operations.EVICTS_A_CALL} leaves" in rows["evict"]
    assert f"{operations.TOUCHES_A_CALL} nodes" in rows["touch"]
    assert f"{operations.HOT_A_CALL} nodes" in rows["hot"]
    assert f"{payloads.STORES_A_CALL} chunks" in rows["store"]


def test_measured_scripts_are_ours() -> None:
    """The table of longest calls names scripts that there are, with numbers."""
    for row in _LONGEST.splitlines()[2:]:
        script, _, longest, *_ = (cell.strip() for cell in row.strip("|").split("|"))
        assert script.strip("`") in SCRIPTS
        assert float(longest) >= 0
