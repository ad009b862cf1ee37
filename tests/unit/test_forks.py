"""The helper that forks processes: what a test sees of them is what it would see of a new interpreter."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.forks import run_function


def report() -> None:
    """Print what the process was given, and exit with 7."""
    given = {"arguments": sys.argv[1:], "stdin": sys.stdin.read(), "env": dict(os.environ), "id": os.getpid()}
    print(json.dumps(given))  # noqa: T201 - the parent reads it
    print("problem", file=sys.stderr)  # noqa: T201 - the parent reads it
    sys.exit(7)


def fail() -> None:
    """Raise."""
    raise LookupError("no such thing")


def end_by_signal() -> None:
    """Kill this process."""
    os.kill(os.getpid(), signal.SIGKILL)


def wait() -> None:
    """Take longer than anyone waits."""
    time.sleep(600)


def test_a_process_has_what_it_was_given() -> None:
    """Arguments, standard input and environment arrive; both outputs and the exit code come back."""
    done = run_function(f"{__name__}:report", "a", "b c", stdin="text\n", env={"ONLY": "this"})
    given = json.loads(done.stdout)
    assert (given["arguments"], given["stdin"], given["env"]["ONLY"]) == (["a", "b c"], "text\n", "this")
    assert "PATH" not in given["env"]
    assert (done.returncode, done.stderr) == (7, "problem\n")


def test_an_exception_is_exit_code_1() -> None:
    """An exception that is not caught ends the process with its traceback and exit code 1."""
    done = run_function(f"{__name__}:fail")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith("LookupError: no such thing\n")


def test_a_signal_is_a_negative_exit_code() -> None:
    """A process that is killed shows by which signal."""
    assert run_function(f"{__name__}:end_by_signal").returncode == -signal.SIGKILL


def test_a_process_ends_at_its_timeout() -> None:
    """What takes longer than its timeout is killed and raises TimeoutExpired; others run on."""
    with pytest.raises(subprocess.TimeoutExpired):
        run_function(f"{__name__}:wait", timeout_s=0.2)
    assert run_function(f"{__name__}:report").returncode == 7


def test_processes_run_side_by_side() -> None:
    """Threads may ask for processes at the same time: each gets the output of its own."""

    def run(number: int) -> int:
        given = json.loads(run_function(f"{__name__}:report", str(number)).stdout)
        assert given["arguments"] == [str(number)]
        return given["id"]

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(run, range(8)))) == 8
