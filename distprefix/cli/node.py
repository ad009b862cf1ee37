"""`distprefix node HASH`: one radix node, by any of its chunk hashes."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from distprefix.cli.common import (
    EXIT_MISS,
    EXIT_USAGE,
    Json,
    Namespace,
    Url,
    age,
    describe,
    errors,
    fail,
    names_text,
    opened,
    server_ms,
    show,
)
from distprefix.redis.inspect import NodeRecord, children_of, find_node
from distprefix.redis.keys import Keys
from distprefix.results import unpack_metadata

__all__ = ["node"]


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
        metadata = unpack_metadata(record.metadata)
        value = {**record.as_dict(), "key": keys.node(record.head), "children": children, "metadata": metadata}
        now_ms = server_ms(client)
        show(value, as_json=as_json, render=lambda: _table(record, keys.node(record.head), children, metadata, now_ms))


def _table(record: NodeRecord, key: str, children: list[str], metadata: object, now_ms: int) -> Table:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("key", key)
    table.add_row("chunks", f"{record.depth} to {record.depth + record.size - 1} ({record.size})")
    table.add_row("last chunk", record.last)
    table.add_row("parent chunk", record.parent or "none: a root")
    used = f"last {age(record.accessed_ms, now_ms)} ago, made {age(record.created_ms, now_ms)} ago"
    table.add_row("hits", f"{record.hits:,}, {used}")
    for name, (epoch, covered) in record.holders.items():
        table.add_row("holder", f"{name}: first {covered} of {record.size} chunks, epoch {epoch}")
    if metadata is not None:
        table.add_row("metadata", Text(str(metadata)))
    more = f" … {len(children) - 8:,} more" if len(children) > 8 else ""
    table.add_row("children", (" ".join(children[:8]) + more) or "none: a leaf")
    return table
