"""What the connector costs the real vLLM on the CPU, and how fast KV comes into the engine.

Needs an engine environment, with this package in it:

    bash tests/engines/install_vllm.sh DIR && DIR/bin/pip install '.[payloads]'
    python benchmarks/vllm_costs.py --vllm-python DIR/bin/python [--quick] [--json]

One engine in one process, so that its steps can be timed from within: the share of the step time that is spent in the
connector's methods is that of one and the same run. Then its own blocks are forgotten and come from Redis: bytes a
second until they lie in the engine's host memory, and until they are in its KV cache, against the bare data path that
reads the same values from the same server, in turns. The model has random weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from measure import Figure, as_json, print_table, untargeted

from distprefix.redis.embedded import EmbeddedServer

WORKER = Path(__file__).parent / "vllm_costs_worker.py"
MAKE_MODEL = Path(__file__).parents[1] / "tests" / "engines" / "make_model.py"


def main() -> None:
    """Run it and print what was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    prompts, tokens = (8, 512) if options.quick else (12, 2048)
    server = EmbeddedServer()
    try:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder) / "model"
            made = [options.vllm_python, str(MAKE_MODEL), str(model), "0", "8", "512"]
            subprocess.run(made, check=True, capture_output=True)
            rows = {
                layerwise: _measure(options.vllm_python, model, server.url, prompts, tokens, layerwise)
                for layerwise in (False, True)
            }
    finally:
        server.close()
    figures = [figure for layerwise, row in rows.items() for figure in _figures(row, layerwise)]
    if options.json:
        print(json.dumps(as_json(figures, {"prompts": prompts, "tokens": tokens}), indent=2))
    else:
        print_table(figures)


def _measure(python: str, model: Path, url: str, prompts: int, tokens: int, layerwise: bool) -> dict[str, Any]:
    command = [python, str(WORKER), str(model), url, str(prompts), str(tokens), str(int(layerwise))]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode or "RESULT" not in ran.stdout:
        sys.exit(ran.stderr[-3000:])
    return json.loads(ran.stdout.rpartition("RESULT")[2])


def _figures(row: dict[str, Any], layerwise: bool) -> list[Figure]:
    saves = "saves layer by layer" if layerwise else "saves after the step"
    share, each = 100 * row["connector_s"] / row["steps_s"], 1e6 * row["connector_s"] / row["steps"]
    figures = [
        Figure(
            f"connector's share of the step time when nothing hits, {saves}",
            f"{each:,.0f} us a step",
            f"{1000 * row['steps_s'] / row['steps']:,.1f} ms a step",
            share,
            "<=",
            2,
            " %",
        )
    ]
    if layerwise:
        return figures
    bare = row["bare_gbs"]
    figures += [
        untargeted(f"{what}, against the bare data path", f"{gbs:.2f} GB/s", f"{bare:.2f} GB/s", gbs / bare, "x")
        for what, gbs in (("load into host memory", row["host_gbs"]), ("load into the KV cache", row["cache_gbs"]))
    ]
    figures += [
        untargeted(f"{what} a request, prompts of {row['chunks']} chunks", f"{row[name]:.2f}", "-", row[name], "")
        for what, name in (
            ("chunks asked for", "asked"),
            ("Redis scripts, nothing hits, stored", "miss_scripts"),
            ("Redis scripts, all hits, loaded", "hit_scripts"),
        )
    ]
    return figures


if __name__ == "__main__":
    main()
