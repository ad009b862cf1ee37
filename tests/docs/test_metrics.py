"""docs/metrics.md has every key of get_metrics(), once, and no other."""

from __future__ import annotations

import re
from pathlib import Path

from tests.servers import Backend

PAGE = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text(encoding="utf-8")
KEYS = re.findall(r"^\| `(\w+)` \| \S", PAGE, re.MULTILINE)


def test_page_has_every_metric_and_no_other(real_server: Backend) -> None:
    """Each key has one row, whose first column is the key in backticks alone."""
    assert sorted(KEYS) == sorted(real_server.open("w1").get_metrics())
