"""What the commands share: options, exit codes, output, reading a namespace's settings."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Generator
from typing import Annotated, Any, NoReturn

import redis
import typer
from redis.exceptions import NoPermissionError

from distprefix.cli.output import fail, note
from distprefix.errors import (
    ConfigError,
    DistPrefixError,
    InvalidInputError,
    NamespaceError,
    ScriptError,
    ScriptsMissingError,
    TraceError,
    UnavailableError,
)
from distprefix.redis.address import embedded_name, parse_address
from distprefix.redis.connections import connect
from distprefix.redis.embedded import EmbeddedServer
from distprefix.redis.inspect import namespaces, read_descriptor
from distprefix.redis.keys import Keys
from distprefix.redis.proof import prove
from distprefix.redis.replies import clock_ms, count_of
from distprefix.secret_files import read_secret
from distprefix.tiers.codecs import codec_named

__all__ = [
    "EXIT_MISS",
    "EXIT_UNAVAILABLE",
    "EXIT_USAGE",
    "ColdUrl",
    "Json",
    "Namespace",
    "Url",
    "absent",
    "age",
    "cold_tier",
    "describe",
    "errors",
    "holders_text",
    "names_text",
    "new_server_hint",
    "note_empty",
    "opened",
    "server_ms",
    "size",
]

EXIT_MISS, EXIT_USAGE, EXIT_UNAVAILABLE = 1, 2, 3
_MAX_NAMES = 8
_TIMEOUT_S = 5.0
_BOUNDS = (("chunk_size", 65_536), ("max_run", 256))
"""Numbers that every descriptor has, from 1 to these."""


def _read_url(parameter: typer.CallbackParam, value: str | None) -> str | None:
    """The URL, from the file that @FILE names, or DISTPREFIX_..._FILE in the environment where no value is given."""
    option = parameter.opts[0]
    if value is None:
        path = os.environ.get(f"DISTPREFIX_{option.strip('-').replace('-', '_').upper()}_FILE")
    else:
        path = value[1:] if value.startswith("@") else None
    if path is None:
        return value
    with errors():
        return read_secret(path, option)


Url = Annotated[
    str | None,
    typer.Option(
        envvar="DISTPREFIX_URL",
        callback=_read_url,
        help="redis://, rediss://, valkey://, unix://, embedded://NAME, or @FILE that holds it, as `ps` shows options; "
        "default: a private server.",
    ),
]
Namespace = Annotated[str, typer.Option(envvar="DISTPREFIX_NAMESPACE", help="The namespace.")]
ColdUrl = Annotated[
    str | None,
    typer.Option(
        envvar="DISTPREFIX_COLD_URL",
        callback=_read_url,
        help="Where cold payloads lie, or @FILE that holds it; default: on the same server.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value and nothing else.")]


@contextlib.contextmanager
def errors() -> Generator[None]:
    """Turn our exceptions into a line and an exit code: 1 where data in Redis cannot be used, 2 for wrong input.

    3 is for a Redis that does not answer, or refuses us.
    """
    try:
        yield
    except (ConfigError, InvalidInputError, TraceError) as error:
        fail(str(error), EXIT_USAGE)
    except ScriptsMissingError as error:
        fail(str(error), EXIT_UNAVAILABLE)
    except (NamespaceError, ScriptError, redis.ResponseError) as error:
        is_refused = isinstance(error, NoPermissionError) or "NOPERM" in str(error)
        fail(str(error), EXIT_UNAVAILABLE if is_refused else EXIT_MISS)
    except (UnavailableError, redis.ConnectionError, redis.TimeoutError) as error:
        fail(f"Redis does not answer: {error}", EXIT_UNAVAILABLE)
    except (DistPrefixError, redis.RedisError) as error:
        fail(str(error), EXIT_UNAVAILABLE)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(0) from None


@contextlib.contextmanager
def opened(url: str | None) -> Generator[tuple[redis.Redis, str]]:
    """A client on the server that `--url` names, or on a private one; and its url."""
    server = None
    name = "" if url is None else embedded_name(url)
    if url is None or name is not None:
        server = EmbeddedServer(name or "")
        url = server.url
    address = parse_address(url)
    if server is None:
        prove(address, _TIMEOUT_S, "url")
    client = connect(address, _TIMEOUT_S)
    try:
        client.ping()
        yield client, url
    finally:
        client.close()
        if server is not None:
            server.close()


def cold_tier(cold_url: str | None) -> dict[str, Any]:
    """Settings for cold payloads: compressed, where a library for that is installed."""
    settings: dict[str, Any] = {"cold_url": cold_url} if cold_url else {}
    try:
        codec_named("zstd")
    except ConfigError:
        settings["cold_codec"] = "raw"
    return settings


def holders_text(holders: dict[str, tuple[int, int]], size: int, epochs: dict[str, int]) -> str:
    """A node's first three holders by name; those of an older epoch, which no longer count, are marked."""
    parts: list[str] = []
    for name, (epoch, covered) in list(holders.items())[:3]:
        member = name.partition("@")[0]
        part = name if covered == size else f"{name} first {covered}"
        parts.append(f"{part} (old)" if member and epoch < epochs.get(member, 0) else part)
    more = f" +{len(holders) - 3:,}" if len(holders) > 3 else ""
    return (", ".join(parts) or "nobody") + more


