"""The real vLLM, on the CPU: what is told from its KV events is what it really reuses, whoever of the two dies.

DISTPREFIX_VLLM_PYTHON is the Python of an environment that install_vllm.sh made. Without it there is nothing to run.
"""

from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Self

import msgpack
import pytest

from distprefix import Chain, PrefixCacheOptimizer
from distprefix.events.engine import EngineSocket
from tests.engines.process import FOLDER, PYTHON, SKIP, EngineProcess, make_model
from tests.fake_engine import until
from tests.followers import holders
from tests.servers import Backend, Server, find_server, free_port

BLOCK = 32
BLOCKS = 64
LEASE_S = 3.0
WORKER = "vllm-0"
HOLDER = f"{WORKER}/0@gpu"
CHUNK_SIZES = (16, 32)
# What an ingester must not have met in a stream that nothing is wrong with. Not `unknown_removals`: vLLM may have a
# block twice, after it computed the last block of a prompt anew, and then tells of two removals.
WRONG = {
    *("changes_refused", "conflicts", "dropped_frames", "dropped_sequence", "events_malformed", "events_unknown"),
    *("events_of_other_ranks", "gaps", "messages_lost", "messages_unreadable", "misfits", "other_groups"),
    *("parked_dropped", "troubles", "unknown_blocks"),
}

pytestmark = [
    pytest.mark.skipif(not PYTHON, reason=SKIP),
    pytest.mark.timeout(240),
]


class Vllm(EngineProcess):
    """An engine that publishes, at ports that stay the same when it is killed and started again."""

    def __init__(self, folder: Path, *options: str, **environment: str) -> None:
        self.endpoint, self.replay = (f"tcp://127.0.0.1:{port}" for port in (free_port(), free_port()))
        bound = self.endpoint.replace("127.0.0.1", "*")  # vLLM connects to an endpoint that names a host
        events = ("--blocks", str(BLOCKS + 1), "--endpoint", bound, "--replay", self.replay)
        super().__init__(folder / "model", folder / "engine.log", *events, *options, **environment)
        self._socket = EngineSocket(self.endpoint, self.replay)

    def messages(self) -> list[tuple[int, bytes]]:
        """All that it has sent so far."""
        return list(self._socket.replay(0, 10))

    def last_sequence(self) -> int | None:
        """Number of the last message that it has sent, None before the first."""
        sent = self.messages()
        return sent[-1][0] if sent else None

    def close(self) -> None:
        """End it for good."""
        self.kill()
        self._socket.close()


class Ingest:
    """`distprefix ingest` in a process of its own, and a reader of the namespace that it writes."""

    def __init__(self, server: Server, engine: Vllm, folder: Path, namespace: str, chunk_size: int, *more: str) -> None:
        self.chunk_size = chunk_size
        self.backend = Backend("valkey", server.client(), namespace, url=server.url)
        self._engine = engine
        self._output = folder / f"{namespace}.jsonl"
        self._command = [sys.executable, "-c", "from distprefix.cli import main; main()", "ingest", "--json"]
        self._command += ["--engine", engine.endpoint, "--replay", engine.replay, "--worker", WORKER]
        self._command += ["--url", server.url, "--namespace", namespace, "--chunk-size", str(chunk_size)]
        self._command += ["--lease", f"{LEASE_S:g}", "--every", "0.2", *more]
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: PrefixCacheOptimizer | None = None

    def start(self) -> Self:
        """Start it, and wait until it follows."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith("DISTPREFIX_")}
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL, stdout=output, env=environment)
        until(lambda: self.status().get("state") == "following", 30)
        return self

    def kill(self) -> None:
        """End it without warning."""
        self._end(signal.SIGKILL)

    def close(self) -> None:
        """End it as an operator does."""
        self._end(signal.SIGTERM)
        self.backend.close()
        self.backend.admin.close()

    def status(self) -> dict[str, Any]:
        """What it said last."""
        lines = self._output.read_text().rpartition("\n")[0].splitlines()
        return json.loads(lines[-1])[0] if lines else {}

    @property
    def position(self) -> int | None:
        """The message that is written, by Redis."""
        said: Any = self.backend.admin.hget(self.backend.keys.stream(f"{WORKER}/0"), "q")
        return None if said is None else int(said)

    @property
    def epoch(self) -> int:
        """The worker's, by Redis."""
        said: Any = self.backend.admin.hget(self.backend.keys.epochs, f"{WORKER}/0")
        return int(said)

    @property
    def reader(self) -> PrefixCacheOptimizer:
        """A worker that only looks up."""
        if self._reader is None:
            self._reader = self.backend.open("reader", chunk_size=self.chunk_size)
        return self._reader

    def told(self, prompt: Any, cache_salt: str | None = None) -> int:
        """How many tokens of the prompt the engine has, by the index."""
        found = holders(self.reader, prompt, cache_salt=cache_salt) if prompt else {}
        assert set(found) <= {HOLDER}
        return found.get(HOLDER, 0) * self.chunk_size

    def look_up(self, prompt: Sequence[int], *more: str) -> int:
        """The same, asked for on the command line."""
        command = [*self._command[:3], "lookup", "-", "--json", *more]
        command += ["--url", self.backend.url or "", "--namespace", self.backend.namespace]
        done = subprocess.run(command, input=json.dumps(list(prompt)), capture_output=True, text=True, check=False)
        matched = int(json.loads(done.stdout)["matched_tokens"])
        assert ("has nothing of this prompt" in done.stderr) == (not matched)
        assert matched == 0 or not done.stderr
        return matched

    def _end(self, how: int) -> None:
        if self._process is not None:
            self._process.send_signal(how)
            self._process.wait(20)
            self._process = None


