"""What the README shows works: its commands, its program, its example. The gate runs the two commands at its top."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.commands import run_cli
from tests.servers import Backend

_ROOT = Path(__file__).parents[2]
_README = (_ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", _README, re.DOTALL)


def test_commands_run(real_server: Backend, tmp_path: Path) -> None:
    """Every distprefix command below the first two runs as written, but for the url, the namespace and the trace."""
    real_server.open("w1").cache_prefix(list(range(64)))
    trace = tmp_path / "TRACE.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 1024, "hash_ids": [0, 1]}')
    commands = [line for block in _blocks("sh")[2:] for line in block.splitlines() if line]
    assert len(commands) == 8
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "distprefix"
        swapped = {
            "redis://localhost:6379": real_server.url or "",
            "llama-3-8b": real_server.namespace,
            "TRACE.jsonl.gz": str(trace),
        }
        result = run_cli(*(swapped.get(word, word) for word in words[1:]))
        assert result.returncode == 0, (command, result.stderr)


def test_program_runs(real_server: Backend) -> None:
    """The program in the README runs as written, but for the url."""
    (program,) = _blocks("python")
    program = program.replace("redis://localhost:6379", real_server.url or "").replace(
        "llama-3-8b", real_server.namespace
    )

    class Engine:
        computed: Any = None

        def prefill(self, tokens: Any) -> None:
            self.computed = tokens

    engine = Engine()
    exec(program, {"token_ids": list(range(40)), "block_ids": [5, 6], "freed_block_ids": [6], "engine": engine})
    assert engine.computed == list(range(40))


def test_two_commands_come_first() -> None:
    """The README begins with two commands, one that runs the main job and one that passes the tests."""
    first, second = _blocks("sh")[:2]
    assert "distprefix demo" in first
    assert "python -m pytest" in second
    assert first.count("\n") == second.count("\n") == 1


def test_links_lead_somewhere() -> None:
    """Every file that the README and the docs link to is there."""
    for page in (_ROOT / "README.md", *(_ROOT / "docs").rglob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_example_runs(real_server: Backend) -> None:
    """The example without an engine runs against a server that it is given; the one with vLLM is the engine tests'."""
    example = _ROOT / "examples" / "two_nodes.py"
    result = subprocess.run(
        [sys.executable, str(example), real_server.url or ""],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "512 of 592 tokens" in result.stdout


def test_mentioned_modules_exist() -> None:
    """The page on the design names modules that are there."""
    page = (_ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"`((?:redis|cli|replay)/\w+\.py|\w+\.py)`", page)):
        found = [*(_ROOT / "distprefix").rglob(Path(name).name)]
        assert found, f"docs/design.md names {name}"
    assert json.dumps(sorted({"walk", "insert"} - set(re.findall(r"`(\w+)`", page)))) == "[]"
