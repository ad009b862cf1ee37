"""The commands by name."""

from __future__ import annotations

from typing import Annotated

import typer

from distprefix import __version__
from distprefix.cli.audit import audit
from distprefix.cli.demo import demo
from distprefix.cli.ingest import ingest
from distprefix.cli.lookup import lookup
from distprefix.cli.maintain import maintain
from distprefix.cli.namespaces import namespaces
from distprefix.cli.node import node
from distprefix.cli.provision import provision
from distprefix.cli.purge import purge
from distprefix.cli.replay import replay
from distprefix.cli.restored import restored
from distprefix.cli.stats import stats
from distprefix.cli.top import top
from distprefix.cli.tree import tree
from distprefix.cli.workers import workers

__all__ = ["app"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One prefix tree for a whole LLM inference cluster, kept in Redis. "
    "Exit codes: 0 done, 1 nothing found, 2 wrong input, 3 Redis does not answer.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"distprefix {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    del version


for command in (
    *(demo, replay, namespaces, stats, top, tree, node, lookup, workers, ingest),
    *(maintain, purge, restored, audit, provision),
):
    app.command()(command)
