"""Compare what pip installed, as its report says, with a lock. Exit code 1 where a file is not one of the locked ones.

For installations that cannot run with --require-hashes, as one of this project. Usage: check_hashes.py REPORT LOCK
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any


def strangers(report: dict[str, Any], lock: str) -> list[str]:
    """Names of installed releases of which the lock does not have the file."""
    locked = set(re.findall(r"--hash=sha256:([0-9a-f]{64})", lock))
    found: list[str] = []
    for item in report["install"]:
        source = item["download_info"]
        digest = source.get("archive_info", {}).get("hashes", {}).get("sha256")
        if digest not in locked and "dir_info" not in source:  # a folder is this project
            found.append(f"{item['metadata']['name']} {item['metadata']['version']}")
    return found


def main(report: str, lock: str) -> int:
    """Check one report."""
    read: dict[str, Any] = json.loads(Path(report).read_text(encoding="utf-8"))
    found = strangers(read, Path(lock).read_text(encoding="utf-8"))
    print(f"{len(read['install'])} releases installed, not as locked: {', '.join(found) or 'none'}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
