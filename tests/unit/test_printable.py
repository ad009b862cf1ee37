"""Text of others as it may be shown."""

from __future__ import annotations

import ast
import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distprefix.errors import UnavailableError
from distprefix.printable import escaped, plain, printable

CLI = Path(__file__).parents[2] / "distprefix" / "cli"
_anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary() | st.integers(), inner),
    max_leaves=20,
)


@given(st.text(st.characters(exclude_categories=())) | st.binary())
@example("\x1b]0;owned\x07\x9b2J\u202egnp.exe\u2066\u200b\u2028\r\n\t\x7f\ud800")
@example(b"\xff\xfe\x1b[2J")
def test_nothing_steers_a_terminal(text: str | bytes) -> None:
    """No control, no mark of direction, no separator of lines is left, and escaping again changes nothing."""
    shown = printable(text)
    assert not {unicodedata.category(each) for each in shown} & {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}
    assert printable(shown) == shown
    assert isinstance(text, bytes) or not text.isprintable() or shown == text


def test_escapes_name_the_character() -> None:
    """What is escaped can be read: its number in hex, the shortest form."""
    assert printable("a\x1b[2J\u202eb\U000e0041") == r"a\x1b[2J\u202eb\U000e0041"
    assert printable(b"\xff\xc3\xa9") == r"\xffé"
    assert printable("two\nlines\t", keep="\n") == "two\nlines\\t"


def test_long_text_is_cut() -> None:
    """A text that is longer than the limit ends with how much is missing."""
    assert printable("x" * 10, 10) == "x" * 10
    assert printable("x" * 1010, 10) == "x" * 10 + "… (1,000 more)"


@given(_anything)
@example({b"\xff": float("nan"), "a": [float("-inf"), 10**5000, {1, 2}]})
def test_values_become_json(value: Any) -> None:
    """Whatever a value has, it is JSON afterwards, strictly, and every text in it can be escaped."""
    found = plain(value)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    for text in _texts(escaped(found)):
        assert text.isprintable()


def test_depth_is_bounded() -> None:
    """What is nested deeper than asked for is cut; as deep as by default it is JSON still."""
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    assert plain(deep, 2) == [["…"]]
    assert len(json.dumps(escaped(plain(deep)))) > 1000


def test_errors_are_one_printable_line() -> None:
    """An exception's message escapes what it quotes, and is bounded."""
    error = UnavailableError("the server said: \x1b[2J\nforged line" + "x" * 10_000)
    assert str(error).isprintable()
    assert len(str(error)) < 4100


def _texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for name, item in value.items() for text in (name, *_texts(item))]
    return [text for item in value for text in _texts(item)] if isinstance(value, list) else []


_WRITES = {"print", "echo", "secho", "write", "writelines", "print_json", "log", "Console", "from_markup", "from_ansi"}


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_commands_print_through_one_place(path: Path) -> None:
    """No command writes by itself: all goes through `distprefix.cli.output`, which escapes."""
    if path.stem == "output":
        return
    tree = ast.parse(path.read_text(encoding="utf-8"))
    allowed = {"__init__": {"print"}, "app": {"echo"}, "replay": {"Console"}, "following": {"write"}}.get(
        path.stem, set()
    )
    called = {_name(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert called & _WRITES == allowed


@pytest.mark.parametrize("path", sorted(CLI.glob("*.py")), ids=lambda path: path.stem)
def test_commands_draw_what_they_are_given(path: Path) -> None:
    """What draws a value gets it from `show`, which escaped it, and not from the command's own variables."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    own = {"demo", "replay"}  # numbers that this process counted
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and _name(node.func) == "show" and path.stem not in own:
            (render,) = (each.value for each in node.keywords if each.arg == "render")
            assert not isinstance(render, ast.Lambda) or render.args.args[0].arg == "shown"


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""
