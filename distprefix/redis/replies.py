"""Replies as servers give them."""

from __future__ import annotations

from typing import Any, cast

__all__ = ["clock_ms", "pairs"]


def pairs(reply: Any) -> dict[bytes, bytes]:
    """A hash: a map (RESP3), or name after value (RESP2, and whatever comes out of a script)."""
    if isinstance(reply, dict):
        return cast("dict[bytes, bytes]", reply)
    return dict(zip(reply[::2], reply[1::2], strict=True))


def clock_ms(reply: Any) -> int:
    """The server's clock in ms since 1970, from the reply to TIME."""
    seconds, micros = reply
    return 1000 * int(seconds) + int(micros) // 1000
