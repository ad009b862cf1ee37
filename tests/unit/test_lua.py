"""The scripts keep to their headers: flags, keys, arguments, errors, size."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from distprefix.redis.client import _CODES
from distprefix.redis.manifest import manifest
from distprefix.redis.scripts import SCRIPTS, load_script
from tests.servers import absent

LUA = Path(__file__).parents[2] / "lua"
FILES = sorted(path.stem for path in LUA.glob("*.lua"))
FIELD = re.compile(r"^-- (KEYS\[1\]|ARGV\[\d+(?:\.\.)?\]|returns|errors|flags|cost)\s+(\S.*)$")


def header(name: str) -> dict[str, str]:
    """The fields of a script's header."""
    fields: dict[str, str] = {}
    for line in (LUA / f"{name}.lua").read_text().splitlines():
        found = FIELD.match(line)
        if found:
            assert found[1] not in fields, f"{name} describes {found[1]} twice"
            fields[found[1]] = found[2]
    return fields


def code(text: str) -> str:
    """A script without its comments."""
    return re.sub(r"--[^\n]*", "", text)


def test_every_file_is_a_script() -> None:
    """The loader knows exactly the files that are there."""
    assert sorted(SCRIPTS) == FILES


@pytest.mark.parametrize("name", FILES)
def test_the_header_is_complete(name: str) -> None:
    """Line one holds the flags, line two the name and what it does; keys, reply, flags and cost are described."""
    first, second, *_ = (LUA / f"{name}.lua").read_text().splitlines()
    assert re.fullmatch(r"#!lua( flags=(no-writes|allow-oom))?", first)
    assert re.match(rf"-- {name}: [a-z]", second)
    assert {"KEYS[1]", "returns", "flags", "cost"} <= set(header(name))


@pytest.mark.parametrize("name", FILES)
def test_the_flags_agree(name: str) -> None:
    """What the header says of the flags is what the first line sets, and no-writes scripts write nothing."""
    script = load_script(name)
    found = re.match(r"#!lua(?: flags=(\S+))?\n", script.body)
    assert found is not None
    assert header(name)["flags"].startswith(found[1] or "none")
    assert script.reads_only == (found[1] == "no-writes")
    if script.reads_only:
        own = code((LUA / f"{name}.lua").read_text() + (LUA / "shared" / "walk.lua").read_text())
        assert not re.search(r"call\('(H?SET|H?DEL|H?INCRBY|Z(ADD|REM)|XADD)'", own)


@pytest.mark.parametrize("name", FILES)
def test_arguments_are_those_documented(name: str) -> None:
    """The body uses one key and no argument that the header does not describe, and all that it describes."""
    body, fields = code(load_script(name).body), header(name)
    assert set(re.findall(r"KEYS\[(\w+)\]", body)) == {"1"}
    described = [field for field in fields if field.startswith("ARGV")]
    numbers = [int(re.findall(r"\d+", field)[0]) for field in described]
    assert numbers == list(range(1, len(numbers) + 1))
    used = {int(number) for number in re.findall(r"ARGV\[(\d+)\]", body)}
    if described[-1].endswith("..]"):
        assert all(number < numbers[-1] for number in used)
        assert re.search(r"#ARGV|unpack\(ARGV", body)
    else:
        assert used == set(numbers)
        assert "#ARGV" not in body


@pytest.mark.parametrize("name", FILES)
def test_errors_are_those_documented(name: str) -> None:
    """The codes that a script and its parts can raise are exactly those in its header, and each is an exception."""
    raised = set(re.findall(r"'(DP[A-Z]+)\b", code(load_script(name).body)))
    told = set(re.findall(r"DP[A-Z]+", header(name).get("errors", "")))
    assert raised == told
    assert told <= set(_CODES)


def test_every_exception_is_raised_somewhere() -> None:
    """No exception stands for a code that no script raises."""
    assert set(_CODES) == {found for name in FILES for found in re.findall(r"DP[A-Z]+", header(name).get("errors", ""))}


@pytest.mark.parametrize("path", sorted(LUA.rglob("*.lua")), ids=lambda path: path.name)
def test_files_are_short_and_harmless(path: Path) -> None:
    """Every file has under 80 lines of at most 120 characters, sets no global and never lists all keys."""
    text = path.read_text()
    assert text.count("\n") < 80
    assert max(map(len, text.splitlines())) <= 120
    assert "redis.call('KEYS'" not in text
    assert not re.search(r"^(?:\w+ = |function )", code(text), re.MULTILINE)


def test_the_manifest_is_current() -> None:
    """lua/MANIFEST names each script with the SHA-1 that a server gives it."""
    assert (LUA / "MANIFEST").read_text() == manifest(), "run: python -m distprefix.redis.manifest > lua/MANIFEST"


def test_parts_are_put_in_once() -> None:
    """A composed script holds all of its parts, and none twice."""
    for name in FILES:
        body = load_script(name).body
        functions = re.findall(r"^local function (\w+)", body, re.MULTILINE)
        assert len(functions) == len(set(functions))
        assert "@include" not in body
        assert load_script(name, with_flags=False).body == body.partition("\n")[2]


def test_luacheck_finds_nothing(tmp_path: Path) -> None:
    """Luacheck has nothing to say of the composed scripts."""
    luacheck = shutil.which("luacheck")
    if luacheck is None:
        absent("luacheck is not on PATH")
    for name in FILES:
        (tmp_path / f"{name}.lua").write_text(load_script(name, with_flags=False).body)
    files = [str(tmp_path / f"{name}.lua") for name in FILES]
    options = ["--no-color", "--config", str(LUA.parent / ".luacheckrc"), "--"]
    done = subprocess.run([luacheck, *options, *files], check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
