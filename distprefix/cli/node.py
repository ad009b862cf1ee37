"""`distprefix node HASH`: one radix node, by any of its chunk hashes."""

from __future__ import annotations

import re
from typing import Annotated, Any

import msgpack
import typer
from rich.table import Table

from distprefix.cli.common import (
    EXIT_MISS,
    EXIT_USAGE,
    Json,
    Namespace,
    Url,
    age,
    describe,
    errors,
    names_text,
    opened,
    server_ms,
)
from distprefix.cli.output import fail, show
from distprefix.printable import plain
from distprefix.redis.inspect import children_of, find_node
from distprefix.redis.keys import Keys

__all__ = ["node"]

_MAX_LEVELS = 32
"""Of metadata."""


def node(
    chunk_hash: Annotated[str, typer.Argument(metavar="HASH", help="A chunk hash (hex), or how a head begins.")],
    url: Url = None,
    namespace: Namespace = "default",
    as_json: Json = False,
) -> None:
    """Show the radix node that has a chunk: a head or a last chunk is found at once, others by a scan."""
    if not re.fullmatch(r"[0-9a-fA-F]{8,32}", chunk_hash):
        fail(f"{chunk_hash!r} is no chunk hash: it has 32 hex digits, or at least the first 8 of a head", EXIT_USAGE)
    with errors(), opened(url) as (client, _):
        keys = Keys(namespace)
        describe(client, namespace, private=url is None)
        record = find_node(client, keys, chunk_hash.lower())
        if record is None:
            there = f"namespaces of this server: {names_text(client)}"
            fail(f"no node of namespace {namespace!r} has chunk {chunk_hash}; {there}", EXIT_MISS)
        children = children_of(client, keys, record.last)
        value = {
            **record.as_dict(),
            "key": keys.node(record.head),
            "children": children,
            "metadata": _metadata(record.metadata),
        }
        now_ms = server_ms(client)
        show(value, as_json=as_json, render=lambda shown: _table(shown, now_ms))


def _metadata(packed: bytes) -> Any:
    """What a publisher told of the node; the bytes as text where they are no msgpack."""
    if not packed:
        return None
    try:
        return plain(msgpack.unpackb(packed), _MAX_LEVELS)
    except (ValueError, TypeError, RecursionError):
        return plain(packed)


def _table(value: dict[str, Any], now_ms: int) -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    chunks = value["chunks"]
    table.add_row("key", value["key"])
    table.add_row("chunks", f"{value['depth']} to {value['depth'] + chunks - 1} ({chunks})")
    table.add_row("last chunk", value["last"])
    table.add_row("parent chunk", value["parent"] or "none: a root")
    used = f"last {age(value['accessed_ms'], now_ms)} ago, made {age(value['created_ms'], now_ms)} ago"
    table.add_row("hits", f"{value['hits']:,}, {used}")
    for name, held in value["holders"].items():
        table.add_row("holder", f"{name}: first {held['chunks']} of {chunks} chunks, epoch {held['epoch']}")
    if value["unreadable_holders"]:
        table.add_row("unreadable", f"{value['unreadable_holders']:,} holders: their coverage is no number")
    if value["metadata"] is not None:
        table.add_row("metadata", str(value["metadata"]))
    children = value["children"]
    more = f" … {len(children) - 8:,} more" if len(children) > 8 else ""
    table.add_row("children", (" ".join(children[:8]) + more) or "none: a leaf")
    return table
