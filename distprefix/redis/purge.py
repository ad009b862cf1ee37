"""Removing whole namespaces: tree, payloads, workers, secret and descriptor, a bounded part with each call."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from distprefix.errors import NotAttachedError, ScriptError
from distprefix.operations import SCHEMA, drop
from distprefix.redis.client import Client, run
from distprefix.redis.keys import Keys
from distprefix.redis.registry import strike_out

__all__ = ["Purged", "purge", "purge_cold", "remove_namespace"]

_COUNT = 1000


@dataclass(frozen=True, slots=True)
class Purged:
    """What a purge removed."""

    nodes: int
    chunks: int
    keys: int
    """Beyond those of the tree."""


def purge(client: Client, namespace: str, deadline: float) -> Purged:
    """Remove a namespace with all its keys, whoever uses it; running processes attach anew with their next publish.

    Calls as `drop`, then one scan of the server's keys: a damaged tree, or one of another version, leaves nothing.
    Cold payloads on another server are not reached. Raises UnavailableError.
    """
    keys = Keys(namespace)
    nodes = chunks = 0
    # What is not there, or what this version's scripts cannot read, is left to the scan.
    with contextlib.suppress(NotAttachedError, ScriptError):
        nodes, chunks = run(drop(), client, keys.meta, deadline)
    removed = _remove_own(client, keys, deadline)
    removed += _unlink_all(client, _keys_of(client, keys, deadline), deadline)
    strike_out(client, namespace, deadline)
    return Purged(nodes, chunks, removed)


def purge_cold(client: Client, namespace: str, deadline: float) -> int:
    """Remove what a namespace has on the server of the cold tier. Returns the keys. One scan of that server's keys."""
    keys = Keys(namespace)
    return _unlink_all(client, _keys_of(client, keys, deadline), deadline)


def remove_namespace(client: Client, namespace: str, unused_since_ms: int | None, deadline: float) -> bool:
    """Remove a namespace, unless somebody has used it since then, by the server's clock. Whether it is gone.

    Calls as `drop`, and some for its workers; nodes that no root leads to stay. A process that begins to use it
    meanwhile attaches anew. Raises UnavailableError, SchemaError.
    """
    keys = Keys(namespace)
    since = "" if unused_since_ms is None else unused_since_ms
    try:
        used = _number(client.command("HGET", keys.meta, "used", deadline=deadline))
        if unused_since_ms is not None and used > unused_since_ms:
            return False
        run(drop(), client, keys.meta, deadline)
        _remove_own(client, keys, deadline)
        reply, *_ = client.call("erase", keys.meta, (SCHEMA, since), deadline)
        if not reply:
            return False
    except NotAttachedError:  # its tree was lost, or another process has just removed it
        _remove_own(client, keys, deadline)
    strike_out(client, namespace, deadline)
    return True


def _remove_own(client: Client, keys: Keys, deadline: float) -> int:
    """Remove what lies in no shard: first what would let a new process in, then what its workers said."""
    removed = int(client.command("UNLINK", keys.descriptor, deadline=deadline))
    removed += int(client.command("UNLINK", keys.secret, deadline=deadline))
    members = [member for member in _members(client, keys, deadline) if "*" not in member]
    removed += _unlink_all(client, (keys.member(member) for member in members), deadline)
    removed += _unlink_all(client, (keys.stream(member) for member in members), deadline)
    return removed + _unlink_all(client, keys.own, deadline)


def _members(client: Client, keys: Keys, deadline: float) -> Iterator[str]:
    cursor = b"0"
    while time.monotonic() < deadline:
        try:
            cursor, flat = client.command("HSCAN", keys.epochs, cursor, "COUNT", _COUNT, deadline=deadline)
        except ScriptError:  # another type
            return
        names: Any = flat if isinstance(flat, dict) else flat[::2]
        yield from [name.decode(errors="surrogateescape") for name in names]
        if cursor == b"0":
            return


def _keys_of(client: Client, keys: Keys, deadline: float) -> Iterator[str | bytes]:
    """Every key whose name is one of the namespace's, by a scan of the server."""
    cursor = b"0"
    while time.monotonic() < deadline:
        command = ("SCAN", cursor, "MATCH", keys.every, "COUNT", _COUNT)
        cursor, names = client.command(*command, deadline=deadline, reads=True)
        yield from [name for name in names if keys.owns(name)]
        if cursor == b"0":
            return


def _unlink_all(client: Client, names: Any, deadline: float) -> int:
    """Remove keys, one call for 500."""
    every = [name.encode(errors="surrogateescape") if isinstance(name, str) else name for name in names]
    removed = 0
    for at in range(0, len(every), 500):
        removed += int(client.command("UNLINK", *every[at : at + 500], deadline=deadline))
    return removed


def _number(value: Any) -> int:
    return int(value) if isinstance(value, bytes) and value.isdigit() and len(value) <= 18 else 0
