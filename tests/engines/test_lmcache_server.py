"""LMCache's own server and the real vLLM, on the CPU: what one node stored another one has from Redis.

A node is a `lmcache server` with our adapter in its configuration, and an engine that is its client: one with vLLM's
connector, the other one with LMCache's. Every answer is compared with that of an engine that shares nothing. LMCache
stores full chunks of prompts, here of 64 tokens; a prompt's last token is always computed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.engines.process import PYTHON, EngineProcess, clean_environment
from tests.engines.sharing import BLOCKS, have, outputs, payloads, prompt
from tests.fake_engine import until
from tests.servers import Server, find_server, free_port

pytestmark = [
    pytest.mark.skipif(
        not PYTHON or os.environ.get("DISTPREFIX_LMCACHE_PYTHON") != PYTHON,
        reason="DISTPREFIX_VLLM_PYTHON and DISTPREFIX_LMCACHE_PYTHON do not name one environment that has both: "
        "see tests/engines/install_lmcache.sh",
    ),
    pytest.mark.timeout(300),
]

CHUNK = 64
LMCACHES = "lmcache.integration.vllm.lmcache_mp_connector"
"""Where LMCache has its own connector; vLLM has one of the same name."""


class LMCacheServer:
    """`lmcache server` on free ports, that may be ended and started again."""

    def __init__(self, log: Path, url: str) -> None:
        self.log, self.port, self._http = log, free_port(), free_port()
        params = {"url": url, "lookup_timeout_s": 2.0}
        adapter = {"type": "plugin", "module_path": "distprefix.engines.lmcache", "class_name": "DistPrefixL2Adapter"}
        self._command = [
            *(PYTHON, "-P", "-m", "lmcache.cli.main", "server", "--disable-observability", "--no-l1-use-lazy"),
            *("--host", "127.0.0.1", "--port", str(self.port), "--http-port", str(self._http)),
            *("--l1-size-gb", "0.25", "--chunk-size", str(CHUNK), "--eviction-policy", "LRU"),
            *("--supported-transfer-mode", "engine_driven"),
            *("--l2-adapter", json.dumps({**adapter, "adapter_params": params})),
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start it; it is to be waited for."""
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**clean_environment(), "LMCACHE_TRACK_USAGE": "false"},
                start_new_session=True,
            )

    def status(self) -> dict[str, Any]:
        """What the server tells of itself."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._http}/status", timeout=10) as answer:
            return json.load(answer)

    def adapter(self) -> dict[str, Any]:
        """What our adapter tells of itself."""
        return self.status()["storage_manager"]["l2_adapters"][0]

    def is_up(self) -> bool:
        """Whether it answers."""
        assert self._process is not None
        assert self._process.poll() is None, f"the server is gone: {self.log.read_text()[-3000:]}"
        with contextlib.suppress(OSError):
            return bool(self.status()["is_healthy"])
        return False

    def is_idle(self) -> bool:
        """Whether nothing waits to be stored, and nothing is locked."""
        status = self.status()["storage_manager"]
        stores = status["store_controllers"]["_default"]
        locked = status["l2_adapters"][0]["locked_key_count"]
        return (stores["pending_keys_count"], stores["in_flight_task_count"], locked) == (0, 0, 0)

    def end(self) -> None:
        """Have it stop as an operator does."""
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30)

    def kill(self) -> None:
        """End it without warning."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


@dataclass
class Node:
    """An engine and its server."""

    server: LMCacheServer
    engine: EngineProcess

    def generate(self, prompts: list[list[int]], **what: Any) -> tuple[list[list[int]], int]:
        """Answer prompts: the tokens that came, and how many of the prompts' own came from elsewhere."""
        answer = self.engine.order("generate", prompts=prompts, **what)
        return answer["outputs"], answer["external"]

    def told(self, words: str) -> int:
        """How often the engine has logged this."""
        return self.engine.log.read_text().count(words)


@dataclass
class Nodes:
    """Two nodes on one Redis."""

    redis: Server
    one: Node
    other: Node


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Nodes]:
    """Two nodes for all tests, which leave them well."""
    folder = tmp_path_factory.mktemp("nodes")
    with contextlib.ExitStack() as stack:
        redis = Server(find_server("valkey-9.1")).start()
        stack.callback(redis.stop)
        made: list[Node] = []
        for name, module in (("one", None), ("other", LMCACHES)):
            server = LMCacheServer(folder / f"{name}-server.log", redis.url)
            stack.callback(server.kill)
            server.begin()
            options = ["--blocks", str(BLOCKS), "--transfer", transfer(server.port, module)]
            engine = EngineProcess(model, folder / f"{name}.log", *options, script="vllm_with_lmcache.py")
            stack.callback(engine.kill)
            engine.begin()
            made.append(Node(server, engine))
        for node in made:
            until(node.server.is_up, 100)
            node.engine.wait()
        yield Nodes(redis, *made)


