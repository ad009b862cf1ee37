"""The real vLLM, on the CPU: what one process computed another one loads, and nothing that happens to Redis shows.

Every answer is compared with that of an engine that shares nothing. A prompt's last token is always computed, so of 8
blocks that are stored in full 7 are loaded when they are the whole prompt.
"""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.engines.process import FOLDER, PYTHON, SKIP, EngineProcess, clean_environment, make_model
from tests.engines.sharing import BLOCK, Open, calls, have, outputs, payloads, prompt
from tests.fake_engine import until
from tests.servers import Server

pytestmark = [pytest.mark.skipif(not PYTHON, reason=SKIP), pytest.mark.timeout(300)]


def transfer(url: str, **settings: Any) -> list[str]:
    """The options of an engine that shares."""
    config = {"kv_connector": "DistPrefixConnector", "kv_role": "kv_both"}
    return ["--transfer", json.dumps({**config, "kv_connector_extra_config": {"url": url, **settings}})]


def test_another_process_loads_what_one_computed(engines: Open, server: Server, plain: EngineProcess) -> None:
    """Answers are an uncached engine's, and what is loaded is all that can be: turn by turn, and eight at once."""
    one, other = (engines(*transfer(server.url, layerwise=layerwise)) for layerwise in (True, False))
    prompts = [prompt(0, 8), prompt(1, 5, 7)]
    right = outputs(plain, prompts, max_tokens=40)
    answer = one.wait().order("generate", prompts=prompts, max_tokens=40)
    assert (answer["outputs"], answer["external"], answer["cached"]) == (right, 0, [0, 0])
    have(server, 9 + 6)  # of the answers' 40 tokens 39 are computed
    answer = other.wait().order("generate", prompts=prompts[:1], max_tokens=40)
    assert (answer["outputs"], answer["external"], answer["cached"]) == (right[:1], 7 * BLOCK, [7 * BLOCK])
    # The next turn goes to the engine that did not have the one before, and the one after that back to the first.
    turn = [*prompts[1], *right[1], *prompt(2, 1)]
    following = outputs(plain, [turn], max_tokens=40)
    answer = other.order("generate", prompts=[turn], max_tokens=40)
    assert (answer["outputs"], answer["external"]) == (following, 6 * BLOCK)
    have(server, 9 + 8)
    turn = [*turn, *following[0], *prompt(3, 1)]
    following = outputs(plain, [turn])
    answer = one.order("generate", prompts=[turn])
    assert (answer["outputs"], answer["external"], answer["cached"]) == (following, 2 * BLOCK, [8 * BLOCK])
    have(server, 9 + 9)
    many = [prompt(number, 6) for number in range(10, 18)]
    right = outputs(plain, many)
    assert outputs(one, many[:4]) == right[:4]
    have(server, 9 + 9 + 4 * 6)
    before = calls(server)
    answer = other.order("generate", prompts=many, together=True)
    assert (answer["outputs"], answer["external"]) == (right, 4 * 5 * BLOCK)
    have(server, 9 + 9 + 8 * 6)
    assert calls(server) - before <= 8 + 4 + 8  # a look-up each, and a walk for each load and store


def test_redis_may_come_and_go(engines: Open, server: Server, plain: EngineProcess) -> None:
    """Without Redis, with one that is full, frozen, killed, wiped, or has wrong bytes, answers stay right."""
    without, one, other = engines(*transfer("unix:///nowhere/at-all")), *(engines(*transfer(server.url)) for _ in "ab")
    prompts = [prompt(number, 6) for number in range(6)]
    right = outputs(plain, prompts)
    answer = without.wait().order("generate", prompts=prompts)
    assert (answer["outputs"], answer["external"]) == (right, 0)
    assert without.log.read_text().count("KV is not shared for now") == 1
    assert outputs(one.wait(), prompts) == right
    have(server, 36)
    client = server.client()
    for key in payloads(server)[::3]:  # some in the middle of every prompt
        client.setrange(key, 2000, b"other bytes than were stored")
    answer = other.wait().order("generate", prompts=prompts, together=True)
    assert answer["outputs"] == right
    have(server, 36)  # computed again and stored again
    client.flushall()
    more = [prompt(number, 6) for number in range(6, 12)]
    right = outputs(plain, more)
    assert outputs(one, more[:3]) == right[:3]
    until(lambda: len(payloads(server)) > 0, 30)
    client.config_set("maxmemory", "1kb")  # less than it has: everything that needs memory is refused
    assert outputs(one, more[3:]) == right[3:]
    client.config_set("maxmemory", "0")
    server.freeze()
    began = time.monotonic()
    assert outputs(other, more[:2], together=True) == right[:2]
    assert time.monotonic() - began < 20
    server.thaw()
    server.kill()
    assert outputs(other, more, together=True) == right
    assert outputs(one, more) == right


