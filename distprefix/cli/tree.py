"""`distprefix tree`: the radix tree as a tree."""

from __future__ import annotations

from typing import Annotated, Any

import redis
import typer
from rich.markup import escape
from rich.tree import Tree

from distprefix.cli.common import EXIT_MISS, Json, Namespace, Url, age, errors, fail, opened, show
from distprefix.redis.inspect import NodeRecord, children_of, read_descriptor, read_node
from distprefix.redis.keys import Keys

__all__ = ["tree"]


def tree(
    url: Url = None,
    namespace: Namespace = "default",
    depth: Annotated[int, typer.Option(min=1, max=200, help="Levels to show.")] = 4,
    breadth: Annotated[int, typer.Option(min=1, max=10_000, help="Children to show, most hits first.")] = 8,
    as_json: Json = False,
) -> None:
    """Show the radix tree: runs, depth, holders, hits, age."""
    with errors(), opened(url) as (client, _):
        keys = Keys(namespace)
        if not read_descriptor(client, keys):
            fail(f"there is no namespace {namespace!r}", EXIT_MISS)
        found = _read(client, keys, "", depth, breadth)
        show(found, as_json=as_json, render=lambda: _draw(Tree(f"[bold]{escape(namespace)}[/]"), found))


def _read(client: redis.Redis, keys: Keys, last: str, depth: int, breadth: int) -> dict[str, Any]:
    heads = children_of(client, keys, last)
    records = [record for record in (read_node(client, keys, head) for head in heads) if record is not None]
    records.sort(key=lambda record: (-record.hits, -record.accessed_ms, record.head))
    shown = records[:breadth] if depth else []
    children = [_read(client, keys, record.last, depth - 1, breadth) | _own(record) for record in shown]
    return {"children": children, "not_shown": len(records) - len(shown)}


def _own(record: NodeRecord) -> dict[str, Any]:
    return record.as_dict()


def _draw(parent: Tree, found: dict[str, Any]) -> Tree:
    for child in found["children"]:
        stop = child["depth"] + child["chunks"]
        holders = ", ".join(f"{name} {held['chunks']}" for name, held in child["holders"].items()) or "nobody"
        label = (
            f"[cyan]{child['head'][:12]}[/] chunks {child['depth']}-{stop - 1} ({child['chunks']}) · "
            f"{escape(holders)} · {child['hits']} hits · {age(child['accessed_ms'])} ago"
        )
        _draw(parent.add(label), child)
    if found["not_shown"]:
        parent.add(f"[dim]… {found['not_shown']:,} more[/]")
    return parent
