"""Small files that would take much memory end a command with a line that says where, and no traceback."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from tests.commands import run_cli
from tests.servers import Backend

MIB = 1 << 20
FILES: dict[str, tuple[bytes, str]] = {
    "bomb": (gzip.compress(b" " * (32 * MIB)), "line 1: the file expands to more than 100 times its size"),
    "deep": (b"{}\n" + b"[" * 200_000 + b"]" * 200_000, "line [12]: "),
    "digits": (b'{"seq": 1' + b"0" * 5000 + b', "payload_hex": ""}', "line 1: "),
    "infinity": (b'{"seq": Infinity, "payload_hex": "", "timestamp": Infinity}', "line 1: .*Infinity is no JSON"),
    "binary": (b"\xff\xfe\x00", "line 1: no UTF-8"),
    "cut": (gzip.compress(bytes(1000))[:20], "cannot be read: "),
}


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("command", ["replay", "ingest"])
def test_files_that_are_refused(real_server: Backend, tmp_path: Path, command: str, name: str) -> None:
    """Both commands that read such files end with exit code 2, and name the file and the line."""
    data, reason = FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    arguments = [str(path)] if command == "replay" else ["--file", str(path), "--namespace", real_server.namespace]
    result = run_cli(command, *arguments, "--url", real_server.url or "")
    assert result.returncode == 2
    assert str(path) in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr) < 1000
    assert re.search(reason, result.stderr), result.stderr


@pytest.mark.parametrize("seq", [-1, 2**64 - 1, 10**40, 1.5, True, "7"])
def test_sequence_numbers_that_no_engine_sends(real_server: Backend, tmp_path: Path, seq: object) -> None:
    """They are refused by their line, before anything is written."""
    path = tmp_path / "events"
    path.write_text(json.dumps({"seq": seq, "payload_hex": "00"}))
    url = real_server.url or ""
    result = run_cli("ingest", "--file", str(path), "--namespace", real_server.namespace, "--url", url)
    assert result.returncode == 2
    assert "line 1: no message with seq and payload_hex" in result.stderr


def test_made_up_tokens_are_bounded(tmp_path: Path) -> None:
    """A prompt that would take more than 256 MiB as tokens is refused before any process starts."""
    path = tmp_path / "trace"
    path.write_text('{"hash_runs": [[0, 1048576]]}')
    result = run_cli("replay", str(path), "--as-tokens", "--block-size", "512")
    assert result.returncode == 2
    assert "a smaller --block-size" in result.stderr
