"""The commands by name."""

from __future__ import annotations

import re
from typing import Annotated, Any, cast

import typer
from typer.core import TyperGroup

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
from distprefix.printable import printable
from distprefix.redis.address import without_password

__all__ = ["app"]

_UsageError = cast("type[Exception]", typer.BadParameter.__bases__[0])
_ADDRESS = re.compile(r"[^\s('\"]*(://|@)")


class _Commands(TyperGroup):
    """The commands. What is said of an argument in the wrong place shows no password that it may have."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the arguments name."""
        try:
            return super().invoke(ctx)
        except _UsageError as error:
            usage = cast("Any", error)
            usage.message = _without_secrets(usage.message)
            raise


def _without_secrets(message: str) -> str:
    found = _ADDRESS.search(message)
    if found is None:
        return printable(message)
    return printable(message[: found.start()] + without_password(message[found.start() :]))


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="One prefix tree for a whole LLM inference cluster, kept in Redis. "
    "Exit codes: 0 done, 1 nothing found or damaged, 2 wrong input, 3 Redis does not answer.",
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
