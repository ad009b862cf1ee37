"""`distprefix workers` and `distprefix ingest` as a user runs them."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from distprefix.cli.following import engines_of
from distprefix.errors import ConfigError
from tests.commands import run_cli
from tests.contract.test_find import prompt
from tests.fake_engine import FakeEngine
from tests.followers import holders
from tests.servers import Backend


def where(backend: Backend) -> tuple[str, ...]:
    """Options that name a backend's namespace."""
    return ("--url", backend.url or "", "--namespace", backend.namespace)


def run_json(*arguments: str, stdin: str = "") -> Any:
    """What a command prints as JSON."""
    result = run_cli(*arguments, "--json", stdin=stdin)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


# distprefix workers


@pytest.fixture
def fleet(real_server: Backend) -> Backend:
    """Two ranks of w1, one with a lease, and w2 without one; w3 opened and published nothing."""
    leased = real_server.open("w1")
    leased.register_worker(address="10.0.0.7:8000", model="tiny", load={"running": 2}, lease_s=600.0)
    leased.cache_prefix(prompt(8))
    real_server.open("w1", rank=1, medium="cpu").cache_prefix(prompt(5))
    real_server.open("w2").cache_prefix(prompt(9))
    real_server.open("w3")
    return real_server


def test_workers_are_listed(fleet: Backend) -> None:
    """Who holds a lease or anything in the tree: lease, epoch, chunks by medium, and what they say of themselves."""
    one, two, three = run_json("workers", *where(fleet))
    assert (one["worker"], one["rank"], one["live"]) == ("w1", 0, True)
    assert 500 < one["lease_left_s"] <= 600
    assert (one["address"], one["model"], one["load"]) == ("10.0.0.7:8000", "tiny", {"running": 2.0})
    assert (one["chunks"], one["media"], one["events"]) == ({"gpu": 8}, ["gpu"], None)
    assert (two["worker"], two["rank"], two["lease_left_s"], two["chunks"]) == ("w1", 1, None, {"cpu": 5})
    assert (three["worker"], three["live"], three["chunks"]) == ("w2", True, {"gpu": 9})
    text = run_cli("workers", *where(fleet)).stdout
    assert f"workers of {fleet.namespace}" in text
    assert all(word in text for word in ("w1", "w2", "8 gpu", "5 cpu", "tiny 10.0.0.7:8000", "none"))
    assert "w3" not in text
    assert "\x1b" not in text


def test_ended_leases_show(fleet: Backend) -> None:
    """A worker that was not heard of is listed as one that no longer counts."""
    fleet.admin.zadd(fleet.keys.workers, {"w1/0": 1000})
    one, *_ = run_json("workers", *where(fleet))
    assert one["live"] is False
    assert one["lease_left_s"] < -1000
    assert re.search(r"ended \d+ s ago", run_cli("workers", *where(fleet)).stdout)


def test_a_worker_is_dropped(fleet: Backend) -> None:
    """With all its ranks, at once and for everybody; a name that nobody has is told with exit code 1."""
    reader = fleet.open("r")
    assert holders(reader, prompt(9)) == {"w2/0@gpu": 9, "w1/0@gpu": 8, "w1/1@cpu": 5}
    assert run_json("workers", *where(fleet), "--drop", "w1") == {"dropped": "w1", "ranks": 2}
    assert holders(reader, prompt(9)) == {"w2/0@gpu": 9}
    assert [each["worker"] for each in run_json("workers", *where(fleet))] == ["w2"]
    assert "dropped w2: 1 ranks" in run_cli("workers", *where(fleet), "--drop", "w2").stdout
    result = run_cli("workers", *where(fleet), "--drop", "w")
    assert (result.returncode, result.stdout) == (1, "")
    assert "there is no worker 'w'" in result.stderr


def test_workers_of_no_namespace(fleet: Backend) -> None:
    """Exit code 1, and which there are."""
    result = run_cli("workers", "--url", fleet.url or "", "--namespace", "absent")
    assert result.returncode == 1
    assert "there are: " in result.stderr


# distprefix ingest --file


def payload(engine: FakeEngine, *events: Any) -> str:
    """A message as an engine sends it, in hex."""
    return (msgpack.packb([1.0, [engine._as_sent(event) for event in events], 0]) or b"").hex()


@pytest.fixture
def lines() -> list[str]:
    """A recording: six blocks stored, of which the last two are removed again."""
    with FakeEngine() as engine:
        stored = engine.stored(prompt(6))
        messages = [payload(engine, stored), payload(engine, engine.removed(stored["block_hashes"][4:]))]
    return [json.dumps({"seq": seq, "payload_hex": each}) for seq, each in enumerate(messages)]


