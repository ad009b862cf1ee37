"""Ask the vulnerability service about every locked release. Exit code 1 where one has a known vulnerability.

Where no service is reachable it says so, and the gate goes on: a machine without a network cannot know.
"""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

_OFFLINE = (
    "ConnectionError",
    "Connection",
    "timed out",
    "Timeout",
    "Max retries",
    "resolve",
    "HTTPError",
    "ServiceError",
)
_TIMEOUT_S = 120


def judge(output: str, errors: str) -> tuple[int, str]:
    """The exit code and what to say, from what pip-audit printed."""
    try:
        dependencies: list[dict[str, Any]] = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        if any(word in errors for word in _OFFLINE):
            return 0, "Skipped: no vulnerability service reachable."
        return 1, f"pip-audit failed:\n{errors}"
    unknown = [each["name"] for each in dependencies if "skip_reason" in each]
    if len(unknown) == len(dependencies):
        return 0, "Skipped: no vulnerability service reachable that knows any of the releases."
    found = [_flaw(each, flaw) for each in dependencies for flaw in each.get("vulns", ())]
    said = f"{len(dependencies) - len(unknown)} releases asked about, {len(found)} known vulnerabilities"
    said += f"; not known to the service: {', '.join(unknown)}" if unknown else ""
    return (1 if found else 0), "\n".join([said, *found])


def _flaw(dependency: dict[str, Any], flaw: dict[str, Any]) -> str:
    fixed = ", ".join(flaw["fix_versions"]) or "no release yet"
    return f"{dependency['name']} {dependency['version']}: {flaw['id']}, fixed in {fixed}"


def main(files: list[str]) -> int:
    """Audit requirements files."""
    named = [part for file in files for part in ("-r", file)]
    options = ["--require-hashes", "--disable-pip", "--progress-spinner", "off", "--format", "json", "--timeout", "5"]
    try:
        run = subprocess.run(
            [sys.executable, "-m", "pip_audit", *options, *named],
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        code, said = judge("", "Timeout")
    else:
        code, said = judge(run.stdout, run.stderr)
    print(said)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