class Setup:
    """One engine and who follows it."""

    def __init__(self, engine: Vllm, ingests: Sequence[Ingest]) -> None:
        self.engine, self.ingests = engine, ingests
        self.random = random.Random(7)

    def tokens(self, count: int) -> list[int]:
        """Tokens that no other prompt begins with."""
        return [self.random.randrange(3, 512) for _ in range(count)]

    def settle(self) -> None:
        """Wait until all that the engine has sent is written."""
        until(self._is_settled, 20)

    def _is_settled(self) -> bool:
        last = self.engine.last_sequence()
        if last is None or any(ingest.position != last for ingest in self.ingests):
            return False
        time.sleep(0.05)
        return self.engine.last_sequence() == last

    def ask(self, prompt: list[int], cache_salt: str | None = None, **what: Any) -> tuple[int, list[int]]:
        """Have a prompt answered: tokens reused, which must be what each index told, and the tokens that came."""
        told = [ingest.told(prompt, cache_salt) for ingest in self.ingests]
        cached, output = self.engine.generate(prompt, cache_salt=cache_salt, **what)
        assert [usable(held, len(prompt)) for held in told] == [cached] * len(told), (told, len(prompt))
        self.settle()
        return cached, output


def usable(held: int, length: int) -> int:
    """What vLLM reuses of a prompt that it holds so much of: whole blocks, and never the last token.

    Where a block is two chunks, two prompts may part in the middle of one: then a chunk more is held than can be used.
    """
    return min(held, length - 1) // BLOCK * BLOCK


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the model lies."""
    made = tmp_path_factory.mktemp("vllm")
    make_model(made / "model")
    return made


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server for this file."""
    made = Server(find_server("valkey-9.1"), tcp=True).start()
    yield made
    made.stop()


@pytest.fixture(scope="module")
def setup(folder: Path, server: Server) -> Iterator[Setup]:
    """An engine that two ingesters follow, into a namespace for each size of chunks."""
    with ExitStack() as stack:
        engine = stack.enter_context(closing(Vllm(folder))).start()
        ingests = [
            stack.enter_context(closing(Ingest(server, engine, folder, f"vllm-{size}", size))) for size in CHUNK_SIZES
        ]
        for ingest in ingests:
            ingest.start()
        yield Setup(engine, ingests)


@pytest.fixture(autouse=True)
def nothing_is_wrong(request: pytest.FixtureRequest) -> Iterator[None]:
    """No ingester met anything that it could not make sense of."""
    yield
    if "setup" in request.fixturenames:
        for ingest in request.getfixturevalue("setup").ingests:
            counts = ingest.status()["counts"]
            assert {name: n for name, n in counts.items() if n and name in WRONG} == {}
            assert counts["messages"] or counts.get("renewed, restarted")


