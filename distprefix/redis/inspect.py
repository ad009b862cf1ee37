"""Reading the shared tree for people: plain commands, no scripts, nothing is changed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import redis

from distprefix.redis.keys import NAMESPACES, Keys
from distprefix.redis.metrics import read_metrics
from distprefix.redis.replies import count_of, is_chunk_name, pairs

__all__ = ["NodeRecord", "children_of", "find_node", "namespaces", "read_descriptor", "read_node", "read_stats"]

_NAME = re.compile(rb"[A-Za-z0-9._-]{1,64}")


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
        }


def namespaces(client: redis.Redis) -> list[str]:
    """Names of the namespaces on a server. One SCAN of its keys; what cannot name a namespace is passed over."""
    prefix = NAMESPACES.removesuffix("*").encode()
    names = {name.removeprefix(prefix) for name in client.scan_iter(match=NAMESPACES, count=1000, _type="hash")}
    return sorted(name.decode() for name in names if _NAME.fullmatch(name))


def read_descriptor(client: redis.Redis, keys: Keys) -> dict[str, str]:
    """What the namespace was made with; empty when there is none."""
    fields = _hash(client, keys.descriptor)
    return {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}


def read_node(client: redis.Redis, keys: Keys, head: str) -> NodeRecord | None:
    """The node with this head; None when it is not there or is no node."""
    fields = _hash(client, keys.node(head))
    if not fields.get(b"r"):
        return None
    holders: dict[str, tuple[int, int]] = {}
    for name, value in fields.items():
        epoch, _, covered = value.partition(b":")
        if name.startswith(b"h:") and count_of(covered):
            holders[name[2:].decode(errors="replace")] = (count_of(epoch), count_of(covered))
    return NodeRecord(
        head,
        fields.get(b"p", b"").decode(errors="replace"),
        count_of(fields.get(b"d")),
        fields[b"r"],
        count_of(fields.get(b"a")),
        count_of(fields.get(b"n")),
        count_of(fields.get(b"c")),
        holders,
        fields.get(b"m", b""),
    )


def children_of(client: redis.Redis, keys: Keys, last: str) -> list[str]:
    """Heads of the children of the node whose last chunk is `last`; of the roots for ""."""
    names = _hash(client, keys.junction(last))
    return sorted(name.decode() for name in names if is_chunk_name(name))


def find_node(client: redis.Redis, keys: Keys, chunk: str) -> NodeRecord | None:
    """The node that has this chunk: by its head, by its last chunk, else by looking through all nodes.

    Fewer than 32 digits are the beginning of a head; None when several begin so.
    """
    if len(chunk) < 32:
        names = client.scan_iter(match=keys.node(f"{chunk}*"), count=1000)
        heads = {name.decode(errors="replace").rpartition(":")[2] for name in names}
        return read_node(client, keys, heads.pop()) if len(heads) == 1 else None
    node = read_node(client, keys, chunk)
    owner = _hash(client, keys.junction(chunk)).get(b"o") if node is None else None
    if owner:
        return read_node(client, keys, owner.decode(errors="replace"))
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
    """Counts, workers and memory of a namespace."""
    meta = _hash(client, keys.meta)
    memory: Any = client.info("memory")
    server: Any = client.info("server")
    nodes, chunks = count_of(meta.get(b"nodes")), count_of(meta.get(b"chunks"))
    return {
        "nodes": nodes,
        "chunks": chunks,
        "mean_run": round(chunks / nodes, 1) if nodes else 0.0,
        "roots": len(children_of(client, keys, "")),
        "leaves": _members(client, keys.leaves),
        "bytes": count_of(meta.get(b"bytes")),
        "warm_bytes": count_of(meta.get(b"warm")),
        "cold_bytes": count_of(meta.get(b"cold")),
        "log": count_of(meta.get(b"log")),
        "hot": _members(client, keys.hot),
        "live": read_metrics(client, keys),
        "workers": {
            name.decode(errors="replace"): count_of(epoch) for name, epoch in sorted(_hash(client, keys.epochs).items())
        },
        "descriptor": read_descriptor(client, keys),
        "server": (server.get("valkey_version") and f"Valkey {server['valkey_version']}")
        or f"Redis {server['redis_version']}",
        "used_memory": int(memory["used_memory"]),
        "maxmemory": int(memory.get("maxmemory", 0)),
    }


def _all_nodes(client: redis.Redis, keys: Keys) -> Iterator[NodeRecord]:
    for name in client.scan_iter(match=keys.node("*"), count=1000):
        record = read_node(client, keys, name.decode(errors="replace").rpartition(":")[2])
        if record is not None:
            yield record


def _hash(client: redis.Redis, name: str) -> dict[bytes, bytes]:
    try:
        reply: Any = client.execute_command("HGETALL", name)
    except redis.ResponseError:
        return {}
    return pairs(reply)


def _members(client: redis.Redis, name: str) -> int:
    """How many members a sorted set has; 0 for what is none."""
    try:
        return int(client.zcard(name))
    except redis.ResponseError:
        return 0
