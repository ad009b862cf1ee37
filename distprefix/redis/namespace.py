"""Attaching to a namespace: its descriptor and the shard's meta."""

from __future__ import annotations

import hashlib
import time
from typing import Any, NamedTuple

from distprefix.config import PrefixCacheConfig
from distprefix.errors import NamespaceError, ScriptError
from distprefix.operations import SCHEMA
from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.redis.replies import pairs, text

__all__ = ["Attached", "attach", "salt_check"]


def salt_check(root: bytes) -> str:
    """Eight hex digits that tell two salts apart without storing either."""
    return hashlib.sha256(b"salt check" + root).hexdigest()[:8]


def descriptor_of(config: PrefixCacheConfig) -> dict[str, str]:
    """What all who share a namespace must agree on. The salt itself is not stored, only a check of it."""
    return {
        "schema": SCHEMA.decode(),
        "chunk_size": str(config.chunk_size),
        "hash_algorithm": config.hash_algorithm,
        "max_run": str(config.max_run),
        "shards": str(config.shards),
        "policy": config.policy,
        "fingerprint": config.fingerprint,
        "salt_check": salt_check(config.root),
    }


class Attached(NamedTuple):
    """What a namespace was when a process attached to it."""

    cold_is_elsewhere: bool
    """Whether its cold payloads are on another server."""
    generation: bytes
    """Tells the shard from another one of the same name, and from what it was before a restore."""


def attach(client: Client, keys: Keys, config: PrefixCacheConfig, deadline: float) -> Attached:
    """Make the namespace, or compare with what it was made with. Two script calls.

    Raises NamespaceError and names every difference.
    """
    wanted = descriptor_of(config)
    fields: list[str] = [part for pair in wanted.items() for part in pair]
    fields += ["created", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())]
    try:
        found = _texts(client.call("attach", keys.descriptor, tuple(fields), deadline))
    except ScriptError as error:
        raise NamespaceError(f"{keys.descriptor} cannot be read: {error}") from error
    differences = [
        f"{name} is {found.get(name, 'missing')!r} there and {value!r} here"
        for name, value in wanted.items()
        if found.get(name) != value
    ]
    if differences:
        raise NamespaceError(
            f"namespace {config.namespace!r} was made with other settings: {'; '.join(differences)}. "
            "Use the same settings, or another namespace"
        )
    meta = (
        *(
            "schema",
            SCHEMA.decode(),
            "nodes",
            "0",
            "chunks",
            "0",
            "bytes",
            "0",
            "warm",
            "0",
            "log",
            "0",
            "policy",
            config.policy,
        ),
        *("elsewhere", "1" if config.cold_url else "0", "cold", "0"),
        *("hot_hits", config.hot_threshold, "hot_ms", int(config.cold_timeout_s * 1000)),
    )
    try:
        shard = _texts(client.call("attach", keys.meta, meta, deadline))
    except ScriptError as error:
        raise NamespaceError(f"{keys.meta} cannot be read: {error}") from error
    if shard.get("schema") != SCHEMA.decode():
        raise NamespaceError(f"{keys.meta} has schema {shard.get('schema')!r}, this version speaks {SCHEMA.decode()!r}")
    if config.cold_url and shard.get("elsewhere") != "1":
        if shard.get("cold", "0") != "0":
            raise NamespaceError(f"namespace {config.namespace!r} keeps cold payloads with the tree: pass no cold_url")
        client.command("HSET", keys.meta, "elsewhere", "1", deadline=deadline)
    return Attached(bool(config.cold_url) or shard.get("elsewhere") == "1", shard.get("created", "").encode())


def _texts(reply: Any) -> dict[str, str]:
    return {text(name): text(value) for name, value in pairs(reply).items()}
