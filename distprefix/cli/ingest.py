"""`distprefix ingest`: follow engines' KV events into a namespace."""

from __future__ import annotations

import gc
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import redis
import typer
from rich.table import Table
from rich.text import Text

from distprefix.cli.common import EXIT_USAGE, Json, Namespace, Url, errors, opened
from distprefix.cli.output import fail, show
from distprefix.config import PrefixCacheConfig, settings_of_environment
from distprefix.errors import ConfigError
from distprefix.events.pace import Pace
from distprefix.redis.inspect import read_descriptor
from distprefix.redis.keys import Keys

__all__ = ["ingest"]

_MIB = 1 << 20
_STATE_CHANGES = (20, 0.1)
"""Reports of changed states at once, and per second."""


def ingest(
    engine: Annotated[
        list[str] | None, typer.Option(help="Where an engine publishes: tcp://host:port. May be given again.")
    ] = None,
    replay: Annotated[
        list[str] | None, typer.Option(help="Where it answers for what was missed, in the order of --engine.")
    ] = None,
    worker: Annotated[list[str] | None, typer.Option(help="What it is called, in the order of --engine.")] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Data-parallel ranks of each engine: its ports count up.")] = 1,
    rank: Annotated[
        list[int] | None, typer.Option(min=0, help="The one rank that each publishes, in the order of --engine.")
    ] = None,
    url: Url = None,
    namespace: Namespace = "default",
    chunk_size: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a chunk of a new namespace; default 16.")
    ] = None,
    kind: Annotated[str, typer.Option(help="auto, vllm or sglang.")] = "auto",
    no_extra_keys: Annotated[
        bool,
        typer.Option("--no-extra-keys", help="What engines do not tell of blocks is nothing: no salts, no images."),
    ] = False,
    model: Annotated[str, typer.Option(help="What they serve: one model in a namespace.")] = "",
    same_model: Annotated[
        bool, typer.Option("--same-model", help="Other models named in the namespace are this one by another name.")
    ] = False,
    address: Annotated[list[str] | None, typer.Option(help="Where they take requests, in order.")] = None,
    topic: Annotated[str, typer.Option(help="Only messages whose topic begins so.")] = "",
    lease: Annotated[float, typer.Option(min=3, help="Seconds a worker counts after it was last heard of.")] = 10.0,
    engine_chains: Annotated[
        bool, typer.Option("--engine-chains", help="The engine's own hashes (16 bytes and more) name the chunks.")
    ] = False,
    file: Annotated[Path | None, typer.Option(help="Messages from a file instead: JSON lines, or - for input.")] = None,
    message_mib: Annotated[int, typer.Option(min=1, max=64, help="MiB in one message of an engine.")] = 32,
    queue_mib: Annotated[int, typer.Option(min=1, help="MiB of an engine's messages that may wait.")] = 256,
    blocks_mib: Annotated[int, typer.Option(min=1, help="MiB of hashes and tokens kept of an engine's blocks.")] = 256,
    every: Annotated[float, typer.Option(min=0.2, help="Seconds between two lines about how it goes.")] = 10.0,
    as_json: Json = False,
) -> None:
    """Follow engines' KV events into a namespace until stopped, so that everybody knows who holds what."""
    with errors():
        try:
            from distprefix.cli.following import engines_of, follow_file  # noqa: PLC0415 - optional dependency
            from distprefix.events.ingester import Engine, Ingester  # noqa: PLC0415
            from distprefix.events.limits import EngineLimits  # noqa: PLC0415
        except ModuleNotFoundError as error:
            if error.name != "zmq":
                raise
            fail("following engines needs pyzmq: pip install 'distprefix[events]'", EXIT_USAGE)
        with opened(url) as (client, where):
            config = _settings(client, where, namespace, chunk_size)
            limits = EngineLimits(
                message_bytes=message_mib * _MIB, queue_bytes=queue_mib * _MIB, held_bytes=blocks_mib * _MIB
            )
            if file is not None:
                name = (worker or ["engine"])[0]
                named = Engine(worker=name, endpoint=str(file), kind=kind, is_plain=no_extra_keys, model=model)
                value = follow_file(file, named, config, client, engine_chains=engine_chains, limits=limits)
                show(value, as_json=as_json, render=lambda shown: _table([shown]))
                return
            engines = engines_of(
                *(engine or [], replay or [], worker or [], address or []),
                ranks=ranks,
                own_ranks=rank or [],
                common={"kind": kind, "is_plain": no_extra_keys, "model": model, "topic": topic},
            )
            gc.set_threshold(100_000, 50, 100)  # blocks live long: looking through all of them often finds nothing
            stop = threading.Event()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, lambda *_: stop.set())  # pyright: ignore[reportUnknownLambdaType]
            settings: dict[str, Any] = {"lease_s": lease, "engine_chains": engine_chains, "limits": limits}
            settings["same_model"] = same_model
            with Ingester(config, engines, client=client, **settings) as running:
                _report(running, stop, every, as_json=as_json)


def _settings(client: redis.Redis, url: str, namespace: str, chunk_size: int | None) -> PrefixCacheConfig:
    """Those that the namespace was made with, else those of the environment."""
    found = read_descriptor(client, Keys(namespace))
    settings: dict[str, Any] = {"url": url}
    if chunk_size is not None:
        if found and found.get("chunk_size") != str(chunk_size):
            raise ConfigError(f"chunk_size is {chunk_size}: the namespace {namespace!r} has {found.get('chunk_size')}")
        settings["chunk_size"] = chunk_size
    return PrefixCacheConfig.from_descriptor(namespace, found, settings_of_environment(), **settings)


def _report(running: Any, stop: threading.Event, every: float, *, as_json: bool) -> None:
    """Say how it goes: soon after the start, when a state changes, and every so often.

    An engine that comes and goes all the time is not written about each time.
    """
    told: list[str] = []
    due = 0.0
    changes = Pace(*_STATE_CHANGES)
    while True:
        now = time.monotonic()
        states = [stream.state for stream in running.streams]
        if now >= due or (states != told and changes.take()):
            told = states
            due = now + every
            status = [stream.status() for stream in running.streams]
            show(status, as_json=as_json, render=_table)
            sys.stdout.flush()
        if stop.wait(0.2):
            return


def _table(status: list[dict[str, Any]]) -> Table:
    table = Table(show_header=True)
    for name in ("worker", "state", "sequence", "chunks held", "behind", "counts"):
        table.add_column(name, overflow="fold")
    for one in status:
        chunks = ", ".join(f"{count:,} {medium}" for medium, count in sorted(one["chunks"].items())) or "none"
        counts = ", ".join(f"{name} {count:,}" for name, count in one["counts"].items() if count)
        sequence = "none" if one["sequence"] is None else f"{one['sequence']:,}"
        name = f"{one['worker']}/{one['rank']}"
        table.add_row(*map(Text, (name, one["state"], sequence, chunks, f"{one['lag_s']:.1f} s", counts)))
    return table
