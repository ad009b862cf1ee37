"""Look for passwords, keys and tokens in the tracked files. Exit code 1 where one is not in .secrets.baseline.

A secret is known by its file, kind and digest, wherever in the file it stands. `--write` takes over what is found: look
at the difference before it is committed. `# pragma: allowlist secret` at the end of a line does the same for that line.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from detect_secrets.core.secrets_collection import SecretsCollection
from detect_secrets.settings import transient_settings

BASELINE = ".secrets.baseline"
_LOCKED = ("requirements/ci.txt", "requirements/fuzz.txt", BASELINE)
"""Digests, by the thousand."""


def scan(root: Path, files: list[str], settings: dict[str, Any]) -> dict[tuple[str, str, str], int]:
    """Secrets by file, kind and digest, with the line where each stands first."""
    found: dict[tuple[str, str, str], int] = {}
    with transient_settings(settings):
        secrets: Any = SecretsCollection(str(root))
        for file in files:
            secrets.scan_file(file)
        for file, secret in secrets:
            name = str(Path(file).relative_to(root)) if Path(file).is_absolute() else file
            place = (name, secret.type, secret.secret_hash)
            line = int(secret.line_number)
            found[place] = min(found.get(place, line), line)
    return found


def tracked(root: Path) -> list[str]:
    """The files that git knows, but for the locks."""
    names = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True).stdout
    return [name for name in names.split("\0") if name and name not in _LOCKED and (root / name).is_file()]


def main(arguments: list[str]) -> int:
    """Scan the repository in the working directory."""
    root = Path.cwd()
    baseline: dict[str, Any] = json.loads((root / BASELINE).read_text(encoding="utf-8"))
    settings = {name: baseline[name] for name in ("plugins_used", "filters_used")}
    files = tracked(root)
    found = scan(root, files, settings)
    if arguments == ["--write"]:
        baseline["known"] = [list(place) for place in sorted(found)]
        (root / BASELINE).write_text(json.dumps(baseline, indent=1) + "\n", encoding="utf-8")
        return 0
    known = {tuple(place) for place in baseline["known"]}
    strange = sorted((place, line) for place, line in found.items() if place not in known)
    for (file, kind, _), line in strange:
        print(f"{file}:{line}: {kind}: take it out, or see {Path(__file__).name}")
    print(f"{len(files)} files, {len(found)} secrets made up for tests and pages, {len(strange)} others")
    return 1 if strange else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
