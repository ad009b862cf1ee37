"""The command line as a user runs it."""

from __future__ import annotations

import os
import subprocess

import distprefix.cli.app  # noqa: F401  # pyright: ignore[reportUnusedImport] - `main` imports it: here once for all
from distprefix.cli import main
from tests.forks import run_function

__all__ = ["main", "run_cli"]


def run_cli(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run `distprefix` in a process of its own, not on a terminal, without `DISTPREFIX_*` in its environment."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("DISTPREFIX_")}
    return run_function("tests.commands:main", *arguments, stdin=stdin, env={**env, "COLUMNS": "160"})
