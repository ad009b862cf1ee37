"""One vLLM engine with the connector, in the engine's environment, for vllm_costs.py; prints what it measured.

VENV/bin/python benchmarks/vllm_costs_worker.py MODEL URL PROMPTS TOKENS LAYERWISE
"""

# pyright: basic, reportMissingImports=false
from __future__ import annotations

import functools
import inspect
import json
import os
import statistics
import sys
import time
from collections import defaultdict
from typing import Any

os.environ |= {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}

import redis
from vllm import LLM, SamplingParams
from vllm.config import KVTransferConfig
from vllm.v1.engine.llm_engine import LLMEngine

from distprefix.engines.store import EngineStore
from distprefix.engines.vllm_connector import DistPrefixConnector
from distprefix.engines.vllm_worker import Worker
from distprefix.redis.data import DataPool

BLOCK = 32
spent: dict[str, float] = defaultdict(float)
asked: list[int] = []
loads: list[dict[str, float]] = []


def timed(owner: Any, name: str, kind: str) -> None:
    """Add up what a method takes."""
    method = getattr(owner, name)

    @functools.wraps(method)
    def timing(*args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(*args, **options)
        finally:
            spent[kind] += time.perf_counter() - began
            spent[f"{kind} calls"] += 1

    setattr(owner, name, timing)


def watch() -> None:
    """Time steps and the connector's methods in them, and follow loads."""
    for name, method in vars(DistPrefixConnector).items():
        if inspect.isfunction(method) and not name.startswith("_") and name != "shutdown":
            timed(DistPrefixConnector, name, "connector")
    timed(LLMEngine, "step", "step")
    begin, finished, look_up = Worker.load, Worker.finished, EngineStore.look_up

    def beginning(self: Worker, step: Any) -> None:
        began, before = time.perf_counter(), len(self._loading)
        begin(self, step)
        for each in self._loading[before:]:
            load = {"began": began, "bytes": each.rows.numel()}
            loads.append(load)
            each.future.add_done_callback(lambda _, load=load: load.update(here=time.perf_counter()))

    def finishing(self: Worker) -> set[str]:
        ended = finished(self)
        for load in loads if ended else ():
            load.setdefault("done", time.perf_counter())
        return ended

    def looking(self: EngineStore, chain: bytes, *, is_counted: bool = True) -> Any:
        asked.append(len(chain) // 16)
        return look_up(self, chain, is_counted=is_counted)

    Worker.load, Worker.finished, EngineStore.look_up = beginning, finishing, looking


def scripts(client: redis.Redis) -> int:
    """How many scripts the server has run."""
    stats: Any = client.info("commandstats")
    return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "evalsha_ro"))


def settle(client: redis.Redis, blocks: int) -> list[str]:
    """Wait until so many blocks are stored; their keys."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        keys = [key for key in client.scan_iter(match="*}:kv:*", count=1000) if client.ttl(key) == -1]
        if len(keys) >= blocks:
            return [key.decode() for key in keys]
        time.sleep(0.1)
    raise SystemExit("the prompts were not stored")


def bare(pool: DataPool, keys: list[str], size: int) -> float:
    """GB/s of the data path alone."""
    room = [memoryview(bytearray(size)) for _ in keys]
    began = time.perf_counter()
    pool.get(keys, lambda index, _: room[index : index + 1], time.monotonic() + 60, [size] * len(keys))
    return len(keys) * size / 1e9 / (time.perf_counter() - began)


def main(model: str, url: str, count: int, tokens: int, layerwise: bool) -> dict[str, Any]:
    """Everything."""
    watch()
    client = redis.Redis.from_url(url)
    client.flushall()  # the server is vllm_costs.py's own
    settings = {"url": url, "layerwise": layerwise, "touch_interval_s": 0}
    llm = LLM(
        model=model,
        dtype="float32",
        max_model_len=tokens + 64,
        block_size=BLOCK,
        num_gpu_blocks_override=count * (tokens // BLOCK + 2) + 1,
        enforce_eager=True,
        max_num_seqs=8,
        kv_transfer_config=KVTransferConfig(
            kv_connector="DistPrefixConnector", kv_role="kv_both", kv_connector_extra_config=settings
        ),
    )
    prompts = [{"prompt_token_ids": [3 + n, *((7 * i + n) % 251 + 3 for i in range(tokens - 1))]} for n in range(count)]

    def answer(some: list[Any], length: int) -> None:
        llm.generate(some, SamplingParams(temperature=0, max_tokens=length, ignore_eos=True), use_tqdm=False)

    answer([{"prompt_token_ids": [400 + i % 50 for i in range(40)]}], 4)  # warms up and connects
    settle(client, 1)
    spent.clear()
    asked.clear()
    before = scripts(client)
    answer(prompts, 16)
    miss = dict(spent)
    asked_a_request = sum(asked) / count
    keys = settle(client, 1 + count * (tokens // BLOCK))
    miss_scripts = (scripts(client) - before) / count
    size = client.strlen(keys[0])
    pool = DataPool(url, timeout_s=5)
    rates: dict[str, list[float]] = defaultdict(list)
    llm.reset_prefix_cache()
    before = scripts(client)
    for prompt in prompts:
        loads.clear()
        answer([prompt], 1)
        rates["host"] += [each["bytes"] / 1e9 / (each["here"] - each["began"]) for each in loads]
        rates["cache"] += [each["bytes"] / 1e9 / (each["done"] - each["began"]) for each in loads]
        rates["bare"].append(bare(pool, keys[: tokens // BLOCK - 1], size))
    return {
        "steps": miss["step calls"],
        "steps_s": miss["step"],
        "connector_s": miss["connector"],
        "chunks": tokens // BLOCK,
        "asked": asked_a_request,
        "miss_scripts": miss_scripts,
        "hit_scripts": (scripts(client) - before) / count,
        **{f"{name}_gbs": statistics.median(found) for name, found in rates.items()},
    }


if __name__ == "__main__":
    print("RESULT", json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "1")))
