"""docs/reliability.md has a row for each state of the benchmark, names what the code names, and its example runs."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from distprefix import PrefixCacheConfig
from distprefix.redis.causes import cause_of_code
from tests.servers import Backend

_ROOT = Path(__file__).parents[2]
sys.path.append(str(_ROOT / "benchmarks"))  # a script's folder, no package
STATES: Any = importlib.import_module("server_state_list").STATES
PAGE = (_ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
_BEFORE, _MARKED = PAGE.split("<!-- states -->\n")
TABLE = [line.strip("| ").split(" | ") for line in _MARKED.split("<!-- end -->")[0].splitlines()]
ROWS = TABLE[2:]


def test_table_has_every_state_and_no_other() -> None:
    """Each state of the benchmark has one row, in its order."""
    assert [row[0] for row in ROWS] == [state.name for state in STATES]


def test_no_row_has_a_wrong_answer_or_stays_broken() -> None:
    """The last column is 0 everywhere, and all is well again after every state."""
    assert {row[-1] for row in ROWS} == {"0"}
    assert all(re.fullmatch(r"\d+\.\d s", row[-2]) for row in ROWS)


def test_breakers_are_those_of_health(real_server: Backend) -> None:
    """The table of breakers has each breaker of a cache once."""
    named = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]*url", PAGE, re.MULTILINE)
    assert named == list(real_server.open("w1").health().breakers)


def test_deadlines_are_the_defaults() -> None:
    """Each deadline on the page has the default that the code has."""
    for name, value in re.findall(r"`(\w+_timeout_s)` \((\S+) s\)", PAGE):
        assert getattr(PrefixCacheConfig(), name) == float(value), name


def test_causes_are_those_of_the_code() -> None:
    """What the page says of codes holds."""
    for name in ("misconf", "noreplicas", "readonly", "loading", "masterdown", "busy", "err"):
        assert cause_of_code(name.upper()) == name
        assert f"`{name}`" in PAGE
    for code, cause in re.findall(r"`([a-z ]+)` \(([A-Z]+)\)", PAGE):
        assert cause_of_code(cause) == code


def test_example_runs(real_server: Backend) -> None:
    """The example runs as written, and says that all is well."""
    (program,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {"cache": real_server.open("w1")}
    exec(program, names)
    assert names["health"].ok
    assert names["health"].roles == {"tree": "master"}
