"""Scripts that run in engines' environments and do as they are told."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.engines.process import FOLDER, clean_environment

__all__ = ["Process", "opened", "tidied"]


class Process:
    """A script in an engine's environment; answers every order, both lines of JSON."""

    def __init__(self, python: str, script: str) -> None:
        self._process = subprocess.Popen(
            [python, "-W", "ignore", str(FOLDER / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={
                **clean_environment(),
                "PYTHONPATH": os.pathsep.join([str(FOLDER.parents[1]), os.environ.get("PYTHONPATH", "")]),
            },
        )
        self._answer()

    def tell(self, do: str, **order: Any) -> dict[str, Any]:
        """Give an order; raises what its side raised."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, **order}) + "\n")
        self._process.stdin.flush()
        answer = self._answer()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, f"it ended with {self._process.wait()}"
        return json.loads(line)


def opened(variable: str, script: str, maker: str) -> Iterator[Process]:
    """A process for all tests of a module: importing an engine takes seconds. Skips where there is no environment."""
    python = os.environ.get(variable, "")
    if not python:
        pytest.skip(f"{variable} names no Python with the engine ({maker} makes one)")
    process = Process(python, script)
    yield process
    process.close()


def tidied(process: Process) -> Iterator[Process]:
    """The process, with nothing open under the two names before and after."""
    process.tell("said")
    yield process
    for name in ("a", "b"):
        with contextlib.suppress(RuntimeError):
            process.tell("close", name=name)
