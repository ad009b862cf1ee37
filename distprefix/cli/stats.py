"""`distprefix stats`: what a namespace holds."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from distprefix.cli.common import EXIT_MISS, Json, Namespace, Url, errors, fail, opened, show
from distprefix.redis.inspect import namespaces, read_stats
from distprefix.redis.keys import Keys

__all__ = ["stats"]


def stats(url: Url = None, namespace: Namespace = "default", as_json: Json = False) -> None:
    """Show what a namespace holds: nodes, chunks, workers, memory, settings."""
    with errors(), opened(url) as (client, _):
        found = read_stats(client, Keys(namespace))
        if not found["descriptor"]:
            there = ", ".join(namespaces(client)) or "none"
            fail(f"there is no namespace {namespace!r}; there are: {there}", EXIT_MISS)
        show(found, as_json=as_json, render=lambda: _table(namespace, found))


def _table(namespace: str, found: dict[str, Any]) -> Table:
    table = Table(title=f"namespace {namespace}", show_header=False, title_justify="left")
    table.add_column(style="bold")
    table.add_column()
    settings = found["descriptor"]
    for name in ("nodes", "chunks", "mean_run", "roots", "leaves"):
        table.add_row(name.replace("_", " "), f"{found[name]:,}")
    table.add_row("tokens", f"{found['chunks'] * int(settings['chunk_size']):,}")
    table.add_row("workers", ", ".join(f"{name} (epoch {epoch})" for name, epoch in found["workers"].items()) or "none")
    table.add_row("settings", ", ".join(f"{name} {value}" for name, value in settings.items() if value))
    limit = f" of {found['maxmemory'] / 2**20:,.0f} MiB" if found["maxmemory"] else ""
    table.add_row("server", f"{found['server']}, {found['used_memory'] / 2**20:,.1f} MiB used{limit}")
    return table