@pytest.mark.parametrize("form", ["plain", "gzip", "standard input"])
def test_a_file_is_followed(real_server: Backend, tmp_path: Path, lines: list[str], form: str) -> None:
    """Its messages go into the namespace under the worker's name, without a lease; empty lines are passed over."""
    text, path = "\n".join([lines[0], "", *lines[1:], ""]), tmp_path / "messages"
    path.write_bytes(gzip.compress(text.encode()) if form == "gzip" else text.encode())
    name, stdin = ("-", text) if form == "standard input" else (str(path), "")
    arguments = ("ingest", "--file", name, "--worker", "e1", "--chunk-size", "4", *where(real_server))
    found = run_json(*arguments, stdin=stdin)
    assert (found["worker"], found["state"], found["sequence"], found["chunks"]) == ("e1", "done", 1, {"gpu": 4})
    reader = real_server.open("r")
    assert holders(reader, prompt(6)) == {"e1/0@gpu": 4}
    (listed,) = run_json("workers", *where(real_server))
    assert (listed["worker"], listed["lease_left_s"], listed["chunks"]) == ("e1", None, {"gpu": 4})
    assert (listed["events"]["sequence"], listed["events"]["followed"]) == (1, False)
    assert "not followed" in run_cli("workers", *where(real_server)).stdout
    again = run_cli(*arguments, stdin=stdin)
    assert again.returncode == 0, again.stderr
    assert "4 gpu" in again.stdout
    assert holders(reader, prompt(6)) == {"e1/0@gpu": 4}
    assert reader.check_integrity().problems == []


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 3: .*Expecting"),
        ("7", "line 3: "),
        ('{"payload_hex": "00"}', "line 3: .*seq"),
        ('{"seq": "x", "payload_hex": "00"}', "line 3: .*'x'"),
        ('{"seq": 2, "payload_hex": "0g"}', "line 3: .*hex"),
    ],
)
def test_wrong_lines_are_named(real_server: Backend, tmp_path: Path, lines: list[str], line: str, reason: str) -> None:
    """File, line and reason, with exit code 2 and no traceback."""
    path = tmp_path / "messages"
    path.write_text("\n".join([*lines, line]))
    result = run_cli("ingest", "--file", str(path), *where(real_server))
    assert result.returncode == 2
    assert re.search(f"{re.escape(str(path))}, {reason}", result.stderr), result.stderr
    assert "Traceback" not in result.stderr


def test_wrong_files_are_named(real_server: Backend, tmp_path: Path) -> None:
    """One that is not there, a folder, one that is no text, a gzip file that ends too soon."""
    binary, cut = tmp_path / "binary", tmp_path / "cut"
    binary.write_bytes(b"\xff\xfe\x00")
    cut.write_bytes(gzip.compress(b"{}\n" * 1000)[:-12])
    for i, path in enumerate((tmp_path / "absent", tmp_path, binary, cut)):
        result = run_cli("ingest", "--file", str(path), "--worker", f"e{i}", *where(real_server))
        assert (result.returncode, f"{path}" in result.stderr) == (2, True), result.stderr
        assert "Traceback" not in result.stderr


@pytest.mark.parametrize("content", [None, "", "{"])
def test_nothing_is_written_for_a_wrong_file(real_server: Backend, tmp_path: Path, content: str | None) -> None:
    """A file that is not there, or has a line that makes no sense, leaves neither a namespace nor a worker."""
    path = tmp_path / "messages"
    if content is not None:
        path.write_text(f"{content}\n7\n")
    result = run_cli("ingest", "--file", str(path), *where(real_server))
    assert result.returncode == 2
    assert str(path) in result.stderr
    written: Any = real_server.admin.scan_iter(match=f"dp:*{real_server.namespace}*")
    assert list(written) == []


@pytest.mark.parametrize(
    ("reason", "engines", "replays", "workers", "addresses"),
    [
        ("nothing to follow", 0, 0, 0, 0),
        ("--worker is given 0 times for 1 engines", 1, 0, 0, 0),
        ("--worker is given 1 times for 2 engines", 2, 0, 1, 0),
        ("--replay is given 1 times for 2 engines", 2, 1, 2, 0),
        ("--address is given 2 times for 1 engines", 1, 1, 1, 2),
    ],
)
def test_lists_that_do_not_go_together(reason: str, engines: int, replays: int, workers: int, addresses: int) -> None:
    """One of each for every engine, or none where that is allowed; the option is named."""
    lists = [[f"tcp://127.0.0.1:{i + 1}" for i in range(count)] for count in (engines, replays, workers, addresses)]
    with pytest.raises(ConfigError, match=reason):
        engines_of(*lists, ranks=1, common={})


def test_ranks_count_ports_up() -> None:
    """Each data-parallel rank has the ports after those of the one before, and the worker's name and address."""
    found = engines_of(["tcp://a:5"], ["tcp://a:9"], ["w"], ["x"], ranks=2, common={"kind": "vllm", "model": "m"})
    assert [(each.member, each.endpoint, each.replay, each.address) for each in found] == [
        ("w/0", "tcp://a:5", "tcp://a:9", "x"),
        ("w/1", "tcp://a:6", "tcp://a:10", "x"),
    ]


