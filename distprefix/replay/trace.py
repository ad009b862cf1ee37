"""Traces in Mooncake's format: one JSON object a line with ``timestamp``, ``input_length`` and the ids of its blocks.

Ids are chained: an id stands for its block and all before it. Besides ``hash_ids`` (Mooncake, FAST'25) a row may give
``hash_runs``, ``[[first, count], ...]`` for consecutive ids. Plain or gzipped, from a file or standard input.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from distprefix.errors import TraceError
from distprefix.lines import parse_json, read_lines

__all__ = ["Request", "ideal_hits", "read_trace"]

_MAX_CHUNKS = 1 << 20
"""In a request: 16 million tokens in the smallest blocks that engines have."""
_MAX_LINE_BYTES = 4 << 20
_MAX_NUMBER = 2**53
_MAX_ID = 2**63
_PAGE_BITS = 1024


class Request(NamedTuple):
    """One prompt of a trace."""

    timestamp: float
    runs: tuple[tuple[int, int], ...]
    """(first id, count), root first."""
    chunks: int
    input_length: int
    session: str


def read_trace(path: str, limit: int | None = None) -> list[Request]:
    """Every request in order of time. Raises TraceError with file, line and reason.

    Memory is in proportion to the file: a line has at most 4 MiB, a request 1,048,576 blocks, and a gzip file expands
    to 100 times its size at most.
    """
    requests = [_parse(line.text, line.where) for line in read_lines(path, _MAX_LINE_BYTES, TraceError)]
    if not requests:
        name = "standard input" if path == "-" else path
        raise TraceError(f"{name} has no requests: a trace has one JSON object a line, with hash_ids or hash_runs")
    requests.sort(key=lambda request: request.timestamp)  # stable: file order on ties
    return requests[:limit]


def ideal_hits(requests: Sequence[Request]) -> tuple[list[int], int]:
    """Leading chunks of each request that an unlimited cache shared by all would have, and the chunks it would hold."""
    seen = _IdSet()
    hits: list[int] = []
    for request in requests:
        hits.append(_leading(request, seen))
        for first, count in request.runs:
            seen.add(first, count)
    return hits, seen.size


def _leading(request: Request, seen: _IdSet) -> int:
    """Leading chunks of a request that were seen."""
    known = 0
    for first, count in request.runs:
        covered = seen.covered_from(first, count)
        known += covered
        if covered < count:
            break
    return known


class _IdSet:
    """A set of ids as bit masks, so that a run of ids takes a bit for each."""

    def __init__(self) -> None:
        self.size = 0
        """Ids in it."""
        self._pages: dict[int, int] = {}

    def covered_from(self, first: int, count: int) -> int:
        """How many of `count` ids from this one on are in it without a gap."""
        covered = 0
        while covered < count:
            page, bit = divmod(first + covered, _PAGE_BITS)
            mask = self._pages.get(page, 0) >> bit
            ones = (~mask & (mask + 1)).bit_length() - 1
            covered += ones
            if ones < _PAGE_BITS - bit:
                break
        return min(covered, count)

    def add(self, first: int, count: int) -> None:
        """Add `count` ids from this one on."""
        end = first + count
        while first < end:
            page, bit = divmod(first, _PAGE_BITS)
            width = min(end - first, _PAGE_BITS - bit)
            before = self._pages.get(page, 0)
            after = before | ((1 << width) - 1) << bit
            self._pages[page] = after
            self.size += after.bit_count() - before.bit_count()
            first += width


def _parse(line: str, where: str) -> Request:
    try:
        row: Any = parse_json(line)
    except ValueError as error:
        raise TraceError(f"{where}: no JSON: {error}") from error
    if not isinstance(row, dict):
        raise TraceError(f"{where}: a request is a JSON object, not {type(row).__name__}")
    fields = cast("dict[str, Any]", row)
    runs = _runs(fields, where)
    timestamp = _number(fields, "timestamp", where)
    length = _number(fields, "input_length", where)
    chunks = sum(count for _, count in runs)
    if chunks > _MAX_CHUNKS:
        raise TraceError(f"{where}: {chunks} blocks in one request, at most {_MAX_CHUNKS} are read")
    session = str(fields.get("session_id", "")).encode(errors="backslashreplace").decode()
    return Request(float(timestamp), runs, chunks, int(length), session)


def _number(fields: dict[str, Any], name: str, where: str) -> float:
    value = fields.get(name, 0)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= _MAX_NUMBER:
        raise TraceError(f"{where}: {name} is {repr(value)[:40]}: it must be a number between 0 and 2^53")
    return value


def _runs(row: dict[str, Any], where: str) -> tuple[tuple[int, int], ...]:
    pairs: Any
    if "hash_ids" in row:
        ids: Any = row["hash_ids"]
        pairs = ((i, 1) for i in cast("list[Any]", ids)) if isinstance(ids, list) else None
    elif "hash_runs" in row:
        pairs = row["hash_runs"]
    else:
        raise TraceError(f"{where}: no hash_ids and no hash_runs: these are the ids of a prompt's blocks")
    runs: list[tuple[int, int]] = []
    try:
        for first, count in pairs:
            if type(first) is not int or type(count) is not int or count < 1 or not 0 <= first < _MAX_ID:
                raise ValueError
            if runs and runs[-1][0] + runs[-1][1] == first:
                runs[-1] = (runs[-1][0], runs[-1][1] + count)
            else:
                runs.append((first, count))
    except (TypeError, ValueError):
        raise TraceError(
            f"{where}: block ids are whole numbers from 0 to below 2^63: check hash_ids or hash_runs"
        ) from None
    return tuple(runs)
