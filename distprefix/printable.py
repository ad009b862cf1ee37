"""Text that others wrote, as it may be shown: it steers no terminal, forges no line of a log and hides nothing. Pure.

Names, models and replies come from Redis and from engines, where anybody who may write chooses them.
"""

from __future__ import annotations

from math import isfinite
from typing import Any, cast

__all__ = ["escaped", "plain", "printable"]

_MAX_DEPTH = 500
"""Levels of a nested value; Python's own limit is a thousand calls."""
_MAX_BITS = 64
_CUT = "…"


def printable(text: str | bytes, limit: int | None = None, *, keep: str = "") -> str:
    """`text` with every character escaped that is no graphic one: controls, ESC, line ends, marks of direction.

    Bytes are read as UTF-8; those that are not are escaped. A text of more than `limit` characters is cut, and ends
    with how many are missing. Characters in `keep` stay. What it returns it would return again: backslashes stay.
    """
    if isinstance(text, bytes):
        text = text.decode(errors="backslashreplace")
    missing = 0 if limit is None else len(text) - limit
    if missing > 0:
        text = text[:limit]
    if not text.isprintable():
        text = "".join(each if each.isprintable() or each in keep else _escape(each) for each in text)
    return f"{text}{_CUT} ({missing:,} more)" if missing > 0 else text


def plain(value: Any, depth: int = _MAX_DEPTH) -> Any:
    """`value` as JSON can have it: what is no text, number, list or mapping becomes text; NaN and infinity None.

    What lies deeper than `depth` levels is cut.
    """
    if isinstance(value, dict):
        named: dict[str, Any] = {}
        for name, item in cast("dict[Any, Any]", value).items() if depth else ():
            named[str(_plain_item(name))] = plain(item, depth - 1)
        return named if depth else _CUT
    if isinstance(value, list | tuple):
        items: list[Any] = []
        for item in cast("list[Any]", value) if depth else ():
            items.append(plain(item, depth - 1))  # noqa: PERF401 - a comprehension would take a frame more a level
        return items if depth else _CUT
    return _plain_item(value)


def escaped(value: Any, limit: int | None = None) -> Any:
    """A value that `plain` returned, with every text in it, names too, as `printable` returns it."""
    if isinstance(value, dict):
        named: dict[str, Any] = {}
        for name, item in cast("dict[str, Any]", value).items():
            named[printable(name, limit)] = escaped(item, limit)
        return named
    if isinstance(value, list):
        items: list[Any] = []
        for item in cast("list[Any]", value):
            items.append(escaped(item, limit))  # noqa: PERF401 - as in `plain`
        return items
    return printable(value, limit) if isinstance(value, str) else value


def _plain_item(value: Any) -> Any:
    """What is neither a list nor a mapping."""
    if isinstance(value, bytes | bytearray):
        return value.decode(errors="backslashreplace")
    if isinstance(value, float):
        return value if isfinite(value) else None
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int):
        return value if value.bit_length() <= _MAX_BITS else f"{value:#x}"
    return str(value).encode(errors="backslashreplace").decode()


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
