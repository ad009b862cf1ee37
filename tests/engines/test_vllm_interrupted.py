"""The real vLLM, on the CPU, sharing KV while requests are aborted at any moment, and preempted.

Every answer is compared with that of an engine that shares nothing. What an engine computed it loads from Redis again
once it has forgotten all blocks. The connector loads all of a prompt's blocks but the last one, the tier all.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from typing import Any

import pytest

from tests.engines.process import PYTHON, SKIP, EngineProcess, clean_environment
from tests.engines.sharing import BLOCK, Open, calls, have, outputs, prompt
from tests.engines.test_vllm_connector import transfer
from tests.engines.test_vllm_tier import tier
from tests.fake_engine import until
from tests.servers import Server

pytestmark = [pytest.mark.skipif(not PYTHON, reason=SKIP), pytest.mark.timeout(300)]

LOADING, RUNNING, WAITING = "WAITING_FOR_REMOTE_KVS", "RUNNING", "WAITING"
PROMPTS = [prompt(number, 6) for number in range(3)]
ROOM = 64
"""Blocks of an engine whose requests are aborted."""

FEW = 32
MANY = [prompt(number, 3) for number in range(8)]
"""What an engine with few blocks is asked at once: with their answers these need 56."""

_ENDING = """
from distprefix.engines import vllm_worker

class Ending:
    asked = 0
    def done(self):
        self.asked += 1
        return self.asked > 1
    def result(self):
        return 1

class Caches:
    def scatter(self, rows, blocks, count):
        pass

worker = vllm_worker.Worker.__new__(vllm_worker.Worker)
transfer = vllm_worker.Transfer("request", b"", 0, ((5,),))
worker._caches, worker._groups, worker._loading = Caches(), [()], [vllm_worker._Loading(transfer, None, Ending())]
worker._failed, worker._failed_requests, worker._is_idle = set(), set(), False
assert worker.finished() | worker.finished() == {"request"}
"""

Options = Callable[..., list[str]]


def test_a_load_that_ends_while_it_is_asked_for() -> None:
    """It is told of now or the next time; a request of which nothing is told waits for ever."""
    ran = subprocess.run([PYTHON, "-c", _ENDING], check=False, capture_output=True, text=True, env=clean_environment())
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_connector_aborts(engines: Open, server: Server, plain: EngineProcess) -> None:
    """Requests aborted while they are looked up, loaded or answered leave no block behind, and nothing wrong."""
    right = outputs(plain, PROMPTS)
    engine = stored(engines, server, transfer, right)
    for abort in (while_looked_up, while_loaded_by_the_connector, when_loaded, while_answered):
        abort(engine, server)
        check(engine, right, 5)
    finish(engine, plain)


def test_tier_aborts(engines: Open, server: Server, plain: EngineProcess) -> None:
    """The same behind vLLM's offloading, whose loads are two: into host memory, and from there."""
    right = outputs(plain, PROMPTS)
    engine = stored(engines, server, tier, right)
    for abort in (while_looked_up, while_loaded_by_the_tier, when_loaded, while_answered):
        abort(engine, server)
        check(engine, right, 6)
    finish(engine, plain)


def test_connector_preemptions(engines: Open, server: Server, plain: EngineProcess) -> None:
    """Requests that lost their blocks to others load them again, those of the answer too, and end as they should."""
    right = outputs(plain, MANY, max_tokens=100, together=True)
    engine = engines(*transfer(server.url), "--blocks", str(FEW + 1)).wait()
    assert crowded(engine, right) == 0
    have(server, 8 * 6)  # of the answers' 100 tokens 99 are computed
    forget(engine)
    before = loads(engine)
    assert crowded(engine, right) == 8 * 2 * BLOCK
    assert loads(engine) > before + 8 * 2


def test_tier_preemptions(engines: Open, server: Server, plain: EngineProcess) -> None:
    """The same behind vLLM's offloading, which stores prompts only, and has what was loaded once in host memory."""
    right = outputs(plain, MANY, max_tokens=100, together=True)
    engine = engines(*tier(server.url), "--blocks", str(FEW + 1)).wait()
    assert crowded(engine, right) == 0
    have(server, 8 * 3)
    forget(engine)
    assert loads(engine) == 0
    assert crowded(engine, right) == 8 * 3 * BLOCK
    assert loads(engine) == 8 * 3


