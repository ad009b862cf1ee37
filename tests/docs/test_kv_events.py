"""Every command of docs/kv-events.md runs against engines that behave as vLLM does, and prints what the page says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.fake_engine import FakeEngine
from tests.servers import Server, find_server

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "kv-events.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```sh\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COUNTS = re.findall(r"^\| `([a-z_, ]+)` \| ", TEXT.partition("## Counts")[2].partition("\n## ")[0], re.MULTILINE)
STATES = re.findall(r"^\| `([a-z ]+)` \| ", TEXT.partition("## States")[2].partition("\n## ")[0], re.MULTILINE)
PROMPT = list(range(500, 590))
# What a block of the page prints, by a part of it that no other block has.
FOLLOWS = "--model llama-8b --address"
EXPECTED = {
    FOLLOWS: r"│ vllm-0/0 +│ following +│ 2 +│ 10 gpu +│ \d+\.\d s +│ .*events 3, messages 3, renewed, new 1",
    "distprefix workers\n": r"(?s)\Aworkers of llama-8b.*│ vllm-0 │ +0 │ \d{13} │ +\d+ s │ 10 gpu +│ to 2, "
    r"\d+\.\d s behind │ llama-8b http://127\.0\.0\.1:\d+ │",
    "/tokenize": r"\A\Z",
    "lookup prompt.json\n": r"(?s)│ matched │ 80 of 90 tokens \(5 chunks\) .*│ holder +│ vllm-0/0@gpu: first 80 t",
    "--lora-name": r"(?s)│ matched │ 48 of 90 tokens.*vllm-0/0@gpu: first 48 tokens",
    "--cache-salt": r"(?s)│ matched │ 32 of 90 tokens.*vllm-0/0@gpu: first 32 tokens",
    "--worker vllm-1": r"(?s)│ vllm-0/0 +│ following .*│ vllm-1/0 +│ following ",
    "--ranks": r"(?s)│ vllm-dp/0 +│ following +│ 0 +│ 1 gpu .*│ vllm-dp/1 +│ following +│ 0 +│ 2 gpu ",
    "--rank 3": r"│ vllm-pod/3 +│ following +│ 0 +│ 2 gpu ",
    "--drop": r"\Adropped vllm-0: 1 ranks\n\Z",
}
NOT_RUN = ("vllm serve", "python -m sglang.launch_server", "pip install")

pytestmark = pytest.mark.skipif(
    os.environ.get("CI") != "true" and not (shutil.which("curl") and shutil.which("bash")),
    reason="curl or bash is not on PATH",
)


class _Tokenizer(BaseHTTPRequestHandler):
    """What vLLM answers at /tokenize."""

    def do_POST(self) -> None:
        """Tokens for any text."""
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert self.path == "/tokenize"
        assert asked["prompt"]
        body = json.dumps({"count": len(PROMPT), "max_model_len": 8192, "tokens": PROMPT}).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - as it is called there
        """Say nothing."""


class Page:
    """The page's blocks, run one by one in a folder of their own."""

    def __init__(self, folder: Path, addresses: dict[str, str]) -> None:
        self._folder = folder
        self._addresses = addresses
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        clean = {name: value for name, value in os.environ.items() if not name.startswith("DISTPREFIX_")}
        self._environment = {**clean, "PATH": path, "COLUMNS": "160", "PYTHONUNBUFFERED": "1"}

    def text(self, part: str) -> str:
        """The block that has this part, as it is run: with our addresses, after the one that sets the environment."""
        (block,) = [block for block in BLOCKS if part in block]
        (export,) = [block for block in BLOCKS if block.startswith("export ")]
        text = export + block
        for name, address in self._addresses.items():
            text = text.replace(name, address)
        return text.replace("distprefix ingest", "exec distprefix ingest --every 0.2")

    def run(self, part: str) -> str:
        """What the block prints."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self.text(part)],
            cwd=self._folder,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), (done.stderr, done.stdout)
        return done.stdout

    @contextmanager
    def started(self, part: str, awaited: str) -> Generator[None]:
        """While a block runs that goes on until it is stopped; once it has printed what is awaited."""
        output = self._folder / f"{time.monotonic_ns()}.txt"
        with output.open("wb") as file:
            process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", self.text(part)],
                cwd=self._folder,
                env=self._environment,
                stdout=file,
                stderr=file,
            )
        try:
            deadline = time.monotonic() + 30
            while not re.search(awaited, output.read_text()):
                assert process.poll() is None, output.read_text()
                assert time.monotonic() < deadline, output.read_text()[-2000:]
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            assert process.wait(20) == 0, output.read_text()


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each block printed, by the part that names it; blocks that go on until stopped printed what was awaited."""
    with ExitStack() as stack:
        server = Server(find_server("valkey-9.1"), tcp=True).start()
        stack.callback(server.stop)
        web = ThreadingHTTPServer(("127.0.0.1", 0), _Tokenizer)
        stack.callback(web.server_close)
        stack.callback(web.shutdown)
        threading.Thread(target=web.serve_forever, daemon=True).start()
        first, second = (stack.enter_context(FakeEngine(block_size=16)) for _ in range(2))
        ranks = _ranks(stack)
        first.prefill([*PROMPT[:80], 1])
        first.prefill(PROMPT[:48], lora="billing")
        first.prefill(PROMPT[:32], salt="tenant-1")
        second.prefill(list(range(32)))
        ranks[0].prefill(list(range(16)))
        ranks[1].prefill(list(range(100, 132)))
        pod = stack.enter_context(FakeEngine(block_size=16, rank=3))
        pod.prefill(list(range(200, 232)))
        addresses = {"redis://localhost:6379": server.url, "http://vllm-0:8000": f"http://127.0.0.1:{web.server_port}"}
        for name, engine in (("vllm-0", first), ("vllm-1", second), ("vllm-dp", ranks[0])):
            addresses |= {f"tcp://{name}:5557": engine.endpoint, f"tcp://{name}:5657": engine.replay_endpoint or ""}
        addresses |= {"tcp://vllm-pod:5560": pod.endpoint, "tcp://vllm-pod:5660": pod.replay_endpoint or ""}
        page = Page(tmp_path_factory.mktemp("page"), addresses)
        return _run_all(page)


