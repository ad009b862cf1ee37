"""`distprefix tree`: the radix tree as a tree."""

from __future__ import annotations

from typing import Annotated, Any

import redis
import typer
from rich.text import Text
from rich.tree import Tree

from distprefix.cli.common import (
    Json,
    Namespace,
    Url,
    age,
    describe,
    errors,
    holders_text,
    note_empty,
    opened,
    server_ms,
)
from distprefix.cli.output import show
from distprefix.redis.inspect import children_of, read_node, read_stats
from distprefix.redis.keys import Keys

__all__ = ["tree"]


def tree(
    url: Url = None,
    namespace: Namespace = "default",
    depth: Annotated[int, typer.Option(min=1, max=200, help="Levels to show.")] = 4,
    breadth: Annotated[int, typer.Option(min=1, max=10_000, help="Children to show, most hits first.")] = 8,
    as_json: Json = False,
) -> None:
    """Show the radix tree: runs, depth, holders (with what they lack), hits of a node and what follows it, age."""
    with errors(), opened(url) as (client, _):
        keys = Keys(namespace)
        describe(client, namespace, private=url is None)
        epochs = read_stats(client, keys)["workers"]
        found = _read(client, keys, "", depth, breadth, set())
        now_ms = server_ms(client)
        show(found, as_json=as_json, render=lambda shown: _draw(Tree(namespace), shown, epochs, now_ms))
        if not found["children"]:
            note_empty(client, namespace, "an empty tree")


def _read(client: redis.Redis, keys: Keys, last: str, depth: int, breadth: int, seen: set[str]) -> dict[str, Any]:
    """The children of a node. Each node is followed once: damaged ones may name each other."""
    heads = [head for head in children_of(client, keys, last) if head not in seen]
    if not depth:
        return {"children": [], "not_shown": len(heads)}
    records = [record for record in (read_node(client, keys, head) for head in heads) if record is not None]
    records.sort(key=lambda record: (-record.hits, -record.accessed_ms, record.head))
    shown = records[:breadth]
    seen.update(record.head for record in shown)
    children = [_read(client, keys, record.last, depth - 1, breadth, seen) | record.as_dict() for record in shown]
    return {"children": children, "not_shown": len(records) - len(shown)}


def _draw(parent: Tree, found: dict[str, Any], epochs: dict[str, int], now_ms: int) -> Tree:
    for child in found["children"]:
        first, size = child["depth"], child["chunks"]
        held = {name: (holder["epoch"], holder["chunks"]) for name, holder in child["holders"].items()}
        label = Text.assemble(
            (child["head"][:12], "cyan"),
            f" chunks {first}-{first + size - 1} ({size}) · {holders_text(held, size, epochs)}",
            f" · {child['hits']} hits · {age(child['accessed_ms'], now_ms)} ago",
        )
        _draw(parent.add(label), child, epochs, now_ms)
    if found["not_shown"]:
        parent.add(Text(f"… {found['not_shown']:,} more", "dim"))
    return parent
