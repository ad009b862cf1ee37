"""Multi-turn coding-agent sessions made of text that is on every machine: the sources of Python's standard library.

A token is a byte. Sessions share a system prompt; those that work on the same package share its overview as well; every
turn repeats all before it and adds a piece of a file, a question and an answer.
"""

from __future__ import annotations

import sysconfig
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

__all__ = ["Turn", "coding_sessions"]

_PACKAGES = ("asyncio", "email", "json", "logging", "unittest", "xml")
_SYSTEM_BYTES, _PIECE_BYTES, _ANSWER_BYTES = 6_000, 2_500, 600


class Turn(NamedTuple):
    """One request of a session."""

    session: int
    number: int
    tokens: bytes
    """Little-endian uint32."""


def coding_sessions(sessions: int, turns: int) -> Iterator[Turn]:
    """The requests of all sessions in the order they arrive: turn by turn, sessions side by side."""
    library = Path(sysconfig.get_path("stdlib"))
    system = b"You are a coding agent. These are your tools:\n\n" + _read(library / "argparse.py")[:_SYSTEM_BYTES]
    prompts: list[bytes] = []
    pieces: list[bytes] = []
    for session in range(sessions):
        package = library / _PACKAGES[session % len(_PACKAGES)]
        files = sorted(package.rglob("*.py"))
        overview = "\n".join(f"{path.relative_to(library)}: {path.stat().st_size} bytes" for path in files)
        source = b"\n".join(_read(path) for path in files[: 40 + turns])
        offset = 7_919 * session % max(1, len(source) - turns * (_PIECE_BYTES + _ANSWER_BYTES))
        prompts.append(system + f"\n\nThe package {package.name}:\n{overview}\n".encode())
        pieces.append(source[offset:])
    for number in range(turns):
        for session in range(sessions):
            at = number * (_PIECE_BYTES + _ANSWER_BYTES)
            piece = pieces[session][at : at + _PIECE_BYTES]
            prompts[session] += b"\n\nuser: What does this do, and is it right?\n" + piece + b"\n\nassistant: "
            yield Turn(session, number, array("I", list(prompts[session])).tobytes())
            prompts[session] += pieces[session][at + _PIECE_BYTES : at + _PIECE_BYTES + _ANSWER_BYTES]


def _read(path: Path) -> bytes:
    return path.read_bytes()
