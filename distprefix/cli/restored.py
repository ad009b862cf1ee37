"""`distprefix restored`: say that the server was restored from a backup, so that nothing older is believed."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from distprefix.cli.common import EXIT_MISS, Json, Namespace, Url, errors, opened
from distprefix.cli.output import fail, show
from distprefix.errors import NotAttachedError, ScriptError
from distprefix.redis.client import Client
from distprefix.redis.inspect import namespaces
from distprefix.redis.keys import Keys
from distprefix.redis.restored import declare_restored

__all__ = ["restored"]

_DEADLINE_S = 60.0


def restored(
    url: Url = None,
    namespace: Namespace = "default",
    every_namespace: Annotated[bool, typer.Option("--all", help="Every namespace of the server.")] = False,
    as_json: Json = False,
) -> None:
    """Say that the server was restored: workers that live publish again what they hold, nothing older counts."""
    with errors(), opened(url) as (client, _):
        calls = Client(client)
        names = namespaces(client) if every_namespace else [namespace]
        done: dict[str, int] = {}
        refused: list[str] = []
        for name in names:
            try:
                done[name] = declare_restored(calls, Keys(name), time.monotonic() + _DEADLINE_S).members
            except NotAttachedError:
                if not every_namespace:
                    fail(f"there is no namespace {name!r}", EXIT_MISS)
            except ScriptError as error:  # of another version, say: the others are done all the same
                refused.append(f"{name!r}: {error}")
        show(done, as_json=as_json, render=_lines)
        if refused:
            fail(f"nothing was said of {'; '.join(refused)}", EXIT_MISS)


def _lines(done: dict[str, int]) -> str:
    return "\n".join(f"{name}: {members} ranks publish again what they hold" for name, members in done.items())
