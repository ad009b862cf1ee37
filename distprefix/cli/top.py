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

from distprefix.cli.common import Json, Namespace, Url, console, describe, errors, note_empty, opened, show, size
from distprefix.redis.inspect import read_stats
from distprefix.redis.keys import Keys

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
                with Live(console=console, auto_refresh=False, screen=count is None) as screen:
                    _watch(
                        *(client, keys, looks, interval),
                        lambda now, before: screen.update(_page(now, before), refresh=True),
                    )
            else:
                _watch(
                    *(client, keys, looks, interval),
                    lambda now, before: show(now, as_json=as_json, render=partial(_page, now, before)),
                )
        except KeyboardInterrupt:
            return


def _watch(
    client: redis.Redis,
    keys: Keys,
    looks: int,
    interval: float,
    draw: Callable[[dict[str, Any], dict[str, Any]], object],
) -> None:
    before: dict[str, Any] = {}
    for look in range(looks):
        if look:
            time.sleep(interval)
        now = read_stats(client, keys)
        draw(now, before)
        before = now


_COLUMNS = (
    *("look-ups", "look/s", "hit%", "L1%", "hit tokens", "loads", "loaded", "cold", "stored"),
    *("pub/s", "drop", "evict", "full%", "stale%", "L1"),
)


def _page(now: dict[str, Any], before: dict[str, Any]) -> Group:
    chunk_size = int(now["descriptor"]["chunk_size"])
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
        table.add_row(holder, *_cells(report, before.get("live", {}).get(holder, {})))
    if not now["live"]:
        return Group(head, Text("no worker has reported within the last half minute"))
    return Group(head, table)


def _cells(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """A worker's row: rates since the last look, and what it did since it began."""
    seconds = now["at"] - before["at"] if before else 0.0

    def rate(name: str) -> str:
        return f"{(now[name] - before[name]) / seconds:,.0f}" if seconds > 0 else "-"

    def share(part: str, whole: str) -> str:
        return f"{100 * now[part] / now[whole]:.1f}" if now[whole] else "-"

    off = [name for name, state in now["breakers"].items() if state != "closed"]
    return [
        f"{now['lookups']:,}",
        rate("lookups"),
        share("chunks_hit", "chunks_looked_up"),
        share("chunks_hit_l1", "chunks_hit"),
        f"{now['tokens_hit']:,}",
        f"{now['loads']:,}",
        size(now["payload_bytes_loaded"]),
        size(now["payload_bytes_loaded_cold"]),
        size(now["payload_bytes_stored"]),
        rate("publishes"),
        f"{now['publishes_dropped']:,}",
        f"{now['evicted_chunks']:,}",
        f"{100 * now['l2_budget_use']:.0f}",
        share("staleness_over", "staleness_checked"),
        size(now["l1_bytes"]),
        f" {', '.join(off) or '-'}",
    ]
