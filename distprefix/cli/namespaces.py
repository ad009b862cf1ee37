"""`distprefix namespaces`: what a server has, so that the other commands can be pointed at it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import typer
from rich.table import Table

from distprefix.cli.common import (
    EXIT_MISS,
    Json,
    Url,
    age,
    errors,
    new_server_hint,
    opened,
    server_ms,
    size,
)
from distprefix.cli.output import fail, show
from distprefix.identity import parts_of_text
from distprefix.redis.namespaces import NamespaceSummary, summarize_namespaces

__all__ = ["namespaces"]


def namespaces(url: Url = None, as_json: Json = False) -> None:
    """List the namespaces of a server: model, block size, chunks, bytes, workers, last use. Exit code 1 without any."""
    with errors(), opened(url) as (client, _):
        found = summarize_namespaces(client)
        if not found and not as_json:
            fail(f"this server has no namespaces{new_server_hint(private=url is None)}", EXIT_MISS)
        now_ms = server_ms(client)
        show([_as_dict(each) for each in found], as_json=as_json, render=lambda shown: _table(shown, now_ms))
        if not found:
            raise typer.Exit(EXIT_MISS)


def _as_dict(summary: NamespaceSummary) -> dict[str, Any]:
    parts = parts_of_text(summary.identity)
    return {**asdict(summary), "identity": dict(parts), "model": _model(parts), "dtype": parts.get("dtype")}


def _model(parts: Mapping[str, str]) -> str:
    """The model; where it is not said, what was said instead."""
    return parts.get("model") or parts.get("other", "")


def _table(found: list[dict[str, Any]], now_ms: int) -> Table:
    table = Table(show_header=True)
    table.add_column("namespace", overflow="fold")
    table.add_column("model", overflow="fold")
    table.add_column("dtype")
    for name in ("block size", "chunks", "bytes", "cold bytes", "workers"):
        table.add_column(name, justify="right")
    table.add_column("last use")
    for one in found:
        used = "never" if one["last_used_ms"] is None else f"{age(one['last_used_ms'], now_ms)} ago"
        table.add_row(
            one["name"],
            one["model"],
            one["dtype"] or "",
            f"{one['chunk_size']:,}",
            f"{one['chunks']:,}",
            size(one["bytes"]),
            size(one["cold_bytes"]),
            f"{one['live_workers']:,} of {one['known_workers']:,}",
            used,
        )
    return table