def test_a_pod_may_serve_one_rank_of_many() -> None:
    """With `--rank` each endpoint is of the rank that its batches name, and no port is counted up."""
    found = engines_of(["tcp://a:8", "tcp://b:9"], [], ["w", "w"], [], ranks=1, own_ranks=[3, 4], common={})
    assert [(each.member, each.endpoint) for each in found] == [("w/3", "tcp://a:8"), ("w/4", "tcp://b:9")]
    with pytest.raises(ConfigError, match="one of both"):
        engines_of(["tcp://a:8"], [], ["w"], [], ranks=2, own_ranks=[3], common={})
    with pytest.raises(ConfigError, match="--rank is given 1 times for 2 engines"):
        engines_of(["tcp://a:8", "tcp://b:9"], [], ["w", "v"], [], ranks=1, own_ranks=[3], common={})


def test_options_that_do_not_go_together(real_server: Backend) -> None:
    """Exit code 2 and which options they are."""
    engine = ("--engine", "tcp://127.0.0.1:1", "--worker", "a")
    for reason, options in (("nothing to follow", ()), ("a/0 is named twice", (*engine, *engine))):
        result = run_cli("ingest", *options, *where(real_server))
        assert (result.returncode, reason in result.stderr) == (2, True), result.stderr
        assert "Traceback" not in result.stderr


def test_another_chunk_size_is_refused(real_server: Backend, tmp_path: Path, lines: list[str]) -> None:
    """The namespace has one already; without the option that one is used."""
    path = tmp_path / "messages"
    path.write_text("\n".join(lines))
    reader = real_server.open("r")
    result = run_cli("ingest", "--file", str(path), "--chunk-size", "16", *where(real_server))
    assert result.returncode == 2
    assert re.search(r"chunk_size is 16: the namespace .* has 4", result.stderr)
    assert run_json("ingest", "--file", str(path), *where(real_server))["chunks"] == {"gpu": 4}
    assert holders(reader, prompt(6)) == {"engine/0@gpu": 4}


def test_pyzmq_is_asked_for() -> None:
    """Without it ingest says what to install, and the other commands work."""
    program = "import sys; sys.modules['zmq'] = None; from distprefix.cli import main; main()"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=60, check=False
        )

    result = run("ingest", "--engine", "tcp://127.0.0.1:1", "--worker", "a")
    assert (result.returncode, result.stdout) == (2, "")
    assert "pip install 'distprefix[events]'" in result.stderr
    assert "Traceback" not in result.stderr
    assert run("--version").returncode == 0


# distprefix ingest --engine


@contextlib.contextmanager
def ingesting(backend: Backend, *options: str, before: str = "") -> Generator[subprocess.Popen[str]]:
    """The command at work in a process of its own, with a JSON line now and then; `before` is run first."""
    program = f"{before}\nfrom distprefix.cli import main; main()"
    env = {name: value for name, value in os.environ.items() if not name.startswith("DISTPREFIX_")}
    command = [sys.executable, "-c", program, "ingest", *options, *where(backend), "--json", "--every", "0.2"]
    running = subprocess.Popen(
        [*command, "--chunk-size", "4"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    )
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_engine_is_followed_until_a_signal(real_server: Backend, number: signal.Signals) -> None:
    """Each line is JSON and tells how it goes; a signal ends it with exit code 0 and lets others go on at once."""
    with FakeEngine() as engine, real_server.open("r") as reader:
        options = ("--engine", engine.endpoint, "--replay", engine.replay_endpoint or "", "--worker", "e1")
        with ingesting(real_server, *options, "--model", "tiny", "--address", "10.0.0.7:8000") as running:
            engine.wait_for_subscriber()
            engine.prefill(prompt(6))
            assert running.stdout is not None
            told = (json.loads(line)[0] for line in running.stdout)
            status = next(each for each in told if each["chunks"] == {"gpu": 6})
            assert (status["worker"], status["rank"], status["state"]) == ("e1", 0, "following")
            assert (status["endpoint"], status["sequence"]) == (engine.endpoint, 0)
            assert holders(reader, prompt(6)) == {"e1/0@gpu": 6}
            (listed,) = [each for each in run_json("workers", *where(real_server)) if each["worker"] == "e1"]
            assert (listed["model"], listed["address"], listed["chunks"]) == ("tiny", "10.0.0.7:8000", {"gpu": 6})
            assert (listed["events"]["followed"], listed["events"]["source"]) == (True, engine.endpoint)
            running.send_signal(number)
            out, err = running.communicate(timeout=20)
            assert (running.returncode, err) == (0, "")
            assert all(json.loads(line)[0]["worker"] == "e1" for line in out.splitlines())
        (listed,) = [each for each in run_json("workers", *where(real_server)) if each["worker"] == "e1"]
        assert listed["events"]["followed"] is False
