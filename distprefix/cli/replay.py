"""`distprefix replay TRACE`: a real workload on several nodes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from enum import StrEnum
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from distprefix.cli.common import EXIT_USAGE, ColdUrl, Json, Url, cold_tier, errors, opened
from distprefix.cli.output import fail, show
from distprefix.redis.cleanup import remove_namespaces
from distprefix.redis.inspect import namespaces
from distprefix.redis.scripts import policy_names
from distprefix.replay.fleet import Fleet
from distprefix.replay.report import Figures, Payloads, Restarting
from distprefix.replay.report import replay as run_replay
from distprefix.replay.trace import ideal_hits, read_trace

__all__ = ["replay"]

_MAX_TOKENS = 1 << 26
"""In a made-up prompt: 256 MiB."""


class Route(StrEnum):
    """Which node gets a request."""

    ROUND_ROBIN = "round-robin"
    SESSION = "session"
    RANDOM = "random"


def replay(
    trace: Annotated[str, typer.Argument(metavar="TRACE", help="A trace in Mooncake's format, or gzipped, or -.")],
    url: Url = None,
    namespace: Annotated[
        str | None,
        typer.Option(help="A namespace that is not there yet, and stays; default: one that goes."),
    ] = None,
    block_size: Annotated[int, typer.Option(min=1, max=65_536, help="Tokens in a block of the trace.")] = 512,
    nodes: Annotated[int, typer.Option(min=1, max=256, help="Node processes, each with its own L1.")] = 4,
    route: Annotated[Route, typer.Option(help="Which node gets a request.")] = Route.ROUND_ROBIN,
    in_order: Annotated[bool, typer.Option("--in-order", help="One request in flight: exact results.")] = False,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Requests in flight; default: one a node.")] = None,
    as_tokens: Annotated[bool, typer.Option("--as-tokens", help="Made-up tokens, hashed, not ids.")] = False,
    no_share: Annotated[bool, typer.Option("--no-share", help="The baseline: every node on its own.")] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first requests.")] = None,
    capacity: Annotated[
        str | None, typer.Option(help="Chunks that the tree may hold, or a share of the trace's, as 1%.")
    ] = None,
    policy: Annotated[str, typer.Option(help=f"Order of eviction: {', '.join(policy_names())}.")] = "lru",
    restart_at: Annotated[
        str | None, typer.Option(help="Restart node 0 before this request, or at a share of the trace, as 50%.")
    ] = None,
    prewarm: Annotated[bool, typer.Option("--prewarm", help="Pre-warm it then.")] = False,
    payload_bytes: Annotated[
        int,
        typer.Option(min=0, max=512 * 1024 * 1024, help="Load and store so many KV bytes a block too; see --limit."),
    ] = 0,
    demote_at: Annotated[
        str, typer.Option(help="With payloads: make all of them cold before this request, or at a share, as 50%.")
    ] = "50%",
    cold_url: ColdUrl = None,
    as_json: Json = False,
) -> None:
    """Replay a trace on several nodes and report hit rates, latencies and memory."""
    with errors():
        if in_order and (concurrency or 1) > 1:
            fail(f"--in-order means one request in flight: leave --concurrency {concurrency} out", EXIT_USAGE)
        if policy not in policy_names():
            fail(f"--policy is {policy!r}: it must be one of {', '.join(policy_names())}", EXIT_USAGE)
        requests = read_trace(trace, limit)
        if as_tokens:
            _check_tokens(max(request.chunks for request in requests), block_size)
        most = None if capacity is None else _part_of(capacity, "--capacity", lambda: ideal_hits(requests)[1])
        payloads = None
        if payload_bytes:
            payloads = Payloads(payload_bytes, block_size, _part_of(demote_at, "--demote-at", lambda: len(requests)))
        restart = None if restart_at is None else _part_of(restart_at, "--restart-at", lambda: len(requests))
        name = namespace or f"replay-{time.time_ns():x}"
        with opened(url) as (client, address):
            if any(there == name or there.startswith(f"{name}-") for there in namespaces(client)):
                fail(
                    f"namespace {name!r} is there already: name another one, so that the figures are right", EXIT_USAGE
                )
            settings: dict[str, Any] = {
                **{"url": address, "namespace": name, "chunk_size": block_size},
                **{"lookup_timeout_s": 10.0, "publish_timeout_s": 10.0, "strict": True},
                # The bare policy is measured, to the chunk: nothing else bounds or spares.
                **{"max_cached_sequences": 2**31, "hot_threshold": 2**31, "policy": policy},
                **{"l2_max_chunks": most and max(1, most // (nodes if no_share else 1))},
                **{"high_watermark": 1.0, "low_watermark": 1.0, "in_step": most is not None},
                **(
                    {"payload_bytes": payload_bytes, "payload_timeout_s": 60.0, **cold_tier(cold_url)}
                    if payloads
                    else {}
                ),
            }
            try:
                with Fleet(nodes, settings, share=not no_share, as_tokens=as_tokens) as fleet, _progress() as progress:
                    task = progress.add_task("replaying", total=sum(1 for request in requests if request.chunks))
                    figures = run_replay(
                        fleet,
                        requests,
                        nodes=nodes,
                        route=route,
                        concurrency=1 if in_order else concurrency or nodes,
                        used_memory=lambda: int(client.info("memory")["used_memory"]),
                        progress=lambda: progress.advance(task),
                        restarting=None if restart is None else Restarting(restart, prewarm),
                        payloads=payloads,
                    )
            finally:
                if namespace is None:
                    remove_namespaces(client, name, nodes, cold_url)
        if most is None:
            figures = replace(figures, evicted_chunks=None)
        show(figures.as_dict(), as_json=as_json, render=lambda _: _table(figures, block_size))


def _part_of(text: str, option: str, whole: Callable[[], int]) -> int:
    """A number, or a share of the whole such as 1%."""
    number = text.strip().removesuffix("%")
    try:
        value = float(number)
        if not 0 <= value <= (100 if text.strip().endswith("%") else 2**53):
            raise ValueError
    except ValueError:
        fail(f"{option} is {text!r}: it must be a whole number, or a share such as 1%", EXIT_USAGE)
    return int(value) if number == text.strip() else max(1, int(value * whole() / 100))


def _check_tokens(chunks: int, block_size: int) -> None:
    """End the command where a prompt would take too much memory as tokens."""
    if chunks * block_size > _MAX_TOKENS:
        fail(
            f"--as-tokens: a prompt of {chunks} blocks has {chunks * block_size} tokens, at most {_MAX_TOKENS} are "
            "made up: leave --as-tokens out, or give a smaller --block-size",
            EXIT_USAGE,
        )


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    errors_console = Console(stderr=True)
    return Progress(*columns, console=errors_console, transient=True, disable=not errors_console.is_terminal)


def _table(figures: Figures, block_size: int) -> Table:
    def share(part: int) -> str:
        percent = 100 * part / figures.chunks if figures.chunks else 0.0
        return f"{part:>13,} chunks {part * block_size:>16,} tokens {percent:6.2f} %"

    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="left")
    table.add_row("requests", f"{figures.requests:,} on {figures.nodes} nodes in {figures.wall_s:.1f} s")
    table.add_row("asked for", share(figures.chunks))
    table.add_row("hit", share(figures.hit_chunks))
    table.add_row("  answered by L1", share(figures.l1_hit_chunks))
    table.add_row("  answered by Redis", share(figures.shared_hit_chunks))
    table.add_row("hit rate", f"{figures.hit_rate:.4f}, an unlimited cache {figures.ideal_hit_rate:.4f}")
    table.add_row("Redis calls per look-up", f"{figures.redis_calls_per_lookup:.3f}")
    table.add_row("look-up", f"p50 {figures.lookup_p50_us:,.0f} µs, p99 {figures.lookup_p99_us:,.0f} µs")
    table.add_row("publish", f"p50 {figures.publish_p50_us:,.0f} µs, p99 {figures.publish_p99_us:,.0f} µs")
    table.add_row("Redis", f"{figures.redis_bytes_per_chunk:.1f} bytes a chunk, {figures.unique_chunks:,} chunks")
    if figures.evicted_chunks is not None:
        table.add_row("evicted", f"{figures.evicted_chunks:,} chunks")
    if figures.payload_bytes is not None:
        _add_payloads(table, figures)
    if figures.restart_l1_share is not None:
        table.add_row("after the restart", f"L1 answered {100 * figures.restart_l1_share:.1f} % of what node 0 hit")
    return table


def _add_payloads(table: Table, figures: Figures) -> None:
    def speed(gb_per_s: float | None) -> str:
        return "nothing" if gb_per_s is None else f"{gb_per_s:.2f} GB/s"

    wrong = f", {figures.wrong_payloads:,} of them wrong" if figures.wrong_payloads else ""
    restored = f": {figures.load_tokens_per_s:,.0f} tokens a second restored" if figures.load_tokens_per_s else ""
    table.add_row(
        "payloads", f"{figures.payload_bytes:,} bytes a chunk, {figures.loaded_chunks:,} loaded{wrong}{restored}"
    )
    table.add_row("  warm tier", f"stored {speed(figures.store_gb_per_s)}, loaded {speed(figures.load_warm_gb_per_s)}")
    smaller = "" if figures.cold_ratio is None else f", {figures.cold_ratio:.2f} times smaller"
    moved = f"demoted {speed(figures.demote_gb_per_s)}, loaded {speed(figures.load_cold_gb_per_s)}{smaller}"
    table.add_row("  cold tier", moved)