def test_what_is_told_is_what_is_reused(setup: Setup) -> None:
    """Conversations over a shared beginning, turn by turn, asked for in any order."""
    system = setup.tokens(150)
    talks = [[*system, *setup.tokens(10 + 13 * i)] for i in range(3)]
    hits = 0
    for _ in range(3):
        for talk in talks:
            cached, output = setup.ask(talk, max_tokens=12)
            hits += cached > 0
            talk += [*output, *setup.tokens(29)]
    assert hits == 8  # all but the first
    for length in (31, 32, 33, 63, 64, 65, 128, 160):
        setup.ask(talks[1][:length])
    told = usable(setup.ingests[1].look_up(talks[0]), len(talks[0]))
    assert told == setup.engine.generate(talks[0])[0] > 150


def test_a_salt_keeps_apart(setup: Setup) -> None:
    """What was asked for with a salt is found with it, and with nothing else, on the command line as well."""
    prompt = setup.tokens(200)
    assert setup.ask(prompt, "tenant-1")[0] == 0
    for ingest in setup.ingests:
        assert [ingest.told(prompt, salt) for salt in (None, "tenant-1", "tenant-2")] == [0, 192, 0]
        assert [ingest.look_up(prompt), ingest.look_up(prompt, "--cache-salt", "tenant-1")] == [0, 192]
    assert [setup.ask(prompt, salt)[0] for salt in ("tenant-2", None, "tenant-1", None)] == [0, 0, 192, 192]


def test_eviction_is_followed(setup: Setup) -> None:
    """Prompts that need several times the room: each answer is right, and no more is told than there is room for."""
    beginnings = [setup.tokens(128) for _ in range(3)]
    prompts = [[*beginnings[i % 3], *setup.tokens(100 + 53 * i)] for i in range(12)]
    setup.random.shuffle(prompts)
    asked = [setup.random.choice(prompts) for _ in range(30)]
    reused = [setup.ask(prompt)[0] for prompt in [*prompts, *asked]]
    for ingest in setup.ingests:
        assert ingest.status()["blocks"] <= BLOCKS
        everything = sum(usable(ingest.told(prompt), len(prompt)) for prompt in prompts)
        assert 0 < everything <= BLOCKS * BLOCK + 9 * 128  # nine prompts have their beginning from another
    assert 0 < sum(cached > 128 for cached in reused) < len(reused)


def test_reset_prefix_cache(setup: Setup) -> None:
    """The engine forgets all. It tells of it with its next prompt."""
    prompt = setup.tokens(320)
    setup.ask(prompt)
    assert setup.engine.order("reset") == {"reset": True}
    setup.engine.generate(setup.tokens(40))
    setup.settle()
    assert [ingest.told(prompt) for ingest in setup.ingests] == [0, 0]
    assert [setup.ask(prompt)[0] for _ in range(2)] == [0, 288]


def test_ingester_is_killed(setup: Setup) -> None:
    """Another one goes on where it was: what the engine told before and meanwhile is there under the same epoch."""
    before, meanwhile = setup.tokens(300), setup.tokens(300)
    setup.ask(before)
    epochs = [ingest.epoch for ingest in setup.ingests]
    for ingest in setup.ingests:
        ingest.kill()
    setup.engine.generate(meanwhile)
    setup.engine.generate([*before, *meanwhile])
    sent = setup.engine.last_sequence()
    assert [ingest.told(meanwhile) for ingest in setup.ingests] == [0, 0]
    for ingest in setup.ingests:
        ingest.start()
    setup.settle()
    assert setup.engine.last_sequence() == sent  # the engine stored nothing again
    assert [ingest.epoch for ingest in setup.ingests] == epochs
    for prompt, blocks in (([*before, *meanwhile], 18), (before, 9), (meanwhile, 9)):
        assert [ingest.told(prompt) for ingest in setup.ingests] == [blocks * BLOCK] * 2
        setup.ask(prompt)


def test_engine_is_killed(setup: Setup) -> None:
    """Its blocks count until the lease ends, and never again; a new process at the same place begins with nothing."""
    prompt = setup.tokens(300)
    setup.ask(prompt)
    assert [ingest.told(prompt) for ingest in setup.ingests] == [288, 288]
    setup.engine.kill()
    killed = time.monotonic()
    for ingest in setup.ingests:
        until(lambda ingest=ingest: not ingest.told(prompt), LEASE_S + 2)
    assert time.monotonic() - killed < LEASE_S + 1
    epochs = [ingest.epoch for ingest in setup.ingests]
    stale = _watch(setup, prompt, setup.engine.start)
    assert stale == []
    for ingest, epoch in zip(setup.ingests, epochs, strict=True):
        until(lambda ingest=ingest, epoch=epoch: ingest.epoch > epoch)
    assert setup.ask(prompt)[0] == 0
    assert setup.ask(prompt)[0] == 288


