"""Traces in Mooncake's format: one JSON object a line with ``timestamp``, ``input_length`` and the ids of its blocks.

Ids are chained: an id stands for its block and all before it. Besides ``hash_ids`` (Mooncake, FAST'25) a row may give
``hash_runs``, ``[[first, count], ...]`` for consecutive ids. Plain or gzipped, from a file or standard input.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import sys
import zlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, cast

from distprefix.errors import TraceError

__all__ = ["Request", "ideal_hits", "read_trace"]

_MOST_CHUNKS = 1 << 24


class Request(NamedTuple):
    """One prompt of a trace."""

    timestamp: float
    runs: tuple[tuple[int, int], ...]
    """(first id, count), root first."""
    chunks: int
    input_length: int
    session: str


def read_trace(path: str, limit: int | None = None) -> list[Request]:
    """Every request in order of time. Raises TraceError with file, line and reason."""
    requests: list[Request] = []
    name = "standard input" if path == "-" else path
    try:
        with _open(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    requests.append(_parse(line, f"{name}, line {number}"))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TraceError(f"{name} cannot be read as a trace: {error}") from error
    if not requests:
        raise TraceError(f"{name} has no requests: a trace has one JSON object a line, with hash_ids or hash_runs")
    requests.sort(key=lambda request: request.timestamp)  # stable: file order on ties
    return requests[:limit]


def ideal_hits(requests: Sequence[Request]) -> tuple[list[int], int]:
    """Leading chunks of each request that an unlimited cache shared by all would have, and the chunks it would hold."""
    seen: set[int] = set()
    hits: list[int] = []
    for request in requests:
        ids = [i for first, count in request.runs for i in range(first, first + count)]
        known = next((at for at, i in enumerate(ids) if i not in seen), len(ids))
        seen.update(ids[known:])
        hits.append(known)
    return hits, len(seen)


@contextlib.contextmanager
def _open(path: str) -> Generator[io.TextIOWrapper]:
    with contextlib.ExitStack() as stack:
        raw: IO[bytes] = sys.stdin.buffer if path == "-" else stack.enter_context(Path(path).open("rb"))
        peeked = io.BufferedReader(cast("io.RawIOBase", raw))
        if peeked.peek(2)[:2] == b"\x1f\x8b":
            yield io.TextIOWrapper(stack.enter_context(gzip.GzipFile(fileobj=peeked)), encoding="utf-8")
        else:
            yield io.TextIOWrapper(peeked, encoding="utf-8")


def _parse(line: str, where: str) -> Request:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise TraceError(f"{where}: no JSON: {error}") from error
    if not isinstance(row, dict):
        raise TraceError(f"{where}: a request is a JSON object, not {type(row).__name__}")
    fields = cast("dict[str, Any]", row)
    runs = _runs(fields, where)
    timestamp, length = fields.get("timestamp", 0), fields.get("input_length", 0)
    for name, value in (("timestamp", timestamp), ("input_length", length)):
        if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
            raise TraceError(f"{where}: {name} is {value!r}, it must be a number and not negative")
    chunks = sum(count for _, count in runs)
    if chunks > _MOST_CHUNKS:
        raise TraceError(f"{where}: {chunks} blocks in one request, at most {_MOST_CHUNKS} are read")
    return Request(float(timestamp), runs, chunks, int(length), str(fields.get("session_id", "")))


def _runs(row: dict[str, Any], where: str) -> tuple[tuple[int, int], ...]:
    pairs: Any
    if "hash_ids" in row:
        ids: Any = row["hash_ids"]
        pairs = [[i, 1] for i in ids] if isinstance(ids, list) else None
    elif "hash_runs" in row:
        pairs = row["hash_runs"]
    else:
        raise TraceError(f"{where}: no hash_ids and no hash_runs: these are the ids of a prompt's blocks")
    runs: list[tuple[int, int]] = []
    try:
        for first, count in pairs:
            if type(first) is not int or type(count) is not int or first < 0 or count < 1:
                raise ValueError
            if runs and runs[-1][0] + runs[-1][1] == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            else:
                runs.append((first, count))
    except (TypeError, ValueError):
        raise TraceError(f"{where}: block ids are whole numbers, not negative: check hash_ids or hash_runs") from None
    return tuple(runs)
