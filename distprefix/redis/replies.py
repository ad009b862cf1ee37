"""Replies as servers give them."""

from __future__ import annotations

import re
from typing import Any, cast

__all__ = ["clock_ms", "count_of", "is_chunk_name", "is_wrong_type", "pairs", "text"]

_COUNT = re.compile(rb"[0-9]{1,15}")
_MAX_COUNT = 10**15
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


def count_of(value: Any, otherwise: int = 0) -> int:
    """A whole number as a reply or a key has it; `otherwise` for what is none, or more than a server counts up to."""
    if isinstance(value, bytes):
        return int(value) if _COUNT.fullmatch(value) else otherwise
    return value if isinstance(value, int) and 0 <= value < _MAX_COUNT else otherwise


def text(value: Any) -> str:
    """A name as a reply has it, bytes that are no UTF-8 replaced; empty for what is no name."""
    return value.decode(errors="replace") if isinstance(value, bytes) else ""


def is_wrong_type(error: Exception) -> bool:
    """Whether a server's error, or one of ours that quotes it, says that the key has another type."""
    return "WRONGTYPE" in str(error)


def is_chunk_name(name: bytes) -> bool:
    """Whether this is a chunk hash as keys, junctions and lists name it."""
    return _CHUNK.fullmatch(name) is not None