WATCHER = """
import select, sys
from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from tests.followers import holders

url, namespace, chunk_size, *tokens = sys.argv[1:]
config = PrefixCacheConfig(
    url=url, namespace=namespace, chunk_size=int(chunk_size), worker_id="watcher", strict=True, lookup_timeout_s=1.0
)
prompt, seen, looks = list(map(int, tokens)), set(), 0
with PrefixCacheOptimizer(config) as cache:
    while not select.select([sys.stdin], [], [], 0.01)[0]:
        seen |= set(holders(cache, prompt).values())
        looks += 1
print(looks, *seen)
"""


def _watch(setup: Setup, prompt: list[int], action: Callable[[], object]) -> list[int]:
    """Chunks that were told of while something else was going on, as seen by processes that look all the time."""
    watchers: list[subprocess.Popen[str]] = []
    for ingest in setup.ingests:
        what = [ingest.backend.url or "", ingest.backend.namespace, *map(str, [ingest.chunk_size, *prompt])]
        command = [sys.executable, "-c", WATCHER, *what]
        pipe = subprocess.PIPE
        watchers.append(subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=FOLDER.parents[1]))
    action()
    time.sleep(1.0)
    seen: list[int] = []
    for watcher in watchers:
        looks, *found = map(int, watcher.communicate("done\n", timeout=30)[0].split())
        assert looks > 100
        seen += found
    return seen


def test_engine_hashes_name_the_chunks(folder: Path, server: Server) -> None:
    """With hashes sent whole they can be the chunks' names: a router that has the engine's hashes needs no tokens."""
    with ExitStack() as stack:
        engine = Vllm(folder, "--hash", "sha256_cbor", VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES="0")
        stack.enter_context(closing(engine)).start()
        ingest = Ingest(server, engine, folder, "vllm-chains", BLOCK, "--engine-chains")
        setup = Setup(engine, [stack.enter_context(closing(ingest)).start()])
        system = setup.tokens(100)
        prompts = [[*system, *setup.tokens(60 + 97 * i)] for i in range(8)]
        names: dict[tuple[bytes | None, tuple[int, ...]], bytes] = {}
        for prompt in [*prompts, *setup.random.choices(prompts, k=8)]:
            told = ingest.told(_chain(names, prompt))
            cached, _ = engine.generate(prompt)
            assert usable(told, len(prompt)) == cached
            setup.settle()
            names = _names(engine)
        assert ingest.status()["counts"].keys() >= {"messages", "events"}
        assert not any(ingest.status()["counts"].get(name) for name in WRONG)
        assert max(ingest.told(_chain(names, prompt)) for prompt in prompts) > 300
        assert len(names) > BLOCKS  # some were evicted


def _names(engine: Vllm) -> dict[tuple[bytes | None, tuple[int, ...]], bytes]:
    """The engine's hash of each block that it told of, by that of the block before and the tokens."""
    names: dict[tuple[bytes | None, tuple[int, ...]], bytes] = {}
    for _, payload in engine.messages():
        batch: Any = msgpack.unpackb(payload)
        for event in batch[1]:
            if event["type"] == "BlockStored":
                parent = event["parent_block_hash"]
                for i, name in enumerate(event["block_hashes"]):
                    assert len(name) == 32
                    names[parent, tuple(event["token_ids"][i * BLOCK : (i + 1) * BLOCK])] = name
                    parent = name
    return names


def _chain(names: dict[tuple[bytes | None, tuple[int, ...]], bytes], prompt: Sequence[int]) -> Chain:
    """The engine's hashes of a prompt's blocks, as far as they are known."""
    chain: list[bytes] = []
    for at in range(0, math.floor(len(prompt) / BLOCK) * BLOCK, BLOCK):
        name = names.get((chain[-1] if chain else None, tuple(prompt[at : at + BLOCK])))
        if name is None:
            break
        chain.append(name)
    return Chain(chain)
