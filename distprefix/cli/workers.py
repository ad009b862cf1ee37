"""`distprefix workers`: who holds something, until when that counts, and how far its events are written."""

from __future__ import annotations

import time
from typing import Annotated, Any

import typer
from rich.table import Table

from distprefix.cli.common import (
    EXIT_MISS,
    Json,
    Namespace,
    Url,
    describe,
    errors,
    names_text,
    note_empty,
    opened,
    size,
)
from distprefix.cli.output import fail, show
from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.redis.workers import describe_workers, retire_worker

__all__ = ["workers"]

_DEADLINE_S = 60.0
_LONGEST_LEASE_S = 1e11


def workers(
    url: Url = None,
    namespace: Namespace = "default",
    drop: Annotated[str | None, typer.Option(metavar="NAME", help="This worker is gone: forget all it holds.")] = None,
    as_json: Json = False,
) -> None:
    """List the workers: lease, epoch, ranks, chunks held, what they found and loaded, how far behind events are.

    Or drop one.
    """
    with errors(), opened(url) as (client, _):
        keys, deadline = Keys(namespace), time.monotonic() + _DEADLINE_S
        describe(client, namespace, private=url is None)
        calls = Client(client)
        if drop is not None:
            ranks = retire_worker(calls, keys, drop, deadline)
            if not ranks:
                there = f"namespaces of this server: {names_text(client)}"
                fail(f"there is no worker {drop!r} in namespace {namespace!r}; {there}", EXIT_MISS)
            done = {"dropped": drop, "ranks": ranks}
            show(done, as_json=as_json, render=lambda shown: f"dropped {shown['dropped']}: {shown['ranks']} ranks")
            return
        found = describe_workers(calls, keys, deadline)
        show(found, as_json=as_json, render=lambda shown: _table(namespace, shown))
        if not found:
            note_empty(client, namespace, "no workers")


def _table(namespace: str, found: list[dict[str, Any]]) -> Table:
    table = Table(title=f"workers of {namespace}", title_justify="left")
    table.add_column("worker", overflow="fold")
    for name in ("rank", "epoch", "lease"):
        table.add_column(name, justify="right")
    table.add_column("chunks held")
    has_figures = any(any(one["figures"].values()) for one in found)  # workers that only publish events have none
    for name in _FIGURES if has_figures else ():
        table.add_column(name, justify="right")
    table.add_column("events")
    table.add_column("model, address", overflow="fold")
    for one in found:
        chunks = ", ".join(f"{count:,} {medium}" for medium, count in sorted(one["chunks"].items())) or "none"
        where = " ".join(filter(None, (one["model"], one["address"])))
        row = [one["worker"], str(one["rank"]), str(one["epoch"]), _lease(one["lease_left_s"]), chunks]
        table.add_row(
            *row,
            *(_figures(one["figures"]) if has_figures else ()),
            _events(one["events"]),
            where,
            style="" if one["live"] else "dim",
        )
    return table


_FIGURES = ("look-ups", "hit tokens", "loads", "loaded", "stored")


def _figures(figures: dict[str, int]) -> list[str]:
    counts = [f"{figures[name]:,}" for name in ("lookups", "tokens_hit", "loads")]
    return [*counts, size(figures["payload_bytes_loaded"]), size(figures["payload_bytes_stored"])]


def _lease(left_s: float | None) -> str:
    if left_s is None:
        return "none"
    if abs(left_s) > _LONGEST_LEASE_S:
        return "not a date"
    return f"{left_s:.0f} s" if left_s > 0 else f"ended {-left_s:.0f} s ago"


def _events(events: dict[str, Any] | None) -> str:
    if events is None:
        return ""
    if events["sequence"] is None:
        return "none yet"
    lag = "" if events["lag_s"] is None else f", {events['lag_s']:.1f} s behind"
    return f"to {events['sequence']:,}{lag}" + ("" if events["followed"] else ", not followed")
