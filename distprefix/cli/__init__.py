"""The command line: `distprefix demo`, `replay`, `namespaces`, `stats`, `tree`, `node`, `lookup`."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line; exit codes are in `distprefix.cli.common`."""
    try:
        from distprefix.cli.app import app  # noqa: PLC0415 - optional dependencies
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        print(f"the command line needs {error.name}: pip install 'distprefix[cli]'", file=sys.stderr)  # noqa: T201
        sys.exit(2)
    app()
