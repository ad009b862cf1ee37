"""Reading the shared tree for people: plain commands, no scripts, nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import redis

from distprefix.redis.keys import NAMESPACES, Keys
from distprefix.redis.metrics import read_metrics
from distprefix.redis.replies import count_of, is_wrong_type, pairs, text

__all__ = ["NodeRecord", "children_of", "find_node", "namespaces", "read_descriptor", "read_node", "read_stats"]

_NAME = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_HASH = re.compile(rb"[0-9a-f]{32}")


class NodeRecord(NamedTuple):
    """A radix node as it lies in Redis."""

    head: str
    parent: str
    """Hash of the chunk before the head; empty for a root."""
    depth: int
    run: bytes
    accessed_ms: int
    hits: int
    created_ms: int
    holders: dict[str, tuple[int, int]]
    """Holder to (epoch, leading chunks covered)."""
    metadata: bytes
    unreadable: int
    """Holders whose coverage is no pair of numbers: they are left out."""

    @property
    def size(self) -> int:
        """Chunks in the run."""
        return len(self.run) // 16

    @property
    def last(self) -> str:
        """Hash of the last chunk: names the whole prefix, and the junction of the children."""
        return self.run[-16:].hex()

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "head": self.head,
            "parent": self.parent,
            "depth": self.depth,
            "chunks": self.size,
            "last": self.last,
            "hits": self.hits,
            "accessed_ms": self.accessed_ms,
            "created_ms": self.created_ms,
            "holders": {name: {"epoch": epoch, "chunks": k} for name, (epoch, k) in self.holders.items()},
            "unreadable_holders": self.unreadable,
        }


def namespaces(client: redis.Redis) -> list[str]:
    """Names of the namespaces on a server. One SCAN of its keys; what cannot name a namespace is passed over."""
    prefix = NAMESPACES.removesuffix("*").encode()
    names = {name.removeprefix(prefix) for name in client.scan_iter(match=NAMESPACES, count=1000, _type="hash")}
    return sorted(name.decode() for name in names if _NAME.fullmatch(name))


def read_descriptor(client: redis.Redis, keys: Keys) -> dict[str, str]:
    """What the namespace was made with; empty when there is none."""
    return {text(name): text(value) for name, value in _hash(client, keys.descriptor).items()}


def read_node(client: redis.Redis, keys: Keys, head: str) -> NodeRecord | None:
    """The node with this head; None when it is not there or is no node."""
    fields = _hash(client, keys.node(head))
    if not fields.get(b"r"):
        return None
    holders: dict[str, tuple[int, int]] = {}
    unreadable = 0
    for name, value in fields.items():
        if name.startswith(b"h:"):
            epoch, _, covered = value.partition(b":")
            if count_of(covered):
                holders[text(name[2:])] = (count_of(epoch), count_of(covered))
            else:
                unreadable += 1
    return NodeRecord(
        head,
        text(fields.get(b"p")),
        count_of(fields.get(b"d")),
        fields[b"r"],
        count_of(fields.get(b"a")),
        count_of(fields.get(b"n")),
        count_of(fields.get(b"c")),
        holders,
        fields.get(b"m", b""),
        unreadable,
    )


def children_of(client: redis.Redis, keys: Keys, last: str) -> list[str]:
    """Heads of the children of the node whose last chunk is `last`; of the roots for "". Other names are left out."""
    return sorted(name.decode() for name in _hash(client, keys.junction(last)) if _HASH.fullmatch(name))


def find_node(client: redis.Redis, keys: Keys, chunk: str) -> NodeRecord | None:
    """The node that has this chunk: by its head, by its last chunk, else by looking through all nodes.

    Fewer than 32 digits are the beginning of a head; None when several begin so.
    """
    if len(chunk) < 32:
        names = client.scan_iter(match=keys.node(f"{chunk}*"), count=1000)
        heads = {head for name in names if (head := _head_of(name))}
        return read_node(client, keys, heads.pop()) if len(heads) == 1 else None
    node = read_node(client, keys, chunk)
    owner = _hash(client, keys.junction(chunk)).get(b"o") if node is None else None
    if owner and _HASH.fullmatch(owner):
        return read_node(client, keys, owner.decode())
    if node is not None:
        return node
    wanted = bytes.fromhex(chunk)
    for record in _all_nodes(client, keys):
        at = record.run.find(wanted)
        while at >= 0 and at % 16:
            at = record.run.find(wanted, at + 1)
        if at >= 0:
            return record
    return None


def read_stats(client: redis.Redis, keys: Keys) -> dict[str, Any]:
    """Counts, workers and memory of a namespace. A key of another type counts as empty and is named in `unreadable`."""
    unreadable: list[str] = []
    meta = _hash(client, keys.meta, unreadable)
    memory: Any = client.info("memory")
    server: Any = client.info("server")
    nodes = count_of(meta.get(b"nodes"))
    chunks = count_of(meta.get(b"chunks"))
    roots = [name for name in _hash(client, keys.junction(""), unreadable) if _HASH.fullmatch(name)]
    epochs = _hash(client, keys.epochs, unreadable)
    return {
        "nodes": nodes,
        "chunks": chunks,
        "mean_run": round(chunks / nodes, 1) if nodes else 0.0,
        "roots": len(roots),
        "leaves": _members(client, keys.leaves, unreadable),
        "bytes": count_of(meta.get(b"bytes")),
        "warm_bytes": count_of(meta.get(b"warm")),
        "cold_bytes": count_of(meta.get(b"cold")),
        "log": count_of(meta.get(b"log")),
        "hot": _members(client, keys.hot, unreadable),
        "live": read_metrics(client, keys),
        "workers": {text(name): count_of(epoch) for name, epoch in sorted(epochs.items())},
        "descriptor": read_descriptor(client, keys),
        "server": _server_name(server),
        "used_memory": count_of(memory.get("used_memory")),
        "maxmemory": count_of(memory.get("maxmemory")),
        "unreadable": unreadable,
    }


def _server_name(server: Any) -> str:
    if server.get("valkey_version"):
        return f"Valkey {server['valkey_version']}"
    return f"Redis {server.get('redis_version', 'of an unknown version')}"


def _members(client: redis.Redis, name: str, unreadable: list[str]) -> int:
    """How many members a sorted set has."""
    try:
        return count_of(client.zcard(name))
    except redis.ResponseError as error:
        if not is_wrong_type(error):
            raise
        unreadable.append(name)
        return 0


def _head_of(name: bytes) -> str | None:
    """The head in the name of a node's key; None where it has none."""
    head = name.rpartition(b":")[2]
    return head.decode() if _HASH.fullmatch(head) else None


def _all_nodes(client: redis.Redis, keys: Keys) -> Iterator[NodeRecord]:
    for name in client.scan_iter(match=keys.node("*"), count=1000):
        head = _head_of(name)
        record = None if head is None else read_node(client, keys, head)
        if record is not None:
            yield record


def _hash(client: redis.Redis, name: str, unreadable: list[str] | None = None) -> dict[bytes, bytes]:
    """The fields of a hash; none, and its name in `unreadable`, where the key has another type."""
    try:
        reply: Any = client.execute_command("HGETALL", name)
    except redis.ResponseError as error:
        if not is_wrong_type(error):
            raise
        if unreadable is not None:
            unreadable.append(name)
        return {}
    return pairs(reply)
