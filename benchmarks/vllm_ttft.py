"""Time to first token of the real vLLM on the CPU, by where a prompt's KV comes from, against the prompt's length.

Needs an engine environment, with this package in it:

    bash tests/engines/install_vllm.sh DIR && DIR/bin/pip install .
    python benchmarks/vllm_ttft.py --vllm-python DIR/bin/python [--quick] [--json]

Two engines with the connector on one private Redis, and one without it. Of every length there are several prompts; the
first engine computes them (with the connector: nothing hits), computes them again (its own cache), the second one
loads them from Redis (warm), and, when it has forgotten them, from L1, its own process's payload cache; after all was
made cold, a third one loads them from there. Engine calls alternate, figures are medians. The model has random weights.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.redis.connections import connect
from distprefix.redis.embedded import EmbeddedServer
from distprefix.redis.inspect import namespaces, read_descriptor
from distprefix.redis.keys import Keys

SOURCES = ("plain", "miss", "own", "l1", "warm", "cold")
ENGINES = Path(__file__).parents[1] / "tests" / "engines"


class Engine:
    """vllm_engine.py in a process of its own."""

    def __init__(self, python: str, model: Path, log: Path, blocks: int, *options: str) -> None:
        command = [python, str(ENGINES / "vllm_engine.py"), str(model), "--blocks", str(blocks), *options]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1
            )
        self._log = log

    def ready(self) -> None:
        self._read()

    def first_token(self, prompt: list[int]) -> tuple[float, int]:
        """Milliseconds, and tokens that came from Redis."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": "generate", "prompts": [prompt], "max_tokens": 1}) + "\n")
        answer = self._read()
        return answer["ms"][0], answer["external"]

    def forget(self) -> None:
        """Let vLLM forget all blocks."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"do": "reset"}) + "\n")
        self._read()

    def _read(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(self._log.read_text()[-3000:])
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to first token, by where KV comes from")
    parser.add_argument("--vllm-python", required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    lengths = (512, 2048) if options.quick else (512, 2048, 4096)
    rounds = 3 if options.quick else 5
    server = EmbeddedServer()
    try:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(options.vllm_python, Path(folder), server.url, lengths, rounds)
    finally:
        server.close()
    if options.json:
        print(json.dumps(rows))
        return
    print("| tokens | no connector | nothing hits | own cache | L1 | other node, warm | cold |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        times = [f"{row[name]:.0f} ms" for name in SOURCES]
        print(f"| {row['tokens']} | {' | '.join(times)} |")


def measure(python: str, folder: Path, url: str, lengths: tuple[int, ...], rounds: int) -> list[dict[str, Any]]:
    model = folder / "model"
    made = [python, str(ENGINES / "make_model.py"), str(model), "0", "8", "512"]
    subprocess.run(made, check=True, capture_output=True)
    settings = {"kv_connector": "DistPrefixConnector", "kv_role": "kv_both"}
    shared = json.dumps({**settings, "kv_connector_extra_config": {"url": url, "cold_codec": "raw"}})
    sharing = ["--transfer", shared]
    keeping = json.dumps(
        {**settings, "kv_connector_extra_config": {"url": url, "cold_codec": "raw", "l1_payload_bytes": 1 << 30}}
    )
    engines = [
        Engine(python, model, folder / f"{i}.log", 257, *more)
        for i, more in enumerate(([], sharing, ["--transfer", keeping], sharing))
    ]
    for engine in engines:
        engine.ready()
    plain, one, other, third = engines
    client = connect(url, 5.0)
    rows: list[dict[str, Any]] = []
    blocks = 0
    for length in lengths:
        found: dict[str, list[float]] = {name: [] for name in SOURCES}
        for number in range(rounds):
            prompt = [3 + number + 10 * lengths.index(length), *((7 * i + number) % 251 + 3 for i in range(length - 1))]
            found["plain"].append(plain.first_token(prompt)[0])
            found["miss"].append(one.first_token(prompt)[0])
            blocks += length // 32
            settle(client, blocks)
            found["own"].append(one.first_token(prompt)[0])
            took, external = other.first_token(prompt)
            assert external == length - 32, external
            found["warm"].append(took)
            other.forget()
            took, external = other.first_token(prompt)
            assert external == length - 32, external
            found["l1"].append(took)
            demote(url, client)
            took, external = third.first_token(prompt)
            assert external == length - 32, external
            found["cold"].append(took)
        times = {name: median(each) for name, each in found.items()}
        rows.append({"tokens": length, **times})
    for engine in engines:
        engine.process.kill()
        engine.process.communicate()
    return rows


def settle(client: Any, blocks: int) -> None:
    """Wait until so many blocks are stored, in either tier."""
    deadline = time.monotonic() + 30
    while len({key.rsplit(b":", 1)[1] for key in client.scan_iter(count=1000) if is_kept(client, key)}) < blocks:
        if time.monotonic() > deadline:
            raise SystemExit("the prompt was not stored")
        time.sleep(0.02)


def is_kept(client: Any, key: bytes) -> bool:
    return (b"}:kv:" in key or b":cold:" in key) and client.ttl(key) == -1


def demote(url: str, client: Any) -> None:
    for name in namespaces(client):
        descriptor = read_descriptor(client, Keys(name))
        if not descriptor:
            continue
        config = PrefixCacheConfig(
            url=url, namespace=name, chunk_size=32, fingerprint=descriptor["fingerprint"], cold_codec="raw"
        )
        with PrefixCacheOptimizer(config) as cache:
            while cache.demote(0.0):
                pass


if __name__ == "__main__":
    main()
