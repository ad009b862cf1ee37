"""`distprefix lookup`: who holds the longest prefix of a prompt. Takes no epoch and changes nothing."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import redis
import typer
from rich.table import Table

from distprefix.chunking import prompt_extras, read_prompt
from distprefix.cli.common import EXIT_MISS, Json, Namespace, Url, describe, errors, note_empty, opened
from distprefix.cli.output import show
from distprefix.config import PrefixCacheConfig, settings_of_environment
from distprefix.errors import InvalidInputError
from distprefix.l1 import L1
from distprefix.operations import walk
from distprefix.redis.client import Client, run
from distprefix.redis.keys import Keys
from distprefix.redis.namespace import read_hasher
from distprefix.redis.roster import read_roster
from distprefix.roster import Roster
from distprefix.secret_files import read_secret

__all__ = ["lookup"]


def lookup(
    source: Annotated[str, typer.Argument(metavar="FILE", help="Token ids as text or JSON; - is standard input.")],
    url: Url = None,
    namespace: Namespace = "default",
    salt: Annotated[str, typer.Option(envvar="DISTPREFIX_SALT", help="The namespace's salt, if it has one.")] = "",
    salt_file: Annotated[
        Path | None, typer.Option(envvar="DISTPREFIX_SALT_FILE", help="A file that holds it: `ps` shows options.")
    ] = None,
    lora_name: Annotated[str, typer.Option(help="The LoRA that the prompt is for, as the engine calls it.")] = "",
    cache_salt: Annotated[str, typer.Option(help="The request's cache salt.")] = "",
    cache_salt_file: Annotated[Path | None, typer.Option(help="A file that holds it.")] = None,
    as_json: Json = False,
) -> None:
    """Look a prompt up: matched tokens and who holds them. Exit code 1 when nobody does."""
    with errors():
        salt = _secret_of(salt, salt_file, "--salt")
        cache_salt = _secret_of(cache_salt, cache_salt_file, "--cache-salt")
        tokens = _read_tokens(source)
        with opened(url) as (client, _):
            keys = Keys(namespace)
            settings = describe(client, namespace, private=url is None)
            given = settings_of_environment(only=("secret", "salt", "request_salt"))
            if salt:
                given["salt"] = salt
            config = PrefixCacheConfig.from_descriptor(namespace, settings, given)
            value = _look_up(client, keys, settings, tokens, config, prompt_extras(lora_name, cache_salt))
            if not value["hit"]:
                note_empty(client, namespace, "nothing of this prompt")
        show(value, as_json=as_json, render=_table)
        if not value["hit"]:
            raise typer.Exit(EXIT_MISS)


def _secret_of(value: str, path: Path | None, option: str) -> str:
    """A secret as an option has it, else from its file."""
    return value if value or path is None else read_secret(path, f"{option}-file")


def _read_tokens(source: str) -> list[int]:
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{source} cannot be read: {error}") from error
    words = [word for word in re.split(r"[\s,\[\]]+", text) if word]
    for i, word in enumerate(words):
        if not re.fullmatch(r"-?\d+", word):
            raise InvalidInputError(f"token {i} in {source} is {word!r}: token ids are whole numbers")
    if not words:
        raise InvalidInputError(f"{'standard input' if source == '-' else source} has no tokens")
    return [int(word) for word in words]


def _look_up(
    client: redis.Redis,
    keys: Keys,
    settings: dict[str, str],
    tokens: list[int],
    config: PrefixCacheConfig,
    extras: dict[int, bytes],
) -> dict[str, Any]:
    chunk_size = config.chunk_size
    calls = Client(client)
    deadline = time.monotonic() + 5
    hasher = read_hasher(calls, keys, config, settings, deadline)
    prompt = read_prompt(tokens, chunk_size)
    chain = hasher.chain(hasher.root, prompt.view, prompt.stride, extras)
    views = run(walk(chain, 0), calls, keys.meta, deadline) if chain else []
    roster = Roster()
    roster.update(read_roster(calls, keys, "", deadline), time.monotonic())
    local = L1(chunk_size, config.max_run, 1 << 40, 60.0, 1)
    local.learn(prompt, chain, 0, views, 0.0)
    found = local.find(prompt, 0.0)
    coverage = local.coverage(
        found.path, found.chunks, lambda name, epoch: roster.is_live(name, epoch, time.monotonic())
    )
    matched = max(coverage.values(), default=0)
    return {
        "hit": matched > 0,
        "tokens": prompt.length,
        "matched_tokens": matched * chunk_size,
        "matched_chunks": matched,
        "prefix_hash": chain[16 * matched - 16 : 16 * matched].hex(),
        "holders": {name: chunks * chunk_size for name, chunks in sorted(coverage.items(), key=lambda item: -item[1])},
    }


def _table(value: dict[str, Any]) -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row(
        "matched", f"{value['matched_tokens']:,} of {value['tokens']:,} tokens ({value['matched_chunks']:,} chunks)"
    )
    table.add_row("prefix", value["prefix_hash"] or "none")
    for name, held in value["holders"].items():
        table.add_row("holder", f"{name}: first {held:,} tokens")
    return table
