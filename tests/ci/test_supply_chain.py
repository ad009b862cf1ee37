"""What the gate does about dependencies, secrets and builds: the locks, and the scripts in ci/."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements/ci.txt", "requirements/fuzz.txt")
_PIN = re.compile(r"^([a-z0-9-]+)==([^ ;]+)(?: ; (.+?))?((?: --hash=sha256:[0-9a-f]{64})+)$")


def _load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _pins(lock: str) -> list[tuple[str, str]]:
    """Names and versions of a lock. Every line is read."""
    text = (ROOT / lock).read_text(encoding="utf-8").replace("\\\n", "")
    lines = [re.sub(r"\s+", " ", line).strip() for line in text.splitlines() if not line.lstrip().startswith("#")]
    found: list[tuple[str, str]] = []
    for line in filter(None, lines):
        pin = _PIN.fullmatch(line)
        assert pin is not None, f"{lock}: {line[:80]}"
        found.append((pin[1], pin[2]))
    return found


@pytest.mark.parametrize("lock", LOCKS)
def test_locks_pin_by_hash_and_name_no_place(lock: str) -> None:
    """Each line is one release with the digests of its files; none says where to get them."""
    assert len(_pins(lock)) > 4
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert "://" not in text
    assert "index-url" not in text


def test_locks_have_every_dependency() -> None:
    """What pyproject.toml names, in every extra, and what the gate runs is locked."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]
    needed = [*project["dependencies"], *(each for extra in extras.values() for each in extra)]
    needed += [
        line for line in (ROOT / "requirements/ci.in").read_text(encoding="utf-8").splitlines() if line[0] != "#"
    ]
    names = {re.split(r"[\[<>=;\s]", each)[0].lower().replace("_", "-") for each in needed} - {"distprefix"}
    locked = {name for lock in LOCKS for name, _ in _pins(lock)}
    assert names <= locked


def _audited(*flawed: bool, skipped: int = 0) -> str:
    flaw = {"id": "CVE-1", "fix_versions": ["2"]}
    known = [{"name": f"p{i}", "version": "1", "vulns": [flaw] * one} for i, one in enumerate(flawed)]
    unknown = [{"name": f"u{i}", "skip_reason": "not found"} for i in range(skipped)]
    return json.dumps({"dependencies": [*known, *unknown]})


@pytest.mark.parametrize(
    ("output", "errors", "code", "said"),
    [
        (_audited(False, False), "", 0, "2 releases asked about, 0 known vulnerabilities"),
        (_audited(False, True, skipped=1), "", 1, "p1 1: CVE-1, fixed in 2"),
        (_audited(False, skipped=2), "", 0, "not known to the service: u0, u1"),
        (_audited(skipped=3), "", 0, "Skipped: no vulnerability service reachable"),
        ("", "requests.exceptions.ConnectionError: refused", 0, "Skipped: no vulnerability service reachable"),
        ("", "Timeout", 0, "Skipped: no vulnerability service reachable"),
        ("", "unknown option", 1, "pip-audit failed"),
    ],
)
def test_audit_tells_a_flaw_from_a_service_that_is_away(output: str, errors: str, code: int, said: str) -> None:
    """A vulnerability fails, a service that is not there is skipped, anything else that goes wrong fails."""
    found: tuple[int, str] = _load("audit").judge(output, errors)
    assert found[0] == code
    assert said in found[1]


def test_files_that_are_not_locked_are_told() -> None:
    """Of what pip installed, each file has to have a digest of the lock; the project's own folder has none."""
    strangers = _load("check_hashes").strangers

    def item(name: str, **source: Any) -> dict[str, Any]:
        return {"metadata": {"name": name, "version": "1"}, "download_info": source}

    good = "a" * 64
    report = {
        "install": [
            item("locked", archive_info={"hashes": {"sha256": good}}),
            item("other", archive_info={"hashes": {"sha256": "b" * 64}}),
            item("without", archive_info={}),
            item("distprefix", dir_info={"editable": True}),
        ]
    }
    assert strangers(report, f"locked==1 --hash=sha256:{good}") == ["other 1", "without 1"]


def _settings() -> dict[str, Any]:
    baseline = json.loads((ROOT / ".secrets.baseline").read_text(encoding="utf-8"))
    return {name: baseline[name] for name in ("plugins_used", "filters_used")}


def test_planted_secrets_are_found(tmp_path: Path) -> None:
    """A password in a URL, a private key and a token are found with the baseline's settings, on whichever line."""
    pytest.importorskip("detect_secrets")
    scan = _load("scan_secrets").scan
    secrets = {
        "url.py": "x = 'redis://user:" + "hunter2hunter2" + "@host'",
        "key.pem": "-----BEGIN RSA " + "PRIVATE KEY-----",
        "token.txt": "gh" + "p_" + "a1B2" * 9,
    }
    for name, text in secrets.items():
        (tmp_path / name).write_text(f"{text}\n")
    found: dict[tuple[str, str, str], int] = scan(tmp_path, sorted(secrets), _settings())
    assert {file for file, _, _ in found} == set(secrets)
    for name, text in secrets.items():
        (tmp_path / name).write_text(f"\n\n\n{text}\n")
    assert set(scan(tmp_path, sorted(secrets), _settings())) == set(found)


def test_builds_are_compared(tmp_path: Path) -> None:
    """Sources that build to other bytes each time fail; this project's do not."""
    pytest.importorskip("hatchling")
    pytest.importorskip("build")
    if shutil.which("sha256sum") is None:
        pytest.skip("the script compares with sha256sum")
    script = ROOT / "ci" / "reproducible.sh"
    out = tmp_path / "out"
    run = subprocess.run(["bash", str(script), sys.executable, str(out)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert sorted(path.suffix for path in out.iterdir()) == [".gz", ".whl"]
    wayward = tmp_path / "wayward"
    (wayward / "ci").mkdir(parents=True)
    shutil.copy(script, wayward / "ci")
    (wayward / "wayward").mkdir()
    (wayward / "wayward" / "__init__.py").write_text("")
    (wayward / "hatch_build.py").write_text(
        "import os\nfrom hatchling.builders.hooks.plugin.interface import BuildHookInterface\n"
        "class Hook(BuildHookInterface):\n"
        "    def initialize(self, version, build_data):\n"
        "        open('wayward/random.txt', 'w').write(os.urandom(8).hex())\n"
    )
    (wayward / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        '[project]\nname = "wayward"\nversion = "1"\n[tool.hatch.build.hooks.custom]\n'
    )
    script = wayward / "ci" / "reproducible.sh"
    run = subprocess.run(["bash", str(script), sys.executable, str(out)], capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "FAILED" in run.stdout + run.stderr