def _ranks(stack: ExitStack) -> list[FakeEngine]:
    """Two ranks, each endpoint of the second at the port after that of the first."""
    while True:
        first = FakeEngine(block_size=16)
        second = FakeEngine(block_size=16, rank=1)
        second.kill()
        second.endpoint, second.replay_endpoint = _next(first.endpoint), _next(first.replay_endpoint or "")
        try:
            second.restart()
        except AssertionError:  # somebody else has one of the ports
            first.kill()
            continue
        return [stack.enter_context(first), stack.enter_context(second)]


def _next(endpoint: str) -> str:
    head, _, port = endpoint.rpartition(":")
    return f"{head}:{int(port) + 1}"


def _run_all(page: Page) -> dict[str, str]:
    """In the order of the page, the one that follows `vllm-0` all the time until the others need it to be free."""
    printed: dict[str, str] = {}
    with page.started(FOLLOWS, EXPECTED[FOLLOWS]):
        with page.started(FOLLOWS, r"│ vllm-0/0 +│ standby "):
            pass
        for part in ("distprefix workers\n", "/tokenize", "lookup prompt.json\n", "--lora-name", "--cache-salt"):
            printed[part] = page.run(part)
    for part in ("--worker vllm-1", "--ranks", "--rank 3"):
        with page.started(part, EXPECTED[part]):
            pass
    printed["--drop"] = page.run("--drop")
    return printed


@pytest.mark.parametrize("part", EXPECTED, ids=lambda part: part.strip())
def test_block_prints_what_the_page_says(printed: dict[str, str], part: str) -> None:
    """Each command ends well and prints what its sentence promises; ingesters were awaited when they ran."""
    if part in printed:
        assert re.search(EXPECTED[part], printed[part]), printed[part]


def test_every_block_is_run_or_known() -> None:
    """No block of the page is left out but those that start an engine or install something."""
    for block in BLOCKS:
        known = block.startswith((*NOT_RUN, "export "))
        assert sum(part in block for part in EXPECTED) == (0 if known else 1), block


@pytest.mark.parametrize("program", NOT_RUN[:2])
def test_flags_for_engines_are_what_the_rest_of_the_page_uses(program: str) -> None:
    """The JSON is JSON, both endpoints are bound, and their ports are those that are followed."""
    (block,) = [block for block in BLOCKS if block.startswith(program)]
    found = re.search(r"--kv-events-config '(.*?)'", block, re.DOTALL)
    assert found is not None
    events = json.loads(found[1])
    assert events["publisher"] == "zmq"
    assert events["endpoint"] == "tcp://*:5557"
    assert events["replay_endpoint"] == "tcp://*:5657"
    assert events.get("enable_kv_cache_events") is (True if program == "vllm serve" else None)
    assert events.get("format") == (None if program == "vllm serve" else "dynamo")


def _sources() -> str:
    files = [*(ROOT / "distprefix" / "events").glob("*.py"), ROOT / "distprefix" / "cli" / "following.py"]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def test_table_has_every_count_and_no_other() -> None:
    """Each count that `distprefix ingest` may print has one row."""
    source = _sources()
    counts = re.findall(r"counts\[\"(\w+)\"\]", source)
    counts += [f"dropped_{name}" for name in re.findall(r"dropped\[\"(\w+)\"\]", source)]
    for call in re.findall(r"_start_over\((.*?)\)\n", source):
        counts += [f"renewed, {reason}" for reason in re.findall(r"\"([a-z ]+)\"", call)]
    assert sorted(COUNTS) == sorted(set(counts))


def test_table_has_every_state() -> None:
    """Each state that a stream may be in has one row."""
    source = (ROOT / "distprefix" / "events" / "ingester.py").read_text(encoding="utf-8") + _sources()
    for state in STATES:
        assert f'"{state}"' in source
    lines = [line for line in source.splitlines() if "state = " in line or "state=" in line]
    assert set(re.findall(r"\"([a-z ]+)\"", "\n".join(lines))) <= set(STATES)
