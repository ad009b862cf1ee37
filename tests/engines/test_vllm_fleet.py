"""Two real vLLM servers on one Redis: what the command line says of them is what they counted themselves."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from distprefix.redis.inspect import namespaces, read_stats
from distprefix.redis.keys import Keys
from distprefix.redis.workers import FIGURES
from tests.cli.test_cli import run_cli
from tests.engines.openai_server import Completion, OpenAIServer
from tests.engines.process import PYTHON, SKIP
from tests.engines.sharing import BLOCK, have, payloads, prompt
from tests.fake_engine import until
from tests.servers import Server, find_server

pytestmark = [pytest.mark.skipif(not PYTHON, reason=SKIP), pytest.mark.timeout(500)]

SYSTEM_BLOCKS = 6
"""Of a system prompt. Each of its users adds a block, and a few tokens more."""
LONGEST = 1024
FLOAT_BYTES = 4


class Fleet(NamedTuple):
    """The servers, by the engine_id that they were given."""

    redis: Server
    engines: dict[str, OpenAIServer]


class Counted:
    """What a client counts of one server, beside the server's own metrics."""

    def __init__(self, engine: OpenAIServer) -> None:
        self.engine = engine
        self.requests = 0
        self.hits = 0
        """Requests for which tokens came from Redis."""

    def complete(self, tokens: list[int]) -> Completion:
        """Send a request, and no other one to this server meanwhile."""
        before = self.external
        answer = self.engine.complete(tokens)
        self.requests += 1
        self.hits += self.external > before
        return answer

    @property
    def external(self) -> int:
        """Tokens that came from Redis, as vLLM counts them."""
        return self.engine.counted("external_prefix_cache_hits")


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Fleet]:
    """Two servers, started side by side as docs/vllm.md starts them, on one Redis."""
    folder = tmp_path_factory.mktemp("fleet")
    with ExitStack() as stack:
        redis = Server(find_server("valkey-9.1"), tcp=True).start()
        stack.callback(redis.stop)
        engines: dict[str, OpenAIServer] = {}
        for name in ("alpha", "beta"):
            transfer = {
                "kv_connector": "DistPrefixConnector",
                "kv_role": "kv_both",
                "engine_id": name,
                "kv_connector_extra_config": {"url": redis.url, "touch_interval_s": 0.2, "lookup_timeout_s": 1.0},
            }
            engines[name] = OpenAIServer(
                model,
                folder / f"{name}.log",
                *("--prefix-caching-hash-algo", "sha256_cbor", "--block-size", str(BLOCK)),
                *("--max-model-len", str(LONGEST), "--num-gpu-blocks-override", "400", "--max-num-seqs", "8"),
                *("--kv-transfer-config", json.dumps(transfer)),
            )
            stack.callback(engines[name].end)
            engines[name].begin()
        for engine in engines.values():
            engine.wait()
        yield Fleet(redis, engines)


def test_command_line_shows_what_the_engines_counted(fleet: Fleet, model: Path) -> None:
    """Look-ups, hit tokens, loads, tokens and bytes of each worker are the engine's; nodes have a hit for each use."""
    alpha, beta = (Counted(engine) for engine in fleet.engines.values())
    uses: Counter[int] = Counter()
    _send_one_by_one(fleet.redis, alpha, beta, uses)
    _send_together(fleet.redis, alpha, beta, uses)
    namespace = namespaces(fleet.redis.client())[0]
    keys = Keys(namespace)

    def reported() -> int:
        live = read_stats(fleet.redis.client(), keys)["live"]
        return sum(report["lookups"] + report["loads"] for report in live.values())

    until(lambda: reported() == sum(each.requests + each.hits for each in (alpha, beta)), 30)
    where = ("--url", fleet.redis.url, "--namespace", namespace)
    top, stats, workers = (_json(name, *where) for name in ("top", "stats", "workers"))
    tree = _json("tree", *where, "--breadth", "100")
    block_bytes = _block_bytes(model)
    assert len(top["live"]) == len(stats["live"]) == len(workers) == 2
    for name, counted in (("alpha", alpha), ("beta", beta)):
        row = _only(report for holder, report in top["live"].items() if f"-{name}/" in holder)
        tokens = counted.external
        loaded_bytes = tokens // BLOCK * block_bytes
        assert (row["lookups"], row["hits"], row["tokens_hit"]) == (counted.requests, counted.hits, tokens)
        assert (row["loads"], row["tokens_loaded"]) == (counted.hits, tokens)
        assert (row["payload_bytes_loaded"], row["payload_bytes_loaded_cold"]) == (loaded_bytes, 0)
        queries = counted.engine.counted("external_prefix_cache_queries")
        assert 0 <= queries - row["chunks_looked_up"] * BLOCK < counted.requests * BLOCK
        again = _only(report for holder, report in stats["live"].items() if f"-{name}/" in holder)
        assert _settled(again) == _settled(row)
        figures = _only(one["figures"] for one in workers if one["worker"].endswith(f"-{name}"))
        assert figures == {figure: row[figure] for figure in figures}
    stored = sum(report["payloads_stored"] for report in top["live"].values())
    assert stored == top["chunks"]
    assert sum(report["payload_bytes_stored"] for report in top["live"].values()) == stored * block_bytes
    assert sorted(root["hits"] for root in tree["children"]) == sorted(uses.values())
    page = run_cli("top", *where).stdout
    for name, engine in fleet.engines.items():
        assert re.search(rf"KV is shared in namespace {namespace} by vllm-\S+-{name}/0@", engine.log.read_text())
    assert f"{alpha.external:,}" in page
    assert f"{beta.external:,}" in page


