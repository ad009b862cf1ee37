"""Lines of JSON from a file that nobody vouches for, plain or gzipped: memory stays in proportion to the file."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import sys
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from distprefix.errors import DistPrefixError

__all__ = ["Line", "parse_json", "read_lines"]

_MAX_EXPANSION = 100
"""Decompressed bytes per byte of the file. Traces and events reach 15; gzip itself reaches 1,000."""
_FREE_BYTES = 1 << 20
"""Decompressed bytes that any file may have."""
_PIECE_BYTES = 1 << 18


class Line(NamedTuple):
    """One line that is not blank."""

    where: str
    """File and line, for messages."""
    text: str


def read_lines(path: str, max_bytes: int, error: type[DistPrefixError]) -> Iterator[Line]:
    """Read the lines of a file, ``-`` for standard input, one at a time. Blank ones are left out.

    Raises `error` with file and line for a line of more than `max_bytes` bytes, for one that is no UTF-8, and for a
    gzip file that expands to more than 100 times its size; with the file for one that cannot be read.
    """
    name = "standard input" if path == "-" else path
    where = name
    number = size = 0
    pieces: list[bytes] = []
    try:
        with _opened(path) as (source, read):
            while piece := source.readline(_PIECE_BYTES):
                where = f"{name}, line {number + 1}"
                pieces.append(piece)
                size += len(piece)
                if size > _FREE_BYTES + _MAX_EXPANSION * read.count:
                    raise error(f"{where}: the file expands to more than {_MAX_EXPANSION} times its size: unpack it")
                if len(pieces) * _PIECE_BYTES > max_bytes + _PIECE_BYTES:
                    raise error(f"{where}: longer than {max_bytes} bytes: one line is one JSON object")
                if piece.endswith(b"\n"):
                    number += 1
                    yield from _line(where, pieces)
            yield from _line(where, pieces)
    except UnicodeDecodeError as problem:
        raise error(f"{where}: no UTF-8: {problem.reason}") from problem
    except (OSError, EOFError, zlib.error) as problem:
        raise error(f"{name} cannot be read: {problem}") from problem


def _line(where: str, pieces: list[bytes]) -> Iterator[Line]:
    """The line that these pieces make, unless it is blank. The list is empty afterwards."""
    text = b"".join(pieces).decode()
    pieces.clear()
    if text and not text.isspace():
        yield Line(where, text)


def parse_json(text: str) -> Any:
    """The value of a JSON text. Raises ValueError, for infinities, NaN and what is nested too deeply as well."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


class _Counted(io.RawIOBase):
    """A stream that counts what was read of it."""

    def __init__(self, raw: IO[bytes]) -> None:
        self.count = 0
        self._raw = raw

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; returns how many bytes."""
        data = self._raw.read(len(buffer))
        buffer[: len(data)] = data
        self.count += len(data)
        return len(data)


@contextlib.contextmanager
def _opened(path: str) -> Generator[tuple[IO[bytes], _Counted]]:
    with contextlib.ExitStack() as stack:
        raw: IO[bytes] = sys.stdin.buffer if path == "-" else stack.enter_context(Path(path).open("rb"))
        counted = _Counted(raw)
        buffered = io.BufferedReader(counted)
        if buffered.peek(2)[:2] == b"\x1f\x8b":
            yield cast("IO[bytes]", stack.enter_context(gzip.GzipFile(fileobj=buffered))), counted
        else:
            yield cast("IO[bytes]", buffered), counted
