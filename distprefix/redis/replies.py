"""Replies as servers give them."""

from __future__ import annotations

import re
from typing import Any, cast

__all__ = ["clock_ms", "count_of", "is_chunk_name", "pairs"]

_COUNT = re.compile(rb"[0-9]{1,15}")
_CHUNK = re.compile(rb"[0-9a-f]{32}")


def pairs(reply: Any) -> dict[bytes, bytes]:
    """A hash: a map (RESP3), or name after value (RESP2, and whatever comes out of a script)."""
    if isinstance(reply, dict):
        return cast("dict[bytes, bytes]", reply)
    return dict(zip(reply[::2], reply[1::2], strict=True))


def clock_ms(reply: Any) -> int:
    """The server's clock in ms since 1970, from the reply to TIME."""
    seconds, micros = reply
    return 1000 * int(seconds) + int(micros) // 1000


def count_of(value: bytes | None, otherwise: int = 0) -> int:
    """A stored whole number; `otherwise` for what is none, or more than a server counts up to."""
    return int(value) if value is not None and _COUNT.fullmatch(value) else otherwise


def is_chunk_name(name: bytes) -> bool:
    """Whether this is a chunk hash as keys, junctions and lists name it."""
    return _CHUNK.fullmatch(name) is not None
