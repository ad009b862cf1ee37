"""The real vLLM, on the CPU, with its own offloading and ours below it: what one process computed another one loads.

Every answer is compared with that of an engine that shares nothing. vLLM offloads the full blocks of prompts, not those
of answers, and loads all of a prompt's when it can.
"""

from __future__ import annotations

import json
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


def tier(url: str, **settings: Any) -> list[str]:
    """The options of an engine that has the tier."""
    more = {"cpu_bytes_to_use": 1 << 25, "secondary_tiers": [{"type": "distprefix", "url": url, **settings}]}
    config = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
    config["kv_connector_extra_config"] = {"spec_name": "DistPrefixTieringSpec", **more}  # pyright: ignore[reportArgumentType]
    return ["--transfer", json.dumps(config)]


def external(engine: EngineProcess, prompts: list[list[int]], right: list[list[int]], **what: Any) -> int:
    """How many tokens came from elsewhere, for answers that have to be right."""
    answer = engine.order("generate", prompts=prompts, **what)
    assert answer["outputs"] == right
    return answer["external"]


def test_another_process_loads_what_one_computed(engines: Open, server: Server, plain: EngineProcess) -> None:
    """Answers are an uncached engine's, and what is loaded is all that can be: turn by turn, and eight at once."""
    one, other = (engines(*tier(server.url, touch_interval_s=0)) for _ in range(2))  # nothing in the background
    prompts = [prompt(0, 8), prompt(1, 5, 7)]
    right = outputs(plain, prompts, max_tokens=40)
    assert external(one.wait(), prompts, right, max_tokens=40) == 0
    have(server, 8 + 5)
    assert external(other.wait(), prompts[:1], right[:1], max_tokens=40) == 8 * BLOCK
    # The next turn goes to the engine that did not have the one before, and the one after that back to the first.
    turn = [*prompts[1], *right[1], *prompt(2, 1)]
    following = outputs(plain, [turn], max_tokens=40)
    assert external(other, [turn], following, max_tokens=40) == 5 * BLOCK
    have(server, 8 + 7)
    turn = [*turn, *following[0], *prompt(3, 1)]
    answer = one.order("generate", prompts=[turn])
    assert answer["outputs"] == outputs(plain, [turn])
    assert (answer["external"], answer["cached"]) == (BLOCK, [7 * BLOCK])  # of the answer 39 tokens were computed here
    have(server, 8 + 9)
    many = [prompt(number, 6) for number in range(10, 18)]
    right = outputs(plain, many)
    assert external(one, many[:4], right[:4]) == 0
    have(server, 8 + 9 + 4 * 6)
    before = calls(server)
    assert external(other, many, right, together=True) == 4 * 6 * BLOCK
    have(server, 8 + 9 + 8 * 6)
    assert calls(server) - before == 8 + 4 + 4  # a look-up each, and a walk for each load and store
    assert one.order("quit") == other.order("quit") == {"quit": True}
    for engine in (one, other):
        assert engine.process is not None
        assert engine.process.wait(30) == 0
        assert "Traceback" not in engine.log.read_text()
        assert "BufferError" not in engine.log.read_text()


def test_redis_may_come_and_go(engines: Open, server: Server, plain: EngineProcess) -> None:
    """Without Redis, with one that was killed, frozen, wiped or tampered with, answers stay right."""
    without, one, other = engines(*tier("unix:///nowhere/at-all")), *(engines(*tier(server.url)) for _ in "ab")
    prompts = [prompt(number, 6) for number in range(6)]
    right = outputs(plain, prompts)
    assert external(without.wait(), prompts, right) == 0
    assert without.log.read_text().count("KV is not shared for now") == 1
    without.end()
    assert external(one.wait(), prompts, right) == 0
    have(server, 36)
    client = server.client()
    name = next(key for key in payloads(server))
    for key in payloads(server)[::3]:  # some in the middle of every prompt
        client.setrange(key, 2000, b"other bytes than were stored")
    assert 0 < external(other.wait(), prompts, right, together=True) < 36 * BLOCK
    have(server, 36)  # computed again and stored again
    assert client.exists(name)
    # Wiped: the next turn finds a hole, and one that comes when this is known has it filled, from the primary tier.
    client.flushall()
    turns = [[*prompts[0], *prompt(20, 1)], [*prompts[0], *prompt(21, 1)]]
    following = outputs(plain, turns)
    assert external(one, turns[:1], following[:1]) == 0
    until(lambda: external(one, turns[1:], following[1:]) == 0 and len(payloads(server)) == 7, 30)
    assert external(other, turns[1:], following[1:]) == BLOCK
    more = [prompt(number, 6) for number in range(6, 12)]
    right = outputs(plain, more)
    server.freeze()
    began = time.monotonic()
    assert external(other, more[:2], right[:2], together=True) == 0
    assert time.monotonic() - began < 10
    server.thaw()
    other.send("generate", prompts=more, together=True)
    time.sleep(0.05)
    server.kill()
    assert other.answer()["outputs"] == right
    assert external(one, more, right) == 0
    server.start()
    more = [prompt(number, 6) for number in range(12, 14)]
    right = outputs(plain, more)
    until(lambda: outputs(one, more) == right and len(payloads(server)) >= 12, 60)  # external: the primary tier counts


def test_nothing_is_taken_that_is_another_ones(
    engines: Open, server: Server, model: Path, tmp_path: Path, plain: EngineProcess
) -> None:
    """Other weights on one Redis have KV of their own."""
    twin = engines(*tier(server.url), of=make_model(tmp_path / "other", 1))
    one = engines(*tier(server.url))
    prompts = [prompt(0, 6), prompt(1, 6)]
    right = outputs(plain, prompts)
    assert external(one.wait(), prompts, right) == 0
    have(server, 12)
    answer = twin.wait().order("generate", prompts=prompts)
    assert answer["external"] == 0
    assert answer["outputs"] != right
    have(server, 24)


def test_the_tier_without_an_engine(server: Server, tmp_path: Path) -> None:
    """Wrong settings are refused in words; holes and a frozen Redis end no transfer but their own."""
    command = [PYTHON, str(FOLDER / "vllm_tier_run.py"), str(tmp_path), server.url, str(server.pid)]
    ran = subprocess.run(command, check=False, capture_output=True, text=True, env=clean_environment())
    assert ran.returncode == 0, ran.stderr[-3000:]
    said = json.loads(ran.stdout.rpartition("RESULT")[2])
    assert "unknown setting 'colour': there are config" in said["unknown"]
    assert "give them its url" in said["no_url"]
    assert "which revision of nobody/has-this-model is it?" in said["no_revision"]
    assert said["revision"] == ""
    assert said["stored"] == [True, True, 0]  # the third lies behind a hole
    assert said["offers_all"]
    assert said["found"] == ["HIT"] * 6 + ["MISS"] * 6
    assert said["found_without_positions"] == ["MISS"] * 2
    assert said["loaded"] == [True, 2]
    assert said["equal"]
    assert said["found_after_failing"] == ["HIT"] * 2 + ["MISS"] * 2
    assert said["frozen"] == [0] * 8  # none is left, and none is waited for that has not begun
    counts = {name.split("'")[1]: count for name, count in said["counts"].items()}
    assert counts["holes"] == 1
    assert counts["unknown_chunks"] == 2
    assert counts["stores_dropped_waiting"] == 48
    assert counts["chunks_loaded"] == 5