def transfer(port: int, module: str | None) -> str:
    """The configuration of a server's client."""
    own = {"lmcache.mp.host": "tcp://127.0.0.1", "lmcache.mp.port": port}
    times = {"lmcache.mp.mq_timeout": 60, "lmcache.mp.heartbeat_interval": 3}
    config = {"kv_connector": "LMCacheMPConnector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}
    place = {"kv_connector_module_path": module} if module else {}
    return json.dumps({**config, **place, "kv_connector_extra_config": {**own, **times}})


def hits(*prompts: list[int]) -> int:
    """Tokens of prompts that can be loaded when all their chunks are stored."""
    return sum(min(len(each) // CHUNK * CHUNK, len(each) - 1) for each in prompts)


def stores(node: Node, numbers: Iterator[int]) -> bool:
    """Whether what a node computes goes to Redis now."""
    before = node.server.adapter().get("stored", 0)
    node.generate([prompt(next(numbers), 2)])
    time.sleep(0.2)
    return node.server.adapter().get("stored", 0) > before


def test_another_node_loads_what_one_stored(nodes: Nodes, plain: EngineProcess) -> None:
    """Answers are an uncached engine's, and what is loaded is all that can be: turn by turn, and eight at once."""
    one, other = nodes.one, nodes.other
    there = len(payloads(nodes.redis))
    prompts = [prompt(0, 8), prompt(1, 5, 7), prompt(2, 1)]  # four chunks, two and some more, none
    right = outputs(plain, prompts, max_tokens=24)
    assert one.generate(prompts, max_tokens=24) == (right, 0)
    have(nodes.redis, there + 4 + 2)
    assert other.generate(prompts[:1], max_tokens=24) == (right[:1], 4 * CHUNK - 1)
    # The next turn goes to the node that did not have the one before, and the one after that back to the first.
    turn = [*prompts[1], *right[1], *prompt(3, 6)]
    following = outputs(plain, [turn], max_tokens=24)
    assert other.generate([turn], max_tokens=24) == (following, 2 * CHUNK)
    have(nodes.redis, there + 4 + 5)
    turn = [*turn, *following[0], *prompt(4, 1)]
    assert one.generate([turn]) == (outputs(plain, [turn]), 5 * CHUNK - 160)  # it has 160 of the first turn itself
    have(nodes.redis, there + 4 + 6)
    many = [prompt(number, 6) for number in range(10, 18)]
    right = outputs(plain, many)
    assert one.generate(many[:4]) == (right[:4], 0)
    have(nodes.redis, there + 4 + 6 + 4 * 3)
    assert other.generate(many, together=True) == (right, hits(*many[:4]))
    have(nodes.redis, there + 4 + 6 + 8 * 3)
    for node in (one, other):
        until(node.server.is_idle)
        assert not node.server.adapter().get("keys_without_chain", 0)


def test_a_fresh_server_has_it_from_redis(nodes: Nodes, plain: EngineProcess) -> None:
    """A server that ended and was started again serves its engine what others stored; meanwhile answers are right."""
    one, other = nodes.one, nodes.other
    prompts = [prompt(number, 6) for number in range(20, 25)]
    right = outputs(plain, prompts)
    there = len(payloads(nodes.redis))
    assert one.generate(prompts) == (right, 0)
    have(nodes.redis, there + 5 * 3)
    assert other.generate(prompts[:1]) == (right[:1], hits(prompts[0]))
    without, again = other.told("entering degraded mode"), other.told("resuming normal operation")
    other.server.end()
    assert "LMCache HTTP server stopped" in other.server.log.read_text()  # nothing of ours held it up
    until(lambda: other.told("entering degraded mode") >= without + 2, 60)  # its scheduler and its worker
    assert other.generate(prompts[1:2]) == (right[1:2], 0)
    other.server.begin()
    until(other.server.is_up, 100)
    until(lambda: other.told("resuming normal operation") >= again + 2, 60)
    assert other.generate(prompts[2:]) == (right[2:], hits(*prompts[2:]))
    assert other.server.adapter()["payloads_loaded"] == 3 * 3


def test_redis_may_fail_and_come_back(nodes: Nodes, plain: EngineProcess) -> None:
    """With other bytes than were stored, a frozen Redis and none answers are right and soon; then it is used again."""
    one, other = nodes.one, nodes.other
    prompts = [prompt(number, 6) for number in range(30, 48)]
    right = outputs(plain, prompts)
    there = payloads(nodes.redis)
    assert one.generate(prompts[:6]) == (right[:6], 0)
    have(nodes.redis, len(there) + 6 * 3)
    client = nodes.redis.client()
    for key in sorted({*payloads(nodes.redis)} - {*there})[::3]:  # some anywhere in the prompts
        client.setrange(key, 2000, b"other bytes than were stored")
    answers, found = other.generate(prompts[:6], together=True)
    assert answers == right[:6]
    assert 0 < found < hits(*prompts[:6])
    for number, sicken in ((6, nodes.redis.freeze), (10, nodes.redis.kill)):
        sicken()
        for node in (one, other):
            begun = time.monotonic()
            assert node.generate(prompts[number : number + 4]) == (right[number : number + 4], 0)
            assert time.monotonic() - begun < 20
    nodes.redis.restart()
    numbers = itertools.count(50)
    for node in (one, other):
        until(partial(stores, node, numbers), 30)
    there = payloads(nodes.redis)
    assert one.generate(prompts[14:]) == (right[14:], 0)
    until(lambda: len(payloads(nodes.redis)) >= len(there) + 4 * 3 and one.server.is_idle(), 30)
    assert other.generate(prompts[14:]) == (right[14:], hits(*prompts[14:]))
