"""How fast NVIDIA Dynamo's indexer takes in KV events: run by the Python of an environment of its own.

    python3.11 -m venv DYNAMO && DYNAMO/bin/pip install ai-dynamo-runtime==1.6.1 msgpack pyzmq
    DYNAMO/bin/python benchmarks/event_frames.py FRAMES 1000000
    DYNAMO/bin/python benchmarks/dynamo_indexer.py FRAMES [tree | separate | server [THREADS]]

tree: `dynamo.llm.RadixTree.apply_event(worker, json)`, in this process. Rust, a call an event; each parses the JSON and
    waits for the thread that owns the tree. The event holds for each block the engine's hash and Dynamo's own hash of
    the block's tokens, so a frame is converted first, 256 frames at a time: msgpack to Python, for the tokens
    `compute_block_hash_for_seq` (Rust), and the JSON from an f-string. This is timed apart. Neighbouring removals of a
    batch become one event, and a store which continues the one before it is appended to it.
separate: the same, with every event on its own.
server: `python -m dynamo.indexer`, Dynamo's own process, with no Python at work in it: ZMQ, msgpack, hashing and tree
    are Rust. The fastest way to get frames in. The seconds run from the first frame sent until its HTTP answers that it
    has the block in the last one, and there is no conversion; a look-up is one HTTP request on a kept connection.

`processor_seconds` are of all threads while events are applied: the figure to trust where others are at work.

Look-ups are of 512 hashes: the deepest of what is stored (about 400 blocks), then hashes that nobody has. Each must
match as deep as it should. What hashing the tokens of a look-up takes is not in it; `hash_512_blocks_us` tells that.
"""

# pyright: basic, reportMissingImports=false, reportArgumentType=false
from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, cast

import msgpack
import zmq
from dynamo.llm import RadixTree, compute_block_hash_for_seq
from event_frames import BLOCK_SIZE, read_frames

_TOGETHER = 256
_WORKER = 1
_LOOKUPS = 2000
_DEPTH = 512


def resident(process: int) -> int:
    """Bytes of memory that a process has."""
    return int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(process: int) -> float:
    """Time that a process has been at work."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def merged(events: list[dict[str, Any]], *, separate: bool) -> Iterator[dict[str, Any]]:
    """The events of a batch, with those that one event can tell as one."""
    last: dict[str, Any] | None = None
    for event in events:
        if last is not None and not separate and event["type"] == last["type"]:
            if event["type"] == "BlockRemoved":
                last["block_hashes"] += event["block_hashes"]
                continue
            if event["type"] == "BlockStored" and event["parent_block_hash"] == last["block_hashes"][-1]:
                last["block_hashes"] += event["block_hashes"]
                last["token_ids"] += event["token_ids"]
                continue
        if last is not None:
            yield last
        last = event
    if last is not None:
        yield last


def convert(frames: Iterable[bytes], *, separate: bool) -> Iterator[bytes]:
    """Dynamo's events, as JSON."""
    for frame in frames:
        _, events, rank = msgpack.unpackb(frame)
        for event in merged(events, separate=separate):
            keys = event.get("block_hashes", ())
            if event["type"] == "BlockStored":
                hashes = compute_block_hash_for_seq(event["token_ids"], BLOCK_SIZE)
                blocks = ",".join(
                    [f'{{"block_hash":{key},"tokens_hash":{own}}}' for key, own in zip(keys, hashes, strict=True)]
                )
                parent = event["parent_block_hash"]
                data = f'{{"stored":{{"parent_hash":{"null" if parent is None else parent},"blocks":[{blocks}]}}}}'
            elif event["type"] == "BlockRemoved":
                data = f'{{"removed":{{"block_hashes":[{",".join(map(str, keys))}]}}}}'
            else:
                data = '"cleared"'
            yield f'{{"event_id":0,"data":{data},"dp_rank":{rank or 0}}}'.encode()


def deepest(path: Path, count: int) -> list[list[int]]:
    """Dynamo's hashes of the longest runs of blocks that are stored at the end."""
    parents: dict[int, int | None] = {}
    owns: dict[int, int] = {}
    depths: dict[int, int] = {}
    for event in itertools.chain.from_iterable(msgpack.unpackb(frame)[1] for frame in read_frames(path)):
        if event["type"] == "BlockStored":
            parent = event["parent_block_hash"]
            hashes = compute_block_hash_for_seq(event["token_ids"], BLOCK_SIZE)
            for key, own in zip(event["block_hashes"], hashes, strict=True):
                parents[key], owns[key], depths[key] = parent, own, (0 if parent is None else depths[parent]) + 1
                parent = key
        else:
            for key in event["block_hashes"]:
                del parents[key], owns[key], depths[key]
    inner = set(parents.values())
    runs: list[list[int]] = []
    for leaf in sorted((key for key in parents if key not in inner), key=depths.__getitem__, reverse=True)[:count]:
        run: list[int] = []
        key: int | None = leaf
        while key is not None:
            run.append(owns[key])
            key = parents[key]
        runs.append(run[::-1])
    return runs


def queries(path: Path) -> Iterator[tuple[list[int], int]]:
    """What is looked up, and how many blocks of it are stored."""
    rng = random.Random(1)
    for run in itertools.islice(itertools.cycle(deepest(path, 200)), _LOOKUPS):
        yield (run + [rng.getrandbits(64) for _ in range(_DEPTH)])[:_DEPTH], len(run)


