"""The real vLLM, on the CPU, as ``vllm serve`` runs it: its core in a process of its own, and each rank in another.

Every answer is compared with that of an engine that shares nothing.
"""

from __future__ import annotations

import pytest

from tests.engines.process import PYTHON, SKIP, EngineProcess
from tests.engines.sharing import BLOCK, Open, have, outputs, payloads, prompt
from tests.engines.test_vllm_connector import transfer
from tests.servers import Server

pytestmark = [pytest.mark.skipif(not PYTHON, reason=SKIP), pytest.mark.timeout(300)]


def test_core_and_worker_in_processes_of_their_own(engines: Open, server: Server, plain: EngineProcess) -> None:
    """What the scheduler tells the worker arrives: such an engine stores for an engine in one process, and loads."""
    many, one = engines(*transfer(server.url), "--processes"), engines(*transfer(server.url))
    prompts = [prompt(number, 6) for number in range(4)]
    right = outputs(plain, prompts, max_tokens=40)
    one.wait()
    many.wait()
    for at, (first, second) in enumerate(((one, many), (many, one))):
        part = slice(2 * at, 2 * at + 2)
        answer = first.order("generate", prompts=prompts[part], max_tokens=40)
        assert (answer["outputs"], answer["external"]) == (right[part], 0)
        have(server, (2 * at + 2) * 7)  # of the answers' 40 tokens 39 are computed
        answer = second.order("generate", prompts=prompts[part], max_tokens=40, together=True)
        assert (answer["outputs"], answer["external"]) == (right[part], 2 * 5 * BLOCK)


def test_two_ranks(engines: Open, server: Server, plain: EngineProcess) -> None:
    """Each of two tensor parallel workers stores its part of a block and loads it again; one may have lost some."""
    engine = engines(*transfer(server.url), "--processes", "--ranks", "2")
    prompts = [prompt(number, 6) for number in range(3)]
    right = outputs(plain, prompts)
    assert outputs(engine.wait(), prompts) == right
    have(server, 2 * 3 * 6)
    assert engine.order("reset") == {"reset": True}
    answer = engine.order("generate", prompts=prompts, together=True)
    assert (answer["outputs"], answer["external"]) == (right, 3 * 5 * BLOCK)
    for key in sorted(payloads(server))[: 3 * 6 : 3]:  # all of one worker
        server.client().setrange(key, 2000, b"other bytes than were stored")
    assert engine.order("reset") == {"reset": True}
    assert outputs(engine, prompts, together=True) == right
    assert "Recovered from KV load failure" in engine.log.read_text()
    assert "Traceback" not in engine.log.read_text()
