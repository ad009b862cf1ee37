"""The namespaces of a server, for people: what each is for, what it holds, who uses it. Plain commands; reads only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import redis

from distprefix.redis.inspect import namespaces
from distprefix.redis.keys import Keys
from distprefix.redis.replies import clock_ms, count_of, text

__all__ = ["NamespaceSummary", "summarize_namespaces"]

_MAX_NODES = 64
_DESCRIPTOR = ("schema", "chunk_size", "identity", "created")
_META = ("nodes", "chunks", "bytes", "warm", "cold", "used")


@dataclass(frozen=True, slots=True)
class NamespaceSummary:
    """One namespace at a glance."""

    name: str
    identity: str
    """What its KV depends on, as `Identity.text` has it."""
    chunk_size: int
    """Tokens."""
    nodes: int
    chunks: int
    bytes: int
    """The tree and its warm payloads, by the tree's own estimate."""
    warm_bytes: int
    cold_bytes: int
    live_workers: int
    """Ranks that hold a lease which has not ended."""
    known_workers: int
    """Ranks that ever took an epoch."""
    last_used_ms: int | None
    """Since 1970; None for an empty tree."""
    created: str
    """As its first worker wrote it, in UTC."""


def summarize_namespaces(client: redis.Redis) -> list[NamespaceSummary]:
    """Every namespace of a server by name; keys that are no descriptors are passed over.

    One SCAN of the server and one TIME, then two round trips for each namespace with at most 134 commands. The last use
    is that of the 64 leaves that are evicted last and of the 64 nodes with most hits: with more leaves than that under
    a lease or kept as hot, it may be too early. Raises what redis-py raises.
    """
    names = namespaces(client)
    if not names:
        return []
    now_ms = clock_ms(client.time())
    summaries = (_summarize(client, name, now_ms) for name in names)
    return [summary for summary in summaries if summary is not None]


def _summarize(client: redis.Redis, name: str, now_ms: int) -> NamespaceSummary | None:
    keys = Keys(name)
    with client.pipeline(transaction=False) as batch:
        batch.hmget(keys.descriptor, *_DESCRIPTOR)
        batch.hmget(keys.meta, *_META)
        batch.hlen(keys.epochs)
        batch.zrange(keys.workers, f"({now_ms}", "+inf", byscore=True)  # pyright: ignore[reportArgumentType]
        batch.zrange(keys.leaves, 0, _MAX_NODES - 1, desc=True)
        batch.zrange(keys.hot, 0, _MAX_NODES - 1, desc=True)
        descriptor, meta, known, live, leaves, hot = batch.execute(raise_on_error=False)
    schema, chunk_size, identity, created = (text(value) for value in _items(descriptor, len(_DESCRIPTOR)))
    tokens = count_of(chunk_size.encode())
    if not schema or not tokens:
        return None
    nodes, chunks, held, warm, cold, used = (count_of(value) for value in _items(meta, len(_META)))
    heads = {text(head) for head in (*_items(leaves), *_items(hot))}
    return NamespaceSummary(
        name,
        identity,
        tokens,
        nodes,
        chunks,
        held,
        warm,
        cold,
        len(_items(live)),
        count_of(known),
        max(used, _last_used_ms(client, keys, sorted(heads)) or 0) or None,
        created,
    )


def _last_used_ms(client: redis.Redis, keys: Keys, heads: list[str]) -> int | None:
    """The newest last access of some nodes; None where none of them has one."""
    if not heads:
        return None
    with client.pipeline(transaction=False) as batch:
        for head in heads:
            batch.hget(keys.node(head), "a")
        accessed = batch.execute(raise_on_error=False)
    return max((count_of(value) for value in accessed), default=0) or None


def _items(reply: Any, length: int = 0) -> list[Any]:
    """A reply with several items; as many empty ones when it is an error, as that of a key of another type."""
    return reply if isinstance(reply, list) else [None] * length
