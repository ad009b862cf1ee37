"""A real vLLM engine on the CPU that does as it is told on stdin; it may publish its KV events, and share its KV.

Run by the Python of the environment that install_vllm.sh makes, on a model that make_model.py makes:

    VENV/bin/python tests/engines/vllm_engine.py MODEL [--endpoint tcp://*:5557] [--transfer JSON] [...]

A line with {"ready": ...} tells that the engine stands. Then each line on stdin is an order and gets one line on
stdout, both JSON; what vLLM itself prints goes to stderr. The end of stdin is as good as an order to quit.

    {"do": "generate", "prompts": [[3, 4, ...], ...], "max_tokens": 4, "cache_salt": null, "together": false}
        one prompt after another, or all at once -> {"cached": [tokens reused, per prompt], "external": tokens of these
        that came from elsewhere, "ms": [12.3, ...], "outputs": [[...], ...]}
    {"do": "begin", "prompts": [[...], ...], "max_tokens": 4}  enqueue requests -> {"begun": [their names]}
    {"do": "step", "times": 1}  -> {"states": [of each begun request, by vLLM's name; "GONE" when vLLM forgot it]}
    {"do": "abort", "names": [...]}  -> {"aborted": how many vLLM had not finished}
    {"do": "settle"}  step until nothing is left to do -> {"blocks": free ones, "requests": those that vLLM keeps}
    {"do": "counts"}  -> {"counts": {what vLLM counted so far, and "loaded": blocks that the connector loaded}}
    {"do": "reset", "offloaded": false}  forget all blocks, those offloaded to host memory too -> {"reset": true}; the
        event goes out with the next prompt's
    {"do": "quit"}   -> {"quit": true}

The orders from begin to settle, and what is loaded, need the engine in this process: not with --processes.

An order that fails is answered with {"error": "..."}. An endpoint with a * is bound by the engine, any other it
connects to. vLLM reuses whole blocks only, and reckons the last token of a prompt anew: of a prompt of 64 tokens that
it has whole, 32 are reused. Of --blocks, one is vLLM's own.
"""

# pyright: basic, reportMissingImports=false
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from typing import Any

_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
}
"""What vLLM reads when it is imported: the engine in this process, 1 GiB for its blocks, nothing from outside."""
_SETTLED_S = 60.0


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A vLLM engine that publishes KV events")
    parser.add_argument("model")
    parser.add_argument("--endpoint", help="where the events go: tcp://*:5557 binds; by default there are none")
    parser.add_argument("--transfer", help="vLLM's kv-transfer-config, in JSON")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--replay", help="where to ask for past events")
    parser.add_argument("--topic", default="kv-events")
    parser.add_argument("--blocks", type=int, default=65, help="few, so that the engine must evict")
    parser.add_argument("--block-size", type=int, default=32, help="the CPU's attention takes multiples of 32")
    parser.add_argument("--hash", default="sha256", choices=["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"])
    parser.add_argument("--longest", type=int, help="tokens of a request at most; by default all that blocks are for")
    parser.add_argument("--budget", type=int, help="tokens of a step at most: longer prompts are computed in parts")
    parser.add_argument("--processes", action="store_true", help="the engine's core and workers in processes of theirs")
    parser.add_argument("--ranks", type=int, default=1, help="tensor parallel workers; more than one take --processes")
    return parser.parse_args(arguments)


