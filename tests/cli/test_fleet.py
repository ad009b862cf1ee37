"""What the commands show of a fleet of engines is what the engines counted themselves."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Generator
from typing import Any

import pytest
from typer.testing import CliRunner

from distprefix.cli.app import app
from distprefix.cli.output import console
from distprefix.cli.stats import _fleet
from distprefix.redis.metrics import read_metrics
from tests.cli.test_workers import where
from tests.fake_engine import until
from tests.servers import Backend
from tests.simulated_engine import CHUNK_TOKENS, SimulatedEngine
from tests.uses import let_pass, server_ms

SETTINGS: dict[str, Any] = {"touch_interval_s": 0.05, "chunk_size": CHUNK_TOKENS, "strict": False}
COLUMNS = ("lookups", "hits", "tokens_hit", "loads", "tokens_loaded")
BYTES = ("payload_bytes_loaded", "payload_bytes_loaded_cold", "payload_bytes_stored")
FIGURES = (*COLUMNS, *BYTES)
IN_A_PROCESS = """
import json, sys
from tests.simulated_engine import SimulatedEngine
settings = json.loads(sys.stdin.readline())
with SimulatedEngine(settings) as engine:
    for name, number, chunks in iter(lambda: json.loads(sys.stdin.readline()), None):
        getattr(engine, name)(number, chunks)
        print(json.dumps([engine.counted, engine.used]), flush=True)
