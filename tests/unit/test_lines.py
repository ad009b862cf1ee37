"""Files of JSON lines: what is read, and what small files cannot be made to cost."""

from __future__ import annotations

import gzip
import tracemalloc
from pathlib import Path

import pytest

from distprefix.errors import TraceError
from distprefix.lines import parse_json, read_lines
from distprefix.replay.trace import ideal_hits, read_trace

MIB = 1 << 20


def read(path: Path, max_bytes: int = 1000) -> list[tuple[str, str]]:
    """The lines of a file, each with the end of where it is."""
    found = read_lines(str(path), max_bytes, TraceError)
    return [(line.where.rpartition(", ")[2], line.text.strip()) for line in found]


@pytest.mark.parametrize("packed", [False, True])
def test_lines_come_with_their_numbers(tmp_path: Path, packed: bool) -> None:
    """Plain or gzipped, with blank lines between them, and with or without an end of the last one."""
    path = tmp_path / "lines"
    data = "a\n\n  \r\n" + "ü" * 500 + "\nlast"
    path.write_bytes(gzip.compress(data.encode()) if packed else data.encode())
    assert read(path) == [("line 1", "a"), ("line 4", "ü" * 500), ("line 5", "last")]


@pytest.mark.parametrize(("size", "fits"), [(MIB // 4, True), (MIB // 2, True), (MIB // 2 + MIB // 4 + 1, False)])
def test_a_long_line_is_refused(tmp_path: Path, size: int, fits: bool) -> None:
    """A line is refused by its place once it is longer than allowed, by a piece at most."""
    path = tmp_path / "lines"
    path.write_bytes(b"a\n" + b"b" * size)
    if fits:
        assert read(path, MIB // 2)[1][0] == "line 2"
    else:
        with pytest.raises(TraceError, match=r"lines, line 2: longer than 524288 bytes"):
            read(path, MIB // 2)


def test_a_gzip_bomb_takes_no_memory(tmp_path: Path) -> None:
    """A file that expands a thousand times ends with an error before the memory does."""
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(b" " * (64 * MIB)))
    tracemalloc.start()
    try:
        with pytest.raises(TraceError, match="bomb, line 1: the file expands to more than 100 times"):
            read(path, 4 * MIB)
        assert tracemalloc.get_traced_memory()[1] < 12 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("filling", [b" ", b"\n", b"{}\n"])
def test_a_gzip_bomb_is_refused(tmp_path: Path, filling: bytes) -> None:
    """Whatever it is made of, in one line or in many."""
    path = tmp_path / "bomb"
    path.write_bytes(gzip.compress(filling * (2 * MIB // len(filling))))
    with pytest.raises(TraceError, match=r"bomb, line \d+: the file expands to more than 100 times its size"):
        for _ in read_lines(str(path), 4 * MIB, TraceError):
            pass


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """The message names the line."""
    path = tmp_path / "lines"
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(TraceError, match="line 2: no UTF-8"):
        read(path)


@pytest.mark.parametrize(
    "text",
    ["[" * 200_000 + "]" * 200_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "1" * 5000, "NaN", "-Infinity", "{", ""],
    ids=["deep lists", "deep maps", "long number", "NaN", "infinity", "open", "empty"],
)
def test_what_is_no_plain_json_is_refused(text: str) -> None:
    """Whatever is wrong, it is a ValueError."""
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"hash_ids": [1], "timestamp": 1e999}', "line 1: timestamp"),
        ('{"hash_ids": [1], "timestamp": ' + "9" * 4000 + "}", "line 1: timestamp"),
        ('{"hash_ids": [1], "input_length": -1}', "line 1: input_length"),
        ('{"hash_ids": [1], "input_length": ' + "9" * 400 + "}", "line 1: input_length"),
        ('{"hash_ids": [9223372036854775808]}', "line 1: block ids"),
        ('{"hash_runs": [[0, 1048577]]}', "line 1: 1048577 blocks"),
        ('{"hash_ids": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 1: no JSON: it is nested too deeply"),
    ],
    ids=["infinite", "huge time", "negative", "huge length", "large id", "many blocks", "deep"],
)
def test_rows_of_a_trace_that_cannot_be(tmp_path: Path, row: str, reason: str) -> None:
    """Numbers that no trace has are refused with the file and the line, in a short message."""
    path = tmp_path / "trace"
    path.write_text(row)
    with pytest.raises(TraceError, match=reason) as caught:
        read_trace(str(path))
    assert len(str(caught.value)) < 300


def test_a_session_of_any_text_can_be_routed(tmp_path: Path) -> None:
    """Half a surrogate pair, which JSON can name and UTF-8 cannot write, becomes plain text."""
    path = tmp_path / "trace"
    path.write_text('{"hash_ids": [1], "session_id": "\\ud800"}')
    (request,) = read_trace(str(path))
    assert request.session.encode() == b"\\ud800"


def test_long_runs_take_no_memory_for_each_block(tmp_path: Path) -> None:
    """The ideal of requests of a million blocks each is computed in less memory than a list of them would take."""
    path = tmp_path / "trace"
    rows = [f'{{"timestamp": {i}, "hash_runs": [[{i << 19}, {1 << 20}]]}}' for i in range(20)]
    path.write_text("\n".join(rows))
    requests = read_trace(str(path))
    tracemalloc.start()
    try:
        assert ideal_hits(requests) == ([0] + [1 << 19] * 19, 21 << 19)
        assert tracemalloc.get_traced_memory()[1] < 16 * MIB
    finally:
        tracemalloc.stop()


def test_the_ideal_is_that_of_a_set(tmp_path: Path) -> None:
    """Runs that begin, end and meet anywhere count as their ids do one by one."""
    path = tmp_path / "trace"
    runs = [[(7 * i * i) % 5000, 1 + (311 * i) % 2100] for i in range(60)]
    path.write_text("\n".join(f'{{"hash_runs": [{runs[i]}, {runs[-1 - i]}]}}' for i in range(60)))
    requests = read_trace(str(path))
    seen = set[int]()
    hits: list[int] = []
    for request in requests:
        ids = [each for first, count in request.runs for each in range(first, first + count)]
        hits.append(next((at for at, each in enumerate(ids) if each not in seen), len(ids)))
        seen.update(ids)
    assert ideal_hits(requests) == (hits, len(seen))
