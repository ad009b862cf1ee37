"""Coverage-guided fuzzing of decode(): ``python tests/fuzz/fuzz_decode.py -max_total_time=30``.

Needs ``distprefix[fuzz]``. The first byte of an input chooses the engine, the rest is the message. The corpus begins
with the conformance cases and is kept in a temporary folder, unless a folder is named on the command line.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

atheris: Any = importlib.import_module("atheris")  # has no types, and is not for every Python

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

with atheris.instrument_imports(include=["distprefix.events", "distprefix.chunking"]):
    from distprefix.errors import EventFormatError
    from distprefix.events.decode import decode
    from distprefix.events.frames import Removed, Stored

_ENGINES = ("auto", "vllm", "sglang")
_MEDIUM = re.compile(r"[a-z0-9._-]{1,64}")
_SECONDS = 2


def check(data: bytes) -> None:
    """Whatever comes, there is a batch that makes sense, or EventFormatError, and soon."""
    started = time.process_time()
    try:
        batch = decode(data[1:], engine=_ENGINES[data[0] % 3] if data else "auto")
    except EventFormatError:
        return
    finally:
        assert time.process_time() - started < _SECONDS
    assert batch.at - batch.at == 0
    assert batch.rank is None or batch.rank >= 0
    for event in batch.events:
        if isinstance(event, Stored | Removed):
            assert all(0 <= key < 1 << 64 for key in event.keys)
            assert _MEDIUM.fullmatch(event.medium)
            assert event.group >= 0
        if isinstance(event, Stored):
            assert len(event.extras) in (0, len(event.keys))
            assert len(event.names) in (0, len(event.keys))
            assert bool(event.tokens) == bool(event.block_size)
            assert len(event.tokens) % 4 == 0


def write_seeds(folder: Path) -> None:
    """One file for each message of the conformance cases."""
    for path in (ROOT / "tests" / "conformance").glob("*.json"):
        for i, frame in enumerate(json.loads(path.read_text())["frames"]):
            (folder / f"{path.stem}-{i}").write_bytes(bytes([i % 3]) + bytes.fromhex(frame["payload_hex"]))


def main() -> None:
    """Run until told to stop, or until something breaks."""
    options = ["-max_len=4096", "-timeout=10", "-rss_limit_mb=1024"]
    with tempfile.TemporaryDirectory() as folder:
        write_seeds(Path(folder))
        atheris.Setup([sys.argv[0], *options, *sys.argv[1:], folder], check)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
