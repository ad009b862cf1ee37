"""The scripts by SHA-1, as ``lua/MANIFEST`` lists them, so that no change slips through a review.

``python -m distprefix.redis.manifest`` prints it; with ``--write FOLDER`` it writes the scripts there as they are
loaded into a server, for linters and debuggers.
"""

from __future__ import annotations

import sys
from pathlib import Path

from distprefix.redis.scripts import SCRIPTS, load_script

__all__ = ["manifest"]


def manifest() -> str:
    """Name and SHA-1 of every script, a line each."""
    return "".join(f"{name} {load_script(name).sha}\n" for name in SCRIPTS)


def _main(arguments: list[str]) -> None:
    if arguments[:1] == ["--write"] and len(arguments) == 2:
        for name in SCRIPTS:
            (Path(arguments[1]) / f"{name}.lua").write_text(load_script(name).body, encoding="utf-8")
    else:
        sys.stdout.write(manifest())


if __name__ == "__main__":
    _main(sys.argv[1:])