def describe(client: redis.Redis, namespace: str, *, private: bool) -> dict[str, str]:
    """What the namespace was made with; ends the command where it is not there, and says which namespaces there are."""
    keys = Keys(namespace)
    found = read_descriptor(client, keys)
    if not found:
        absent(client, namespace, private=private)
    is_whole = all(found.get(name) for name in ("schema", "hash_algorithm", "key_check"))
    if not is_whole or not all(_is_within(found.get(name, ""), most) for name, most in _BOUNDS):
        fail(f"{keys.descriptor} describes no namespace; there are: {names_text(client)}", EXIT_MISS)
    return found


def _is_within(number: str, most: int) -> bool:
    return 0 < count_of(number.encode()) <= most


def absent(client: redis.Redis, namespace: str, *, private: bool) -> NoReturn:
    """Say that there is no such namespace, which there are, and that a private server is a new one."""
    there = f"there are: {names_text(client)}{new_server_hint(private=private)}"
    fail(f"there is no namespace {namespace!r}; {there}", EXIT_MISS)


def names_text(client: redis.Redis) -> str:
    """The first namespaces of a server by name, and how to list all of them. One SCAN of the server."""
    try:
        names = namespaces(client)
    except NoPermissionError:
        return "those that this user may use, and it may not list them"
    more = f" and {len(names) - _MAX_NAMES:,} more, see `distprefix namespaces`" if len(names) > _MAX_NAMES else ""
    return (", ".join(names[:_MAX_NAMES]) or "none") + more


def new_server_hint(*, private: bool) -> str:
    """What to do where the command started a server of its own."""
    return "; this is a new private server, name yours with --url or DISTPREFIX_URL" if private else ""


def note_empty(client: redis.Redis, namespace: str, what: str) -> None:
    """Say on standard error what the namespace does not have, and which namespaces there are."""
    note(f"namespace {namespace!r} has {what}; namespaces of this server: {names_text(client)}")


def size(count: float) -> str:
    """Bytes, in words of one unit."""
    for unit, one in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= one:
            return f"{count / one:,.1f} {unit}"
    return f"{count:,.0f} B"


def server_ms(client: redis.Redis) -> int:
    """The server's clock, in ms: what is dated there is compared with it. One call."""
    return clock_ms(client.time())


def age(milliseconds: int, now_ms: int) -> str:
    """How long ago, in words of one unit, by the clock that dated it."""
    seconds = max(0.0, (now_ms - milliseconds) / 1000)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
