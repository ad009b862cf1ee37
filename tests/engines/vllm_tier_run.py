"""Drive the tier itself, with vLLM's types and no engine, and print what came of it as JSON.

Run by the Python of the environment that install_vllm.sh makes, on a server that may be frozen:

    VENV/bin/python tests/engines/vllm_tier_run.py FOLDER URL PID
"""

# pyright: basic, reportMissingImports=false, reportArgumentType=false
from __future__ import annotations

import json
import os
import signal
import sys
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
from vllm.v1.kv_offload.base import OffloadPolicy, ReqContext, make_offload_key
from vllm.v1.kv_offload.config import (
    OffloadingCacheConfig,
    OffloadingConfig,
    OffloadingGroupConfig,
    OffloadingModelConfig,
    OffloadingParallelConfig,
)
from vllm.v1.kv_offload.tiering.base import TransferJob

from distprefix.engines.vllm_tier import DistPrefixTier
from distprefix.errors import ConfigError

ROW = 4096


def spec_of(model: str) -> Any:
    """What a tier is told of an engine with one group of 32 tokens a block."""
    parallel = OffloadingParallelConfig(0, 1, 1, 1, 1, 1, 0, 1, None, is_parallelism_agnostic=True)
    return SimpleNamespace(
        config=OffloadingConfig(
            groups=(OffloadingGroupConfig(32, ("layer.0",), 0),),
            worker_kv_bytes_per_block=ROW,
            enable_kv_cache_events=False,
            extra_config={},
            engine_id="test",
            model=OffloadingModelConfig(model, "float32"),
            cache=OffloadingCacheConfig(32, 1),
            parallel=parallel,
        )
    )


def keys_of(seed: int, count: int) -> list[Any]:
    """Keys of a request's chunks."""
    return [make_offload_key(bytes([seed, chunk]) * 16, 0) for chunk in range(count)]


class Driver:
    """A tier, driven as vLLM's manager does."""

    def __init__(self, folder: str, url: str) -> None:
        self.rows = np.random.default_rng(1).integers(-128, 127, (64, ROW), np.int8)
        self.view = memoryview(self.rows)
        self.tier = DistPrefixTier(spec_of(folder), self.view, "distprefix", url=url, payload_timeout_s=2.0)
        self._job = 0

    def request(self, name: str, keys: list[Any]) -> tuple[ReqContext, OffloadPolicy]:
        """A new request with so many chunks, and how it offers them."""
        context = ReqContext(name)
        wish = self.tier.on_new_request(context)
        for chunk, key in enumerate(keys):
            context.set_offload_key_position(key, 32 * (chunk + 1))
        return context, wish.policy

    def begin(self, context: ReqContext, keys: list[Any], first_row: int, *, load: bool = False) -> None:
        """Begin a transfer of chunks to or from rows."""
        self._job += 1
        rows = np.arange(first_row, first_row + len(keys), dtype=np.int32)
        job = TransferJob(self._job, keys, rows, is_promotion=load, req_context=context)
        (self.tier.submit_load if load else self.tier.submit_store)(job)

    def ended(self, count: int) -> list[Any]:
        """Whether so many transfers were whole, and what came of those that were not."""
        ended: list[Any] = []
        until = time.monotonic() + 60
        while len(ended) < count and time.monotonic() < until:
            ended += self.tier.get_finished_jobs()
            time.sleep(0.005)
        return [each.success or len(each.successful_keys or ()) for each in sorted(ended, key=lambda each: each.job_id)]

    def found(self, context: ReqContext, keys: list[Any]) -> list[str]:
        """What each key's look-up says in the end."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            said = [self.tier.lookup(key, context).name for key in keys]
            if "RETRY" not in said:
                return said
            self.tier.on_schedule_end(None)
            time.sleep(0.005)
        return ["RETRY"]


def refusal(folder: str, **settings: Any) -> str:
    """Why a tier cannot be made."""
    try:
        DistPrefixTier(spec_of(folder), memoryview(np.zeros((4, ROW), np.int8)), "distprefix", **settings)
    except ConfigError as error:
        return str(error)
    return ""


def main(folder: str, url: str, pid: int) -> dict[str, Any]:
    """Everything."""
    said: dict[str, Any] = {
        "unknown": refusal(folder, url=url, colour="red"),
        "no_url": refusal(folder),
        "no_revision": refusal("nobody/has-this-model", url=url),
        "revision": refusal("nobody/has-this-model", url=url, revision="main"),
    }
    driver, keys = Driver(folder, url), keys_of(1, 12)
    context, _ = driver.request("a", keys)
    driver.begin(context, keys[:5], 0)
    driver.begin(context, keys[5:6], 5)
    driver.begin(context, keys[8:10], 8)
    said["stored"] = driver.ended(3)
    context, policy = driver.request("b", keys)
    said["offers_all"] = policy is OffloadPolicy.REQUEST_LEVEL
    said["found"] = driver.found(context, keys)
    said["found_without_positions"] = driver.found(ReqContext("c"), keys[:2])
    driver.begin(context, keys[1:4], 20, load=True)
    driver.begin(context, keys[4:8], 30, load=True)
    said["loaded"] = driver.ended(2)
    said["equal"] = bool(
        (driver.rows[20:23] == driver.rows[1:4]).all() and (driver.rows[30:32] == driver.rows[4:6]).all()
    )
    said["found_after_failing"] = driver.found(context, keys[4:8])
    os.kill(pid, signal.SIGSTOP)
    context, _ = driver.request("d", keys_of(2, 64))
    for first in range(0, 64, 8):
        driver.begin(context, keys_of(2, 64)[first : first + 8], first)
    driver.tier.drain_jobs()
    said["frozen"] = driver.ended(8)
    os.kill(pid, signal.SIGCONT)
    stats = driver.tier.get_stats()
    said["counts"] = {} if stats is None else stats.reduce()
    driver.tier.shutdown()
    driver.view.release()  # raises when the tier still holds a part of it
    return said


if __name__ == "__main__":
    print("RESULT", json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))  # noqa: T201