def crowded(engine: EngineProcess, right: list[list[int]]) -> int:
    """Ask many at once; how many tokens came from elsewhere, not counting those that preempted requests got again."""
    before = counts(engine)["num_preemptions"]
    answer = engine.order("generate", prompts=MANY, max_tokens=100, together=True)
    assert answer["outputs"] == right
    assert counts(engine)["num_preemptions"] > before
    assert engine.order("settle") == {"blocks": FEW, "requests": 0}
    assert "Traceback" not in engine.log.read_text()
    return answer["external"]


def stored(engines: Open, server: Server, options: Options, right: list[list[int]]) -> EngineProcess:
    """An engine that has stored the prompts, and forgotten them."""
    engine = engines(*options(server.url, lookup_timeout_s=5, touch_interval_s=0), "--blocks", str(ROOM + 1)).wait()
    assert outputs(engine, PROMPTS) == right
    have(server, 18)
    forget(engine)
    return engine


def forget(engine: EngineProcess) -> None:
    """Have it forget all blocks."""
    assert engine.order("reset", offloaded=True) == {"reset": True}


def states(engine: EngineProcess, steps: int = 1) -> set[str]:
    """What the begun requests are doing after so many steps."""
    return set(engine.order("step", times=steps)["states"])


def begin(engine: EngineProcess, max_tokens: int = 4) -> list[str]:
    """Enqueue the prompts."""
    return engine.order("begin", prompts=PROMPTS, max_tokens=max_tokens)["begun"]


def abort(engine: EngineProcess, names: list[str]) -> None:
    """Abort requests that are all there."""
    assert engine.order("abort", names=names) == {"aborted": len(names)}


def while_looked_up(engine: EngineProcess, server: Server) -> None:
    """Redis does not answer the look-up."""
    server.freeze()
    names = begin(engine)
    assert states(engine) == {WAITING}
    abort(engine, names)
    assert states(engine) == {"GONE"}
    server.thaw()


def while_loaded_by_the_connector(engine: EngineProcess, server: Server) -> None:
    """Redis has answered the look-up, and does not answer the load, before the abort and for a while behind it."""
    before = calls(server)
    names = begin(engine)
    until(lambda: calls(server) >= before + 3)
    server.freeze()
    until(lambda: states(engine) == {LOADING})
    abort(engine, names)
    assert states(engine, 3) == {"FINISHED_ABORTED"}  # its blocks are still being written to
    server.thaw()


def while_loaded_by_the_tier(engine: EngineProcess, server: Server) -> None:
    """The same, with vLLM's own state: nothing has a block before all are in host memory."""
    before = calls(server)
    names = begin(engine)
    assert states(engine) == {WAITING}
    until(lambda: calls(server) >= before + 3)
    server.freeze()
    assert states(engine, 20) == {WAITING}
    abort(engine, names)
    assert states(engine, 3) == {"GONE"}
    server.thaw()


def when_loaded(engine: EngineProcess, server: Server) -> None:
    """The load is on its way, or has ended and vLLM does not know it yet."""
    names = begin(engine)
    until(lambda: LOADING in states(engine))
    abort(engine, names)


def while_answered(engine: EngineProcess, server: Server) -> None:
    """The requests have their first tokens."""
    names = begin(engine, max_tokens=40)
    until(lambda: states(engine) == {RUNNING})
    assert states(engine, 5) == {RUNNING}
    abort(engine, names)


def check(engine: EngineProcess, right: list[list[int]], loaded: int) -> None:
    """All blocks are free, and the same prompts have right answers, from what is left here and from Redis alone."""
    assert engine.order("settle") == {"blocks": ROOM, "requests": 0}
    assert outputs(engine, PROMPTS, together=True) == right
    forget(engine)
    before = loads(engine)
    answer = engine.order("generate", prompts=PROMPTS, together=True)
    assert (answer["outputs"], answer["external"]) == (right, 3 * loaded * BLOCK)
    assert loads(engine) == before + 3 * loaded
    forget(engine)


def finish(engine: EngineProcess, plain: EngineProcess) -> None:
    """A prompt that needs all blocks has them, and nothing was said of errors."""
    large = [prompt(50, ROOM - 1, BLOCK - 3)]
    assert outputs(engine, large, max_tokens=3) == outputs(plain, large, max_tokens=3)
    assert "Traceback" not in engine.log.read_text()


def loads(engine: EngineProcess) -> int:
    """Blocks that came from Redis."""
    found = counts(engine)
    return found["loaded"] + found.get("distprefix_tier_events:chunks_loaded", 0)


def counts(engine: EngineProcess) -> dict[str, Any]:
    """What it counted so far."""
    return engine.order("counts")["counts"]
