"""The real vLLM, on the CPU, with a model whose layers see a window of 64 tokens, or all: two KV cache groups.

Every answer is compared with that of an engine that shares nothing. Of what lies before the window vLLM keeps and loads
nothing; the connector stores each block with the part of all groups, while all have it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engines.process import PYTHON, SKIP, EngineProcess
from tests.engines.sharing import BLOCK, BLOCKS, Open, have, outputs, payloads, prompt
from tests.engines.test_vllm_connector import transfer
from tests.engines.test_vllm_tier import tier
from tests.servers import Server

pytestmark = [pytest.mark.skipif(not PYTHON, reason=SKIP), pytest.mark.timeout(300)]

LIMITS = ["--longest", str(40 * BLOCK), "--budget", str(4 * BLOCK)]
"""Both groups take of the same blocks, so that not all are one request's. Steps are short, so that the first tokens of
a long prompt have left the window when its last ones are computed."""
PROMPTS = [prompt(0, 2), prompt(1, 3, 5), prompt(2, 8), prompt(3, 20, 7)]
"""As long as the window, and longer."""


@pytest.fixture(scope="module")
def plain_hybrid(tmp_path_factory: pytest.TempPathFactory, hybrid: Path) -> Iterator[EngineProcess]:
    """An engine that shares nothing."""
    log = tmp_path_factory.mktemp("plain") / "log"
    engine = EngineProcess(hybrid, log, "--blocks", str(BLOCKS), *LIMITS).start()
    yield engine
    engine.kill()


def test_connector(engines: Open, server: Server, hybrid: Path, plain_hybrid: EngineProcess) -> None:
    """What one process computed another one loads, however long it is, turn by turn: as much as of other models."""
    one, other = (engines(*transfer(server.url), *LIMITS, of=hybrid) for _ in range(2))
    right = outputs(plain_hybrid, PROMPTS, max_tokens=40)
    answer = one.wait().order("generate", prompts=PROMPTS, max_tokens=40)
    assert (answer["outputs"], answer["external"], answer["cached"]) == (right, 0, [0] * 4)
    have(server, 3 + 4 + 9 + 21)  # of the answers' 40 tokens 39 are computed
    answer = other.wait().order("generate", prompts=PROMPTS, max_tokens=40, together=True)
    assert (answer["outputs"], answer["external"]) == (right, (1 + 3 + 7 + 20) * BLOCK)
    # The next turn goes to the engine that had the one before from Redis, and then to the one that computed that.
    turns = [[*begun, *said, *prompt(9, 1)] for begun, said in zip(PROMPTS, right, strict=True)]
    following = outputs(plain_hybrid, turns, max_tokens=40)
    assert outputs(other, turns, max_tokens=40, together=True) == following
    have(server, 5 + 6 + 11 + 23)
    assert one.order("reset") == {"reset": True}
    answer = one.order("generate", prompts=turns, max_tokens=40)
    assert (answer["outputs"], answer["external"]) == (following, (4 + 5 + 10 + 22) * BLOCK)
    for engine in (one, other):
        assert "Traceback" not in engine.log.read_text()


def test_connector_with_damaged_blocks(
    engines: Open, server: Server, hybrid: Path, plain_hybrid: EngineProcess
) -> None:
    """A request one of whose blocks is damaged is computed, and what it lost is stored again; the engine goes on."""
    engine = engines(*transfer(server.url), *LIMITS, of=hybrid).wait()
    damage(engine, server, outputs(plain_hybrid, PROMPTS))


def test_connector_with_damaged_blocks_of_windows(engines: Open, server: Server, windowed: Path) -> None:
    """The same for a model that has nothing but windows: what lies before a window is not there to go on from."""
    plain, engine = engines(*LIMITS, of=windowed), engines(*transfer(server.url), *LIMITS, of=windowed)
    right = outputs(plain.wait(), PROMPTS)
    engine.wait()
    damage(engine, server, right)


def damage(engine: EngineProcess, server: Server, right: list[list[int]]) -> None:
    """Damage a third of the blocks that an engine has stored, twice, and see that it does not matter."""
    assert outputs(engine, PROMPTS) == right
    for begin in range(2):
        have(server, 2 + 3 + 8 + 20)
        for key in sorted(payloads(server))[begin::3]:
            server.client().setrange(key, 2000, b"other bytes than were stored")
        assert engine.order("reset") == {"reset": True}
        assert outputs(engine, PROMPTS, together=True) == right
        assert engine.order("settle") == {"blocks": BLOCKS - 1, "requests": 0}
    assert "Traceback" not in engine.log.read_text()


def test_tier(engines: Open, server: Server, hybrid: Path, plain_hybrid: EngineProcess) -> None:
    """Another process finds the ends of chains that vLLM keeps for windows, and loads all but a prompt's last token."""
    one, other = (engines(*tier(server.url), *LIMITS, of=hybrid) for _ in range(2))
    right = outputs(plain_hybrid, PROMPTS, max_tokens=40)
    turns = [[*begun, *said, *prompt(9, 1)] for begun, said in zip(PROMPTS, right, strict=True)]
    following = outputs(plain_hybrid, turns, max_tokens=40)
    for part in (one.wait(), other.wait()):
        answer = part.order("generate", prompts=PROMPTS, max_tokens=40)
        assert (answer["outputs"], answer["external"]) == (right, (1 + 3 + 7 + 20) * BLOCK if part is other else 0)
        have(server, (2 + 3 + 8 + 20) + (1 + 2 + 2 + 2))  # of full attention, and of windows
    assert outputs(one, turns, max_tokens=40, together=True) == following
    have(server, (4 + 5 + 10 + 22) + 7 + 10)
    assert other.order("reset", offloaded=True) == {"reset": True}
    answer = other.order("generate", prompts=turns, max_tokens=40)
    assert (answer["outputs"], answer["external"]) == (following, (4 + 5 + 10 + 22) * BLOCK)
    for engine in (one, other):
        assert engine.order("settle") == {"blocks": BLOCKS - 1, "requests": 0}
        assert "Traceback" not in engine.log.read_text()
