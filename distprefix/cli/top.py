"""`distprefix top`: a namespace and its workers, live."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import redis
import typer
from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from distprefix.cli.common import Json, Namespace, Url, describe, errors, note_empty, opened, size
from distprefix.cli.output import Screen, console, show
from distprefix.redis.inspect import read_stats
from distprefix.redis.keys import Keys
from distprefix.redis.metrics import breakers_off, figure
from distprefix.redis.replies import count_of

__all__ = ["top"]


def top(
    url: Url = None,
    namespace: Namespace = "default",
    interval: Annotated[float, typer.Option(min=0.1, help="Seconds between two looks.")] = 1.0,
    count: Annotated[
        int | None, typer.Option(min=1, help="Looks; default: until stopped, 1 without a terminal.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a namespace holds and how its workers do, again and again."""
    with errors(), opened(url) as (client, _):
        keys = Keys(namespace)
        describe(client, namespace, private=url is None)
        if not read_stats(client, keys)["nodes"]:
            note_empty(client, namespace, "an empty tree")
        live = sys.stdout.isatty() and not as_json
        looks = count or (1 << 62 if live else 1)
        try:
            if live:
                with Live(console=console, auto_refresh=False, screen=count is None) as part:
                    screen = Screen(part)
                    _watch(client, keys, looks, interval, screen.update)
            else:
                _watch(client, keys, looks, interval, partial(show, as_json=as_json))
        except KeyboardInterrupt:
            return


def _watch(
    client: redis.Redis,
    keys: Keys,
    looks: int,
    interval: float,
    draw: Callable[..., object],
) -> None:
    before: dict[str, Any] = {}
    for look in range(looks):
        if look:
            time.sleep(interval)
        now = read_stats(client, keys)
        draw(now, render=partial(_page, before=before.get("live", {})))
        before = now


_COLUMNS = (
    *("look-ups", "look/s", "hit%", "L1%", "hit tokens", "loads", "loaded", "cold", "stored"),
    *("pub/s", "drop", "evict", "full%", "stale%", "L1"),
)


def _page(now: dict[str, Any], before: dict[str, dict[str, Any]]) -> Group:
    chunk_size = count_of(now["descriptor"].get("chunk_size", "").encode())
    head = Text.assemble(
        (f"{now['chunks']:,} chunks", "bold"),
        f" ({now['chunks'] * chunk_size:,} tokens) in {now['nodes']:,} nodes, {now['leaves']:,} leaves, "
        f"{size(now['bytes'])}; payloads {size(now['warm_bytes'])} warm, {size(now['cold_bytes'])} cold; "
        f"log at {now['log']:,}; {now['server']}, {size(now['used_memory'])} used",
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("worker", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    table.add_column("off")
    for holder, report in sorted(now["live"].items()):
        table.add_row(holder, *_cells(report, before.get(holder, {})))
    if not now["live"]:
        return Group(head, Text("no worker has reported within the last half minute"))
    return Group(head, table)


def _cells(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """A worker's row: rates since the last look, and what it did since it began."""
    seconds = figure(now, "at") - figure(before, "at") if before else 0.0

    def count(name: str) -> str:
        return f"{figure(now, name):,}"

    def in_bytes(name: str) -> str:
        return size(figure(now, name))

    def rate(name: str) -> str:
        return f"{(figure(now, name) - figure(before, name)) / seconds:,.0f}" if seconds > 0 else "-"

    def share(part: str, of: str) -> str:
        return f"{100 * figure(now, part) / figure(now, of):.1f}" if figure(now, of) else "-"

    off = breakers_off(now)
    return [
        count("lookups"),
        rate("lookups"),
        share("chunks_hit", "chunks_looked_up"),
        share("chunks_hit_l1", "chunks_hit"),
        count("tokens_hit"),
        count("loads"),
        in_bytes("payload_bytes_loaded"),
        in_bytes("payload_bytes_loaded_cold"),
        in_bytes("payload_bytes_stored"),
        rate("publishes"),
        count("publishes_dropped"),
        count("evicted_chunks"),
        f"{100 * figure(now, 'l2_budget_use'):.0f}",
        share("staleness_over", "staleness_checked"),
        in_bytes("l1_bytes"),
        f" {', '.join(off) or '-'}",
    ]
