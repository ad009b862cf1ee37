"""`distprefix stats`: what a namespace holds."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from distprefix.cli.common import Json, Namespace, Url, describe, errors, note_empty, opened, size
from distprefix.cli.output import show
from distprefix.redis.inspect import read_stats
from distprefix.redis.keys import Keys
from distprefix.redis.metrics import breakers_off, figure
from distprefix.redis.replies import count_of

__all__ = ["stats"]


def stats(url: Url = None, namespace: Namespace = "default", as_json: Json = False) -> None:
    """Show what a namespace holds: nodes, chunks, workers, memory, settings."""
    with errors(), opened(url) as (client, _):
        describe(client, namespace, private=url is None)
        found = read_stats(client, Keys(namespace))
        show(found, as_json=as_json, render=lambda shown: _table(namespace, shown))
        if not found["nodes"]:
            note_empty(client, namespace, "an empty tree")


def _table(namespace: str, found: dict[str, Any]) -> Table:
    table = Table(title=f"namespace {namespace}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    settings = found["descriptor"]
    for name in ("nodes", "chunks", "mean_run", "roots", "leaves"):
        table.add_row(name.replace("_", " "), f"{found[name]:,}")
    table.add_row("bytes", f"{found['bytes']:,} by the tree's own estimate, warm payloads included")
    table.add_row("payloads", f"{size(found['warm_bytes'])} warm, {size(found['cold_bytes'])} cold")
    table.add_row("log", f"{found['log']:,} entries so far")
    table.add_row("hot", f"{found['hot']:,} candidates for pre-warming")
    table.add_row("tokens", f"{found['chunks'] * count_of(settings['chunk_size'].encode()):,}")
    workers = [f"{name} (epoch {epoch})" for name, epoch in found["workers"].items()]
    more = f" and {len(workers) - 8:,} more" if len(workers) > 8 else ""
    table.add_row("workers", Text(f"{len(workers):,}: " + ", ".join(workers[:8]) + more))
    table.add_row("settings", Text("\n".join(f"{name} {value}" for name, value in settings.items() if value)))
    if found["unreadable"]:
        table.add_row("unreadable", "\n".join(found["unreadable"]) + "\nof another type, counted as empty")
    if found["live"]:
        table.add_row("fleet", Text("\n".join(_fleet(list(found["live"].values())))))
    limit = f" of {found['maxmemory'] / 2**20:,.0f} MiB" if found["maxmemory"] else ""
    table.add_row("server", f"{found['server']}, {found['used_memory'] / 2**20:,.1f} MiB used{limit}")
    return table


_SUMS = (
    *("lookups", "hits", "hits_hot", "hits_warm", "hits_stored", "misses", "tokens_hit", "loads", "tokens_loaded"),
    *("payloads_stored", "payload_bytes_stored", "payload_bytes_loaded", "payload_bytes_loaded_cold"),
    *("payloads_missing", "payloads_damaged", "payloads_unavailable", "payloads_trimmed"),
    *("publishes", "publishes_dropped", "evicted_chunks"),
    *("leases", "claims", "staleness_checked", "staleness_over", "feed_gaps", "touches_dropped"),
)


def _fleet(reports: list[dict[str, Any]]) -> list[str]:
    """What the workers that reported lately have done together."""
    lines = [f"{name.replace('_', ' ')} {sum(figure(one, name) for one in reports):,}" for name in _SUMS]
    lines.append(f"L1 {sum(figure(one, 'l1_bytes') for one in reports) / 2**20:,.1f} MiB")
    lines.append(f"budget {100 * max(figure(one, 'l2_budget_use') for one in reports):.1f} % used")
    off = sorted({name for one in reports for name in breakers_off(one)})
    return [*lines, f"off {', '.join(off) or 'nothing'}"]
