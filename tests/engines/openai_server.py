"""A real vLLM as ``vllm serve`` runs it, on a port of its own: completions, and the metrics that it exports."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.engines.process import PYTHON, clean_environment
from tests.servers import free_port

__all__ = ["Completion", "OpenAIServer"]

_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
_START_S = 300.0
_END_S = 20.0


class Completion(NamedTuple):
    """An answer, and what the server says of it."""

    text: str
    prompt_tokens: int
    cached_tokens: int
    """From the server's own cache and from Redis."""


class OpenAIServer:
    """The module that ``vllm serve`` runs; the command itself fails with the wheel for CPUs, which has another name."""

    def __init__(self, model: Path, log: Path, *options: str) -> None:
        self.log = log
        self.port = free_port()
        self._command = [
            *(PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--served-model-name", "tiny"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--dtype", "float32", "--enforce-eager"),
            *("--enable-prompt-tokens-details", *options),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start it."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.log.parent,
                env=clean_environment() | _SETTINGS,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Wait until it answers."""
        assert self._process is not None
        deadline = time.monotonic() + _START_S
        while True:
            assert self._process.poll() is None, f"the server ended: {self.log.read_text()[-3000:]}"
            assert time.monotonic() < deadline, f"the server did not start: {self.log.read_text()[-3000:]}"
            with contextlib.suppress(OSError, urllib.error.URLError):
                self._get("/health")
                return
            time.sleep(0.1)

    def complete(self, prompt: Sequence[int], max_tokens: int = 4) -> Completion:
        """Complete a prompt."""
        wanted = {"model": "tiny", "prompt": list(prompt), "max_tokens": max_tokens, "temperature": 0.0}
        answer = json.loads(self._get("/v1/completions", {**wanted, "ignore_eos": True}))
        usage = answer["usage"]
        details: dict[str, Any] = usage.get("prompt_tokens_details") or {}
        return Completion(answer["choices"][0]["text"], usage["prompt_tokens"], details.get("cached_tokens") or 0)

    def counted(self, name: str) -> int:
        """A counter of vLLM's, all its labels together."""
        page = self._get("/metrics").decode()
        return sum(int(float(value)) for value in re.findall(rf"^vllm:{name}_total{{.*}} (\S+)$", page, re.MULTILINE))

    def end(self) -> None:
        """Have it quit, and all that it started."""
        if self._process is None:
            return
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_END_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._process = None

    def _get(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}",
            None if body is None else json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()
