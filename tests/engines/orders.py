"""Scripts that run in engines' environments and do as they are told."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Process:
    """A script in an engine's environment; answers every order, both lines of JSON."""

    def __init__(self, python: str, script: str) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DISTPREFIX_")}
        self._process = subprocess.Popen(
            [python, "-W", "ignore", str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={
                **environment,
                "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]),
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