class Engine:
    """The engine and the orders that it takes."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import LLM  # noqa: PLC0415 (reads the settings, and takes ten seconds)
        from vllm.config import KVEventsConfig, KVTransferConfig  # noqa: PLC0415

        more: dict[str, Any] = {}
        if options.endpoint:
            more["kv_events_config"] = KVEventsConfig(
                enable_kv_cache_events=True,
                publisher="zmq",
                endpoint=options.endpoint,
                replay_endpoint=options.replay,
                topic=options.topic,
            )
        if options.transfer:
            more["kv_transfer_config"] = KVTransferConfig(**json.loads(options.transfer))
        self._llm = LLM(
            model=options.model,
            dtype=options.dtype,
            max_model_len=options.longest or (options.blocks - 1) * options.block_size,
            block_size=options.block_size,
            num_gpu_blocks_override=options.blocks,
            enable_prefix_caching=True,
            prefix_caching_hash_algo=options.hash,
            enforce_eager=True,
            max_num_seqs=8,
            max_num_batched_tokens=options.budget,
            tensor_parallel_size=options.ranks,
            seed=0,
            disable_log_stats=False,
            **more,
        )
        self._begun: list[str] = []

    def generate(
        self,
        prompts: list[list[int]],
        max_tokens: int = 4,
        cache_salt: str | None = None,
        *,
        together: bool = False,
    ) -> dict[str, Any]:
        """Answer the prompts, each when the one before is done, so that what it reuses is not left to chance."""
        from vllm import SamplingParams  # noqa: PLC0415

        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        salt = {} if cache_salt is None else {"cache_salt": cache_salt}
        rounds = [prompts] if together else [[prompt] for prompt in prompts]
        answers: list[Any] = []
        times: list[float] = []
        before = self._external()
        for each in rounds:
            begun = time.perf_counter()
            wanted = [{"prompt_token_ids": prompt, **salt} for prompt in each]
            answers += self._llm.generate(wanted, sampling, use_tqdm=False)
            times.append(round((time.perf_counter() - begun) * 1000, 2))
        return {
            "cached": [answer.num_cached_tokens for answer in answers],
            "external": self._external() - before,
            "ms": times,
            "outputs": [list(answer.outputs[0].token_ids) for answer in answers],
        }

    def begin(self, prompts: list[list[int]], max_tokens: int = 4) -> dict[str, Any]:
        """Enqueue requests, and take no step."""
        from vllm import SamplingParams  # noqa: PLC0415

        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            name = f"begun-{len(self._begun)}"
            self._begun.append(self._llm.llm_engine.add_request(name, {"prompt_token_ids": prompt}, sampling))
        return {"begun": self._begun[-len(prompts) :]}

    def step(self, times: int = 1) -> dict[str, Any]:
        """Take steps, none or more."""
        for _ in range(times):
            self._llm.llm_engine.step()
        requests = self._scheduler().requests
        return {"states": [requests[name].status.name if name in requests else "GONE" for name in self._begun]}

    def abort(self, names: list[str]) -> dict[str, Any]:
        """Abort requests."""
        requests = self._scheduler().requests
        unfinished = [name for name in names if name in requests and not requests[name].is_finished()]
        self._llm.llm_engine.abort_request(names, internal=True)
        return {"aborted": len(unfinished)}

    def settle(self) -> dict[str, Any]:
        """Take steps until vLLM has nothing left to do, as its own loop does."""
        scheduler, end = self._scheduler(), time.monotonic() + _SETTLED_S
        while scheduler.has_requests() and time.monotonic() < end:
            self._llm.llm_engine.step()
        self._begun.clear()
        return {
            "blocks": scheduler.kv_cache_manager.block_pool.get_num_free_blocks(),
            "requests": len(scheduler.requests),
        }

    def counts(self) -> dict[str, Any]:
        """What was counted so far."""
        from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group  # noqa: PLC0415

        found: dict[str, int] = {}
        for each in self._llm.get_metrics():
            if hasattr(each, "value"):
                name = ":".join([each.name.removeprefix("vllm:"), *each.labels.get("event", "").split()])
                found[name] = found.get(name, 0) + int(each.value)
        worker = getattr(get_kv_transfer_group(), "_worker", None) if has_kv_transfer_group() else None
        return {"counts": {**found, "loaded": worker._store.counts["chunks_loaded"] if worker else 0}}

    def _scheduler(self) -> Any:
        return self._llm.llm_engine.engine_core.engine_core.scheduler

    def _external(self) -> int:
        """Tokens that came from elsewhere so far."""
        found = [each for each in self._llm.get_metrics() if each.name == "vllm:external_prefix_cache_hits"]
        return int(sum(each.value for each in found))

    def reset(self, *, offloaded: bool = False) -> dict[str, Any]:
        """Forget all blocks, those in host memory too when they were offloaded."""
        return {"reset": self._llm.reset_prefix_cache(reset_connector=offloaded)}

    def quit(self) -> dict[str, Any]:
        """Send what is still to be sent and stop."""
        self._llm.llm_engine.engine_core.shutdown()
        return {"quit": True}


def main(options: argparse.Namespace) -> None:
    """Serve orders until told to quit."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as answers:
        os.dup2(2, 1)  # stdout is for answers only
        os.environ.update(_SETTINGS)
        if options.processes:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
        if options.ranks > 1:  # vLLM would give each rank a NUMA node of its own
            os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
        begun = time.perf_counter()
        engine = Engine(options)
        seconds = round(time.perf_counter() - begun, 2)
        ready = {"seconds": seconds, "block_size": options.block_size, "blocks": options.blocks - 1}
        answers.write(json.dumps({"ready": ready}) + "\n")
        done = False
        while not done:
            line = sys.stdin.readline() or '{"do": "quit"}'
            try:
                order = json.loads(line)
                what = order.pop("do")
                answer = getattr(engine, what)(**order)
                done = what == "quit"
            except Exception as error:  # noqa: BLE001 (whoever ordered is to know)
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
