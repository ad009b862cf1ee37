"""`distprefix maintain`: bring a namespace within a budget, or correct its counts."""

from __future__ import annotations

import sys
import time
from collections import Counter
from typing import Annotated, Any

import typer

from distprefix.cli.common import (
    EXIT_MISS,
    EXIT_USAGE,
    ColdUrl,
    Json,
    Namespace,
    Url,
    describe,
    errors,
    opened,
)
from distprefix.cli.output import fail, show
from distprefix.config import PrefixCacheConfig
from distprefix.damage import Progress
from distprefix.operations import Bounds, Evicted, evict
from distprefix.redis.address import parse_address
from distprefix.redis.client import Client, run
from distprefix.redis.connections import connect
from distprefix.redis.keys import Keys
from distprefix.redis.proof import prove
from distprefix.redis.repair import repair as repair_shard
from distprefix.relief import relieve, remove_unused
from distprefix.tiers.elsewhere import Elsewhere

__all__ = ["maintain"]

_DEADLINE_S = 600.0
_COLD_TIMEOUT_S = 5.0
_NONE = Bounds(None, None, None)


def maintain(
    url: Url = None,
    namespace: Namespace = "default",
    max_chunks: Annotated[int | None, typer.Option(min=0, help="Chunks that may stay.")] = None,
    max_bytes: Annotated[
        int | None, typer.Option(min=0, help="Bytes that may stay, by the tree's estimate, warm payloads included.")
    ] = None,
    max_leaves: Annotated[
        int | None, typer.Option(min=0, help="Prompts that may stay, those no other extends.")
    ] = None,
    max_cold_bytes: Annotated[int | None, typer.Option(min=0, help="Bytes of cold payloads that may stay.")] = None,
    batch: Annotated[int, typer.Option(min=1, max=10_000, help="Leaves between two looks at the budget.")] = 100,
    every: Annotated[float | None, typer.Option(min=0.01, help="Do so every so many seconds, until stopped.")] = None,
    repair: Annotated[
        bool,
        typer.Option("--repair", help="Remove what lost its parent, correct the counts; with --cold-url strays too."),
    ] = False,
    cold_url: ColdUrl = None,
    server: Annotated[
        bool,
        typer.Option("--server", help="Bring the whole server within its budget, and remove namespaces nobody uses."),
    ] = False,
    server_bytes: Annotated[
        int | None, typer.Option(min=1, help="Its budget, with --server; default: the server's maxmemory.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Evict what is over a budget, in the namespace's order; several may do so at once. Or repair the counts."""
    bounds = Bounds(max_chunks, max_bytes, max_leaves, max_cold_bytes)
    if bounds == _NONE and not repair and not server:
        limits = "--max-chunks, --max-bytes, --max-leaves, --max-cold-bytes"
        fail(f"nothing to do: give {limits}, --repair or --server", EXIT_USAGE)
    with errors(), opened(url) as (client, _):
        while server:
            done = _look_after(Client(client), server_bytes)
            show(done, as_json=as_json, render=_lines)
            if every is None:
                return
            sys.stdout.flush()
            time.sleep(every)
        keys = Keys(namespace)
        descriptor = describe(client, namespace, private=url is None)
        calls = Client(client)
        if repair:
            report, right = repair_shard(calls, keys, int(descriptor["max_run"]), time.monotonic() + _DEADLINE_S)
            value: dict[str, Any] = {"nodes": report.nodes, "chunks": report.chunks, "bytes": report.bytes}
            # What was read while others wrote is no snapshot: nothing can be said then.
            value |= {"right": right, "problems": report.problems[:20] if right else None}
            if cold_url:
                value["reclaimed_cold_chunks"] = _reclaim(calls, keys, cold_url)
            show(value, as_json=as_json, render=_lines)
            if not right:
                fail("others kept writing, or it cannot be mended: try again", EXIT_MISS)
        while bounds != _NONE:
            evicted = _evict(calls, keys, bounds, batch)
            show(evicted, as_json=as_json, render=_lines)
            if every is None:
                break
            sys.stdout.flush()
            time.sleep(every)


def _look_after(calls: Client, server_bytes: int | None) -> dict[str, int]:
    """One round over the whole server."""
    counts = Counter[str]()
    config = PrefixCacheConfig(server_max_bytes=server_bytes)
    deadline = time.monotonic() + _DEADLINE_S
    removed = remove_unused(calls, deadline, counts)
    relieved = relieve(calls, config, deadline, counts=counts)
    return {
        "wanted_bytes": relieved.wanted,
        "freed_bytes": relieved.freed,
        "relieved_namespaces": relieved.namespaces,
        "removed_namespaces": removed + relieved.removed,
    }


def _reclaim(calls: Client, keys: Keys, cold_url: str) -> int:
    address = parse_address(cold_url, "cold_url")
    prove(address, _COLD_TIMEOUT_S, "cold_url")
    elsewhere = Elsewhere(calls, keys, Client(connect(address, _COLD_TIMEOUT_S)), _COLD_TIMEOUT_S)
    try:
        return elsewhere.reclaim(time.monotonic() + _DEADLINE_S)
    finally:
        elsewhere.close()


def _evict(calls: Client, keys: Keys, bounds: Bounds, batch: int) -> dict[str, int]:
    total = Evicted(0, 0, 0, more=True)
    progress = Progress()
    has_changed = True
    while total.more and progress.goes_on(total.rank, has_changed=has_changed):
        evicted = run(evict(bounds, batch, max(0, total.rank)), calls, keys.meta, time.monotonic() + 5)
        has_changed = evicted.nodes + evicted.chunks > 0
        total = total.then(evicted)
    return {"evicted_nodes": total.nodes, "evicted_chunks": total.chunks, "leased_leaves": total.leased}


def _lines(value: dict[str, Any]) -> str:
    return "\n".join(f"{name.replace('_', ' ')}: {count}" for name, count in value.items())