def test_nothing_is_taken_that_is_another_ones(
    engines: Open, server: Server, model: Path, tmp_path: Path, plain: EngineProcess
) -> None:
    """Other weights, another dtype and another salt on one Redis each have KV of their own."""
    weights = make_model(tmp_path / "other", 1)
    one, twin = engines(*transfer(server.url)), engines(*transfer(server.url), of=weights)
    half = engines(*transfer(server.url), "--dtype", "bfloat16")
    prompts = [prompt(0, 6), prompt(1, 6)]
    right = outputs(plain, prompts)
    assert outputs(one.wait(), prompts) == right
    have(server, 12)
    answer = twin.wait().order("generate", prompts=prompts)
    assert answer["external"] == 0
    assert answer["outputs"] != right
    have(server, 24)
    assert half.wait().order("generate", prompts=prompts)["external"] == 0
    have(server, 36)
    assert one.order("generate", prompts=prompts, cache_salt="a")["cached"] == [0, 0]
    have(server, 48)
    twin.kill()
    twin = engines(*transfer(server.url), of=model).wait()
    answer = twin.order("generate", prompts=prompts, cache_salt="b")
    assert (answer["outputs"], answer["external"]) == (right, 0)
    answer = twin.order("generate", prompts=prompts, cache_salt="a")
    assert (answer["outputs"], answer["external"]) == (right, 2 * 5 * BLOCK)


def test_eviction_in_between(engines: Open, server: Server, plain: EngineProcess) -> None:
    """With room for a part of what is computed, hits are shorter and answers are right."""
    settings = {"l2_max_chunks": 40, "high_watermark": 1.0, "low_watermark": 0.7}
    one, other = (engines(*transfer(server.url, **settings)) for _ in range(2))
    prompts = [prompt(number, 3 + number % 5) for number in range(24)]
    right = outputs(plain, prompts)
    assert outputs(one.wait(), prompts) == right
    until(lambda: 0 < len(payloads(server)) <= 40, 30)
    answer = other.wait().order("generate", prompts=prompts, together=True)
    assert answer["outputs"] == right
    assert 0 < answer["external"] < sum(len(each) for each in prompts) // 2
    assert outputs(one, prompts, together=True) == right


def test_hashes_that_nobody_shares_are_refused(engines: Open, server: Server) -> None:
    """An engine whose hashes have another seed in every process is told so when it starts."""
    engine = engines(*transfer(server.url), "--hash", "xxhash")
    with pytest.raises(AssertionError, match="the engine is gone"):
        engine.wait()
    until(lambda: "has another seed in every process" in engine.log.read_text(), 10)


def test_the_example_runs(server: Server, model: Path) -> None:
    """The example's second node has all but the last block of its prompt from the first one."""
    example = FOLDER.parents[1] / "examples" / "two_nodes_vllm.py"
    command = [PYTHON, str(example), str(model), "--url", server.url]
    told = subprocess.run(command, capture_output=True, text=True, check=True, env=clean_environment()).stdout
    assert re.search(r"first node: 550 tokens, 0 of them from Redis", told)
    assert re.search(r"second node: 550 tokens, 544 of them from Redis", told)