"""
"""Reads settings, then a step a line, until one is null; answers each with what it has counted."""


class Remote:
    """An engine's part in a process of its own."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.counted = Counter[str]()
        self.used = Counter[str]()
        self._process = subprocess.Popen(
            [sys.executable, "-c", IN_A_PROCESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._send(settings)

    def look_up(self, number: int, chunks: int) -> None:
        """As of SimulatedEngine."""
        self._step("look_up", number, chunks)

    def load(self, number: int, chunks: int) -> None:
        """As of SimulatedEngine."""
        self._step("load", number, chunks)

    def store(self, number: int, chunks: int) -> None:
        """As of SimulatedEngine."""
        self._step("store", number, chunks)

    def close(self) -> None:
        """End the process."""
        self._send(None)
        self._process.communicate(timeout=60)

    def _step(self, *step: Any) -> None:
        self._send(step)
        assert self._process.stdout is not None
        counted, used = json.loads(self._process.stdout.readline())
        self.counted = Counter[str](counted)
        self.used = Counter[str](used)

    def _send(self, what: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()


@contextlib.contextmanager
def fleet(backend: Backend, *, apart: bool) -> Generator[dict[str, list[Any]]]:
    """Two engines by worker id, of one process or of several; the first has a scheduler and a worker."""
    with contextlib.ExitStack() as stack:
        engines: dict[str, list[Any]] = {}
        for name in ("e1", "e1", "e2"):
            settings = {"url": backend.url, "namespace": backend.namespace, "worker_id": name, **SETTINGS}
            part = Remote(settings) if apart else SimulatedEngine(settings)
            stack.callback(part.close)
            engines.setdefault(name, []).append(part)
        yield engines


def shown_by(backend: Backend, command: str, *options: str) -> str:
    """What a command prints, of a program that has it imported: starting Python each time takes longer."""
    result = CliRunner().invoke(app, [command, *where(backend), *options])
    assert result.exit_code == 0, result.output
    return result.stdout


def counted(parts: list[Any]) -> dict[str, int]:
    """What an engine's parts counted together."""
    total = sum((part.counted for part in parts), Counter[str]())
    return {name: total[name] for name in FIGURES}


def serve(backend: Backend, engines: dict[str, list[Any]]) -> None:
    """Requests of which some hit, from either tier, and some do not; every part looks up, loads or stores."""
    (scheduler, worker), (both,) = engines["e1"], engines["e2"]
    for number, chunks in ((1, 4), (2, 6)):
        scheduler.look_up(number, chunks)
        worker.store(number, chunks)
    for number, chunks in ((1, 4), (2, 6), (3, 5)):
        both.look_up(number, chunks)
        both.load(number, chunks)
    both.store(3, 5)
    until(lambda: hits_of(backend, 1) == hits_of(backend, 2) == 1)
    let_pass(backend, 3600)
    with backend.open("operator", chunk_size=CHUNK_TOKENS) as operator:
        both.look_up(2, 6)
        both.look_up(3, 5)
        until(lambda: hits_of(backend, 2) == 2)
        until(lambda: hits_of(backend, 3) == 1)
        assert operator.demote(1800) == 4  # those of the first prompt
    scheduler.look_up(1, 4)
    worker.load(1, 4)
    for _ in range(3):
        scheduler.look_up(3, 5)
        worker.load(3, 5)


def head_of(backend: Backend, number: int) -> str:
    """A prompt's first node."""
    return SimulatedEngine.head_of(backend.hasher(chunk_size=CHUNK_TOKENS), number)


def hits_of(backend: Backend, number: int) -> int:
    """Of a prompt's first node."""
    found: Any = backend.admin.hget(backend.keys.node(head_of(backend, number)), "n")
    return int(found or 0)


@pytest.mark.parametrize("apart", [False, True], ids=["one process", "several"])
def test_figures_are_those_that_engines_counted(
    real_server: Backend, apart: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Look-ups, hit tokens, loads and bytes by tier, per worker, are the same in every command, and add up."""
    monkeypatch.setattr(console, "width", 240)
    with fleet(real_server, apart=apart) as engines:
        serve(real_server, engines)
        wanted = {name: counted(parts) for name, parts in engines.items()}
        assert wanted["e1"]["payload_bytes_loaded_cold"] == 4 * SimulatedEngine.PAYLOAD_BYTES
        assert all(wanted["e2"][name] for name in FIGURES if name != "payload_bytes_loaded_cold")

        def reported() -> dict[str, dict[str, int]]:
            found = read_metrics(real_server.admin, real_server.keys)
            return {holder.partition("/")[0]: {name: each[name] for name in FIGURES} for holder, each in found.items()}

        until(lambda: reported() == wanted)
        for command in ("stats", "top"):
            live = json.loads(shown_by(real_server, command, "--json"))["live"]
            assert {name: {figure: live[f"{name}/0@gpu"][figure] for figure in FIGURES} for name in wanted} == wanted
            assert all(each["misses"] == each["lookups"] - each["hits"] for each in live.values())
            assert all(each["hit_rate"] == each["hits"] / each["lookups"] for each in live.values())
        listed = {each["worker"]: each["figures"] for each in json.loads(shown_by(real_server, "workers", "--json"))}
        shown = [name for name in FIGURES if name != "hits"]
        assert listed == {name: {figure: wanted[name][figure] for figure in shown} for name in wanted}
        used = Counter[str]()
        for parts in engines.values():
            for part in parts:
                used.update(part.used)
        until(lambda: all(hits_of(real_server, number) == used[str(number)] for number in (1, 2, 3)))
        nodes = {
            child["head"]: child["hits"] for child in json.loads(shown_by(real_server, "tree", "--json"))["children"]
        }
        assert nodes == {head_of(real_server, number): used[str(number)] for number in (1, 2, 3)}
        text = shown_by(real_server, "stats")
        total = Counter(wanted["e1"]) + Counter(wanted["e2"])
        for name in FIGURES:
            assert f"{name.replace('_', ' ')} {total[name]:,}" in text
        for command in ("top", "workers"):
            text = shown_by(real_server, command)
            assert all(f"{wanted[name]['tokens_hit']:,}" in text for name in wanted)
    until(lambda: read_metrics(real_server.admin, real_server.keys) == {})


def test_one_part_of_a_worker_that_ends_leaves_the_others(real_server: Backend) -> None:
    """A worker whose scheduler has ended shows what its other parts counted, and ends with the last of them."""
    with fleet(real_server, apart=False) as engines:
        scheduler, worker = engines["e1"]
        scheduler.look_up(1, 4)
        worker.store(1, 4)
        worker.load(1, 4)

        def shown(name: str) -> int | None:
            return read_metrics(real_server.admin, real_server.keys).get("e1/0@gpu", {}).get(name)

        until(lambda: (shown("lookups"), shown("loads")) == (1, 1))
        scheduler.close()
        until(lambda: (shown("lookups"), shown("loads")) == (0, 1))
        worker.close()
        until(lambda: shown("loads") is None)


def test_a_report_of_another_version_is_no_error(real_server: Backend) -> None:
    """Reports without some of the figures, or that are none, are added up and shown as far as they go."""
    cache = real_server.open("e1", touch_interval_s=0.05)
    cache.find_stored(list(range(16)))
    until(lambda: read_metrics(real_server.admin, real_server.keys).get("e1/0@gpu", {}).get("lookups") == 1)
    stamp = b"%d:" % server_ms(real_server)
    real_server.admin.hset(real_server.keys.metrics, "e1/0@gpu old", stamp + b"\x81\xa7lookups\x02")
    real_server.admin.hset(real_server.keys.metrics, "e9/0@gpu none", stamp + b"\x01")
    real_server.admin.hset(real_server.keys.metrics, "e8/0@gpu", b"x")
    found = read_metrics(real_server.admin, real_server.keys)
    assert ({*found}, found["e1/0@gpu"]["lookups"], found["e1/0@gpu"]["misses"]) == ({"e1/0@gpu"}, 3, 1)
    assert "lookups 3" in _fleet([*found.values()])