def hash_seconds() -> float:
    """What Dynamo takes to hash the tokens of a look-up."""
    tokens = [random.Random(1).randrange(128_256) for _ in range(_DEPTH * BLOCK_SIZE)]
    begun = time.perf_counter()
    for _ in range(100):
        compute_block_hash_for_seq(tokens, BLOCK_SIZE)
    return (time.perf_counter() - begun) / 100


def report(
    path: Path,
    figures: dict[str, Any],
    grown: int,
    find: Callable[[list[int]], int],
    forget: Callable[[], float] | None = None,
) -> None:
    """Look some up, remove the worker, and print the figures."""
    counts: Counter[str] = Counter()
    for event in itertools.chain.from_iterable(msgpack.unpackb(frame)[1] for frame in read_frames(path)):
        counts[event["type"]] += len(event.get("block_hashes", ()))
        counts["events"] += 1
    took: list[float] = []
    for query, expected in queries(path):
        begun = time.perf_counter()
        score = find(query)
        took.append(time.perf_counter() - begun)
        assert score == expected, (score, expected)
    stored, removed = counts["BlockStored"], counts["BlockRemoved"]
    whole = figures["seconds"] + figures["convert_seconds"]
    print(
        json.dumps(
            {
                "blocks": stored,
                **{name: round(value, 3) for name, value in figures.items()},
                "lookup_us": round(statistics.median(took) * 1e6, 1),
                "rss_bytes_per_block": round(grown / (stored - removed), 1),
                "blocks_per_second": round(stored / figures["seconds"]),
                "blocks_per_second_with_conversion": round(stored / whole),
                "remove_worker_ms": round(forget(), 3) if forget else None,
                "hash_512_blocks_us": round(hash_seconds() * 1e6, 1),
                "removed": removed,
                "events": counts["events"],
            }
        )
    )


def tree(path: Path, *, separate: bool) -> None:
    """Measure the tree in this process."""
    index = RadixTree()
    index.find_matches([1])
    stream = read_frames(path)
    calls = 0
    converting = applying = used = 0.0
    before = resident(os.getpid())
    while frames := list(itertools.islice(stream, _TOGETHER)):
        begun = time.perf_counter()
        events = list(convert(frames, separate=separate))
        converted, using = time.perf_counter(), time.process_time()
        for event in events:
            index.apply_event(_WORKER, event)
        applied = time.perf_counter()
        converting += converted - begun
        applying += applied - converted
        used += time.process_time() - using
        calls += len(events)
    grown = resident(os.getpid()) - before
    figures = {"seconds": applying, "convert_seconds": converting, "processor_seconds": used, "calls": calls}

    def forget() -> float:
        """Milliseconds that it takes until the worker is gone."""
        begun = time.perf_counter()
        index.remove_worker(_WORKER)
        return (time.perf_counter() - begun) * 1000

    report(path, figures, grown, lambda query: index.find_matches(query).scores[_WORKER, 0], forget)


def server(path: Path, threads: int = 4) -> None:
    """Measure the process."""
    publisher = zmq.Context.instance().socket(zmq.PUB)
    publisher.sndhwm = 0
    with socket.create_server(("127.0.0.1", 0)) as free:
        http = free.getsockname()[1]
    events = publisher.bind_to_random_port("tcp://127.0.0.1")
    numbers = itertools.count()
    command = [sys.executable, "-m", "dynamo.indexer", f"--block-size={BLOCK_SIZE}", f"--threads={threads}"]
    command += [f"--port={http}", f"--workers={_WORKER}=tcp://127.0.0.1:{events}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    connection = HTTPConnection("127.0.0.1", http, timeout=60)

    def send(frame: bytes) -> None:
        publisher.send_multipart([b"", next(numbers).to_bytes(8, "big"), frame])

    def find(query: list[int]) -> int:
        """Blocks of these hashes that the process has: it takes them as signed, and answers in tokens."""
        signed = [own - (own >> 63 << 64) for own in query]
        body = json.dumps({"model_name": "default", "block_hashes": signed})
        connection.request("POST", "/query_by_hash", body, {"Content-Type": "application/json"})
        scores = json.loads(connection.getresponse().read()).get("scores", {})
        return scores.get(str(_WORKER), {}).get("0", 0) // BLOCK_SIZE

    def mark(number: int) -> tuple[bytes, list[int]]:
        """A frame with one block, and that block's hash."""
        tokens = [number] * BLOCK_SIZE
        event = {"type": "BlockStored", "block_hashes": [number], "parent_block_hash": None, "token_ids": tokens}
        event |= {"block_size": BLOCK_SIZE, "lora_id": None, "medium": "GPU", "lora_name": None}
        return cast(bytes, msgpack.packb([time.time(), [event], 0])), compute_block_hash_for_seq(tokens, BLOCK_SIZE)

    try:
        frame, hashes = mark(1)
        while True:  # until it listens
            send(frame)
            time.sleep(0.1)
            with contextlib.suppress(OSError):
                if find(hashes):
                    break
            connection.close()
        frames = list(read_frames(path))
        frame, hashes = mark(2)
        before, used = resident(process.pid), processor_seconds(process.pid)
        begun = time.perf_counter()
        for one in frames:
            send(one)
        send(frame)
        while not find(hashes):
            time.sleep(0.01)
        took = time.perf_counter() - begun
        used = processor_seconds(process.pid) - used
        figures = {"seconds": took, "convert_seconds": 0, "processor_seconds": used, "threads": threads}
        report(path, figures, resident(process.pid) - before, find)
    finally:
        process.terminate()
        process.wait()


def main(path: Path, way: str = "tree", *arguments: str) -> None:
    """Measure one way."""
    if way == "server":
        server(path, *map(int, arguments))
    else:
        tree(path, separate=way == "separate")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
