"""The benchmark of server states in a short form: no exception, no wrong byte, deadlines kept, well again."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # a script's folder, no package
server_states: Any = importlib.import_module("server_states")
STATES: dict[str, Any] = {state.name: state for state in importlib.import_module("server_state_list").STATES}

SHORT_S = 0.5
LONG_S = 3.0
MARGIN_S = 1.0
"""For the scheduler of a busy machine."""
EVIDENCE = ("payloads deleted", "payloads damaged")
"""States in which payloads are really gone, or are not what was stored."""


def test_there_are_about_forty_states() -> None:
    """States have names of their own."""
    assert len(STATES) >= 40


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        *(pytest.param(name, SHORT_S, id=name) for name, state in STATES.items() if state.short),
        *(pytest.param(name, LONG_S, id=f"{name}, long", marks=pytest.mark.long) for name in STATES),
    ],
)
def test_a_worker_goes_through_a_state(name: str, seconds: float) -> None:
    """Before, in and after the state every call ends in time and well; only evidence trims the tree."""
    row = server_states.run_state(STATES[name], seconds)
    assert row.exceptions == []
    assert row.wrong == 0
    assert row.recovered_s is not None
    assert row.calls > 0
    for kind, deadline_s in server_states.DEADLINES_S.items():
        assert row.slowest_ms[kind] / 1000 < deadline_s + MARGIN_S, kind
    if name not in EVIDENCE:
        assert row.trimmed == 0
