"""All that commands print passes through here: nothing that Redis or an engine chose steers the terminal.

A command gives `show` plain values; what draws them gets them with every text escaped, and no text is read as markup.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from distprefix.printable import escaped, plain, printable

__all__ = ["Screen", "console", "fail", "note", "say", "show", "write_lines"]

_LONGEST_TEXT = 500
_LONGEST_MESSAGE = 4000

console = Console(highlight=False, markup=False, emoji=False)


def show(value: Any, *, as_json: bool, render: Callable[[Any], Any]) -> None:
    """Print `value` as one JSON value, or what `render` makes of it: it gets the value with every text escaped."""
    if as_json:
        sys.stdout.write(json.dumps(plain(value), allow_nan=False) + "\n")
    else:
        console.print(render(escaped(plain(value), _LONGEST_TEXT)))


def write_lines(lines: Iterable[str]) -> None:
    """Print lines as they are but for what steers a terminal: whole, for a program to read."""
    sys.stdout.writelines(f"{printable(line)}\n" for line in lines)


class Screen:
    """A part of the terminal that is drawn anew."""

    def __init__(self, live: Live) -> None:
        self._live = live

    def update(self, value: Any, render: Callable[[Any], Any]) -> None:
        """Draw what `render` makes of a value, as `show` does."""
        self._live.update(render(escaped(plain(value), _LONGEST_TEXT)), refresh=True)


def fail(message: str, code: int) -> NoReturn:
    """Say what is wrong on standard error and end with this exit code."""
    _say(Text.assemble(("error: ", "bold red"), _shown(message)))
    raise typer.Exit(code)


def note(message: str) -> None:
    """Say something on standard error, marked as a note."""
    say(f"note: {message}")


def say(line: str) -> None:
    """Say something on standard error, as standard output is for a command's result."""
    _say(Text(_shown(line)))


def _shown(message: str) -> str:
    return printable(message, _LONGEST_MESSAGE, keep="\n")


def _say(text: Text) -> None:
    Console(stderr=True, highlight=False).print(text, soft_wrap=True)
