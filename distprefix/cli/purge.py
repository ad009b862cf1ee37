"""`distprefix purge`: remove a namespace with everything that belongs to it."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Annotated, Any

import typer

from distprefix.cli.common import EXIT_MISS, EXIT_USAGE, ColdUrl, Json, Url, errors, opened
from distprefix.cli.output import fail, show
from distprefix.config import check_name
from distprefix.redis.client import Client
from distprefix.redis.purge import purge as purge_namespace
from distprefix.redis.purge import purge_cold

__all__ = ["purge"]

_DEADLINE_S = 3600.0


def purge(
    namespace: Annotated[str, typer.Argument(help="The namespace to remove.")],
    url: Url = None,
    cold_url: ColdUrl = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove a namespace: tree, payloads, workers, secret, descriptor. Exit code 1 when there was none.

    Processes that use it go on: their next publish makes it anew, under another secret.
    """
    with errors():
        check_name("namespace", namespace)
        if url is None:
            fail("name the server with --url or DISTPREFIX_URL", EXIT_USAGE)
        if not yes and not typer.confirm(f"Remove namespace {namespace} with everything in it?", err=True):
            raise typer.Exit(EXIT_MISS)
        deadline = time.monotonic() + _DEADLINE_S
        with opened(url) as (client, _):
            purged = purge_namespace(Client(client), namespace, deadline)
        value: dict[str, Any] = {"namespace": namespace, **asdict(purged)}
        if cold_url is not None:
            with opened(cold_url) as (client, _):
                value["cold_keys"] = purge_cold(Client(client), namespace, deadline)
        show(value, as_json=as_json, render=_lines)
        if not purged.keys and not purged.nodes and not value.get("cold_keys"):
            raise typer.Exit(EXIT_MISS)


def _lines(value: dict[str, Any]) -> str:
    return "\n".join(f"{name.replace('_', ' ')}: {count}" for name, count in value.items())
