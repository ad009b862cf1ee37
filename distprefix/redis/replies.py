"""Replies as servers give them."""

from __future__ import annotations

from typing import Any, cast

__all__ = ["clock_ms", "is_wrong_type", "pairs", "text", "whole"]

_MAX_DIGITS = 18
"""Of a number that fits into 64 bits."""


def pairs(reply: Any) -> dict[bytes, bytes]:
    """A hash: a map (RESP3), or name after value (RESP2, and whatever comes out of a script)."""
    if isinstance(reply, dict):
        return cast("dict[bytes, bytes]", reply)
    return dict(zip(reply[::2], reply[1::2], strict=True))


def clock_ms(reply: Any) -> int:
    """The server's clock in ms since 1970, from the reply to TIME."""
    seconds, micros = reply
    return 1000 * int(seconds) + int(micros) // 1000


def whole(value: Any) -> int:
    """A count as a reply has it; 0 for what is none, as another type, a sign, more than 18 digits."""
    if isinstance(value, bytes):
        return int(value) if value.isdigit() and len(value) <= _MAX_DIGITS else 0
    return value if isinstance(value, int) and 0 <= value < 10**_MAX_DIGITS else 0


def text(value: Any) -> str:
    """A name as a reply has it, bytes that are no UTF-8 replaced; empty for what is no name."""
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


def is_wrong_type(error: Exception) -> bool:
    """Whether a server's error, or one of ours that quotes it, says that the key has another type."""
    return "WRONGTYPE" in str(error)
