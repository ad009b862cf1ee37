"""A real vLLM engine on the CPU that does as it is told on stdin and publishes its KV events.

Run by the Python of the environment that install_vllm.sh makes, on a model that make_model.py makes:

    VENV/bin/python tests/engines/vllm_events.py MODEL --endpoint tcp://*:5557 [--replay tcp://*:5558] [...]

A line with {"ready": ...} tells that the engine stands. Then each line on stdin is an order and gets one line on
stdout, both JSON; what vLLM itself prints goes to stderr. The end of stdin is as good as an order to quit.

    {"do": "generate", "prompts": [[3, 4, ...], ...], "max_tokens": 4, "cache_salt": null}
        one prompt after another -> {"cached": [tokens reused, per prompt], "ms": 12.3, "outputs": [[...], ...]}
    {"do": "reset"}  forget all blocks -> {"reset": true}; the event goes out with the next prompt's
    {"do": "quit"}   -> {"quit": true}

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


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="A vLLM engine that publishes KV events")
    parser.add_argument("model")
    parser.add_argument("--endpoint", required=True, help="where the events go: tcp://*:5557 binds")
    parser.add_argument("--replay", help="where to ask for past events")
    parser.add_argument("--topic", default="kv-events")
    parser.add_argument("--blocks", type=int, default=65, help="few, so that the engine must evict")
    parser.add_argument("--block-size", type=int, default=32, help="the CPU's attention takes multiples of 32")
    parser.add_argument("--hash", default="sha256", choices=["sha256", "sha256_cbor", "xxhash", "xxhash_cbor"])
    return parser.parse_args(arguments)


class Engine:
    """The engine and the orders that it takes."""

    def __init__(self, options: argparse.Namespace) -> None:
        from vllm import LLM  # noqa: PLC0415 (reads the settings, and takes ten seconds)
        from vllm.config import KVEventsConfig  # noqa: PLC0415

        events = KVEventsConfig(
            enable_kv_cache_events=True,
            publisher="zmq",
            endpoint=options.endpoint,
            replay_endpoint=options.replay,
            topic=options.topic,
        )
        self._llm = LLM(
            model=options.model,
            dtype="float32",
            max_model_len=(options.blocks - 1) * options.block_size,
            block_size=options.block_size,
            num_gpu_blocks_override=options.blocks,
            enable_prefix_caching=True,
            prefix_caching_hash_algo=options.hash,
            kv_events_config=events,
            enforce_eager=True,
            max_num_seqs=4,
            seed=0,
        )

    def generate(self, prompts: list[list[int]], max_tokens: int = 4, cache_salt: str | None = None) -> dict[str, Any]:
        """Answer the prompts, each when the one before is done, so that what it reuses is not left to chance."""
        from vllm import SamplingParams  # noqa: PLC0415

        sampling = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
        salt = {} if cache_salt is None else {"cache_salt": cache_salt}
        begun = time.perf_counter()
        answers = [
            self._llm.generate({"prompt_token_ids": prompt, **salt}, sampling, use_tqdm=False)[0] for prompt in prompts
        ]
        return {
            "cached": [answer.num_cached_tokens for answer in answers],
            "ms": round((time.perf_counter() - begun) * 1000, 2),
            "outputs": [list(answer.outputs[0].token_ids) for answer in answers],
        }

    def reset(self) -> dict[str, Any]:
        """Forget all blocks."""
        return {"reset": self._llm.reset_prefix_cache()}

    def quit(self) -> dict[str, Any]:
        """Send what is still to be sent and stop."""
        self._llm.llm_engine.engine_core.shutdown()
        return {"quit": True}


def main(options: argparse.Namespace) -> None:
    """Serve orders until told to quit."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1) as answers:
        os.dup2(2, 1)  # stdout is for answers only
        os.environ.update(_SETTINGS)
        begun = time.perf_counter()
        engine = Engine(options)
        seconds = round(time.perf_counter() - begun, 2)
        ready = {"seconds": seconds, "block_size": options.block_size, "blocks": options.blocks - 1}
        answers.write(json.dumps({"ready": ready}) + "\n")
        orders = {"generate": engine.generate, "reset": engine.reset, "quit": engine.quit}
        done = False
        while not done:
            line = sys.stdin.readline() or '{"do": "quit"}'
            try:
                order = json.loads(line)
                what = order.pop("do")
                answer = orders[what](**order)
                done = what == "quit"
            except Exception as error:  # noqa: BLE001 (whoever ordered is to know)
                answer = {"error": f"{type(error).__name__}: {error}"}
            answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