def _send_one_by_one(redis: Server, alpha: Counted, beta: Counted, uses: Counter[int]) -> None:
    """Users of three system prompts to one server, to the other one, and again. Counts uses of each system prompt."""
    stored: set[tuple[int, int]] = set()
    answers: dict[tuple[int, int], str] = {}
    for to, users in ((alpha, range(4)), (beta, range(4)), (beta, range(2, 6)), (alpha, range(6))):
        for system in range(3):
            for user in users:
                uses[system] += any(known == system for known, _ in stored)
                answer = to.complete(_prompt(system, user))
                assert answers.setdefault((system, user), answer.text) == answer.text
                stored.add((system, user))
                have(redis, _blocks(stored))
    assert (alpha.hits, alpha.external) == (3 * 2, 3 * 2 * BLOCK)
    assert (beta.hits, beta.external) == (3 * 4, 3 * (SYSTEM_BLOCKS + 4) * BLOCK)


def _send_together(redis: Server, alpha: Counted, beta: Counted, uses: Counter[int]) -> None:
    """Prompts that one server has computed to the other one, all at once and in both directions."""
    jobs: list[tuple[Counted, list[int]]] = []
    stored = len(payloads(redis))
    for first, second, systems in ((alpha, beta, range(3, 7)), (beta, alpha, range(7, 11))):
        for system in systems:
            assert first.complete(_prompt(system, 0)).cached_tokens == 0
            jobs.append((second, _prompt(system, 0)))
            uses[system] += 1
    have(redis, stored + len(jobs) * (SYSTEM_BLOCKS + 1))
    with ThreadPoolExecutor(len(jobs)) as threads:
        answers = [threads.submit(to.engine.complete, tokens) for to, tokens in jobs]
    for (to, tokens), answer in zip(jobs, answers, strict=True):
        assert answer.result().cached_tokens == len(tokens) // BLOCK * BLOCK
        to.requests += 1
        to.hits += 1


def _prompt(system: int, user: int) -> list[int]:
    """A user's block and a few tokens more behind a system prompt."""
    return [*prompt(system, SYSTEM_BLOCKS), *prompt(100 + user, 1, 7)]


def _blocks(stored: set[tuple[int, int]]) -> int:
    """Blocks of prompts, by system prompt and user."""
    return SYSTEM_BLOCKS * len({system for system, _ in stored}) + len(stored)


def _block_bytes(model: Path) -> int:
    """KV bytes of a block, by the model's own configuration."""
    config = json.loads((model / "config.json").read_text())
    head = config["hidden_size"] // config["num_attention_heads"]
    return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head * BLOCK * FLOAT_BYTES


def _json(*arguments: str) -> Any:
    answer = run_cli(*arguments, "--json")
    assert answer.returncode == 0, answer.stderr
    return json.loads(answer.stdout)


def _only(found: Iterable[Any]) -> Any:
    one, *more = found
    assert not more
    return one


def _settled(report: dict[str, Any]) -> dict[str, Any]:
    """What a report says that stays while nothing is asked for."""
    return {name: report[name] for name in (*FIGURES, "hits", "chunks_looked_up", "payloads_stored")}
