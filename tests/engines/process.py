"""A real vLLM in a process of its own, that tests give orders."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

__all__ = ["FOLDER", "PYTHON", "SKIP", "EngineProcess", "clean_environment", "make_model"]

PYTHON = os.environ.get("DISTPREFIX_VLLM_PYTHON", "")
SKIP = "DISTPREFIX_VLLM_PYTHON is not set: see tests/engines/install_vllm.sh"
FOLDER = Path(__file__).parent


def make_model(folder: Path, seed: int = 0) -> Path:
    """A tiny model with random weights; other ones with another seed."""
    subprocess.run([PYTHON, str(FOLDER / "make_model.py"), str(folder), str(seed)], check=True, capture_output=True)
    return folder


def clean_environment() -> dict[str, str]:
    """This process's environment without settings of ours."""
    return {name: value for name, value in os.environ.items() if not name.startswith("DISTPREFIX_")}


class EngineProcess:
    """vllm_engine.py, or another script, with options; `start` may be called again after `kill`."""

    def __init__(
        self, model: Path, log: Path, *options: str, script: str = "vllm_engine.py", **environment: str
    ) -> None:
        self.log = log
        self._command = [PYTHON, str(FOLDER / script), str(model), *options]
        self._environment = clean_environment() | environment
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Self:
        """Start it, and wait until it takes orders."""
        self.begin()
        return self.wait()

    def begin(self) -> None:
        """Start it."""
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                bufsize=1,
                env=self._environment,
                start_new_session=True,
            )

    def wait(self) -> Self:
        """Wait until it takes orders."""
        assert "ready" in self._answer()
        return self

    def order(self, do: str, **what: Any) -> dict[str, Any]:
        """Have something done; the answer."""
        self.send(do, **what)
        return self.answer()

    def send(self, do: str, **what: Any) -> None:
        """Have something done, whose answer is read later."""
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": do, **what}) + "\n")

    def answer(self) -> dict[str, Any]:
        """The next answer."""
        answer = self._answer()
        assert "error" not in answer, answer
        return answer

    def generate(self, prompt: Sequence[int], **what: Any) -> tuple[int, list[int]]:
        """Answer a prompt: tokens reused, and the tokens that came."""
        answer = self.order("generate", prompts=[list(prompt)], **what)
        return answer["cached"][0], answer["outputs"][0]

    def end(self) -> None:
        """Have it quit: one that offloads leaves its memory in /dev/shm otherwise."""
        if self.process is not None and self.process.poll() is None:
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                self.send("quit")
                self.process.wait(20)
        self.kill()

    def kill(self) -> None:
        """End it without warning."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, f"the engine is gone: {self.log.read_text()[-3000:]}"
        return json.loads(line)
