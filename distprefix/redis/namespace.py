"""Attaching to a namespace: its secret, its descriptor and the shard's meta."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from distprefix.config import PrefixCacheConfig
from distprefix.errors import NamespaceError, ScriptError
from distprefix.hashing import ChunkHasher, derive_key
from distprefix.identity import encoded, parts_of_text
from distprefix.operations import SCHEMA
from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.redis.replies import pairs

__all__ = ["Attached", "attach", "hasher_of", "read_hasher"]

_SECRET = "secret"  # noqa: S105 - the field's name
_SECRET_BYTES = 32
_SETTINGS = ("chunk_size", "hash_algorithm", "max_run", "shards", "policy")


class Attached(NamedTuple):
    """What a namespace was when a process attached to it."""

    cold_is_elsewhere: bool
    """Whether its cold payloads are on another server."""
    generation: bytes
    """Tells the shard from another one of the same name, and from what it was before a restore."""
    hasher: ChunkHasher
    """What names its chunks."""
    secret: bytes
    """The random secret that the namespace has; empty where it is configured."""


def attach(client: Client, keys: Keys, config: PrefixCacheConfig, deadline: float, known: bytes = b"") -> Attached:
    """Make the namespace, or compare with what it was made with. Three script calls at most, two when it is there.

    `known`: the random secret that this process had of it: one that was lost is written again, so that chunks keep
    their names. Raises NamespaceError and names every difference.
    """
    secret = b"" if config.secret else _read_secret(client, keys, config, known, deadline)
    hasher = hasher_of(config, secret)
    wanted = _descriptor_of(config, hasher)
    found = _attach_to(client, keys.descriptor, {**wanted, "created": _utc()}, deadline)
    _compare(config, found, wanted)
    shard = _attach_to(client, keys.meta, _meta_of(config), deadline)
    if shard.get("schema") != SCHEMA.decode():
        raise NamespaceError(f"{keys.meta} has schema {shard.get('schema')!r}, this version speaks {SCHEMA.decode()!r}")
    if config.cold_url and shard.get("elsewhere") != "1":
        if shard.get("cold", "0") != "0":
            raise NamespaceError(f"namespace {config.namespace!r} keeps cold payloads with the tree: pass no cold_url")
        client.command("HSET", keys.meta, "elsewhere", "1", deadline=deadline)
    is_elsewhere = bool(config.cold_url) or shard.get("elsewhere") == "1"
    return Attached(is_elsewhere, shard.get("created", "").encode(errors="surrogateescape"), hasher, secret)


def hasher_of(config: PrefixCacheConfig, secret: bytes) -> ChunkHasher:
    """What names the chunks of a namespace; `secret` is its random one, where none is configured."""
    identity = config.identity
    secret = encoded(config.secret) or secret
    key = derive_key(secret, config.hash_algorithm, config.namespace, identity.digest, identity.salts)
    return ChunkHasher(config.hash_algorithm, key)


def read_hasher(
    client: Client, keys: Keys, config: PrefixCacheConfig, found: Mapping[str, str], deadline: float
) -> ChunkHasher:
    """What names the chunks of a namespace that is there; nothing is written. One call, none with a secret configured.

    `found`: its descriptor. Raises NamespaceError for another secret or salt.
    """
    secret = b""
    if not config.secret:
        secret = client.command("HGET", keys.secret, _SECRET, deadline=deadline) or b""
    hasher = hasher_of(config, secret)
    if hasher.check != found.get("key_check"):
        raise NamespaceError(
            f"namespace {config.namespace!r} was made with another secret or salt: pass the salt with --salt or "
            "DISTPREFIX_SALT, and a secret that was configured with DISTPREFIX_SECRET"
        )
    return hasher


def _read_secret(client: Client, keys: Keys, config: PrefixCacheConfig, known: bytes, deadline: float) -> bytes:
    """The namespace's random secret; a new namespace gets one. One call when it is there."""
    try:
        found: Any = client.command("HGET", keys.secret, _SECRET, deadline=deadline)
        if found is None and not known and client.command("HGET", keys.descriptor, "schema", deadline=deadline):
            found = client.command("HGET", keys.secret, _SECRET, deadline=deadline)  # another process made it just now
            if found is None:
                raise NamespaceError(
                    f"namespace {config.namespace!r} has no secret in Redis: pass the one that it was made with, as "
                    f"secret or DISTPREFIX_SECRET; if it was lost, `distprefix purge {config.namespace}`, since what "
                    "it holds cannot be named any more"
                )
        if found is None:
            offered = known.decode() or secrets.token_hex(_SECRET_BYTES)
            reply = client.call("attach", keys.secret, (_SECRET, offered, "created", _utc()), deadline)
            found = pairs(reply).get(_SECRET.encode())
    except ScriptError as error:
        raise NamespaceError(f"namespace {config.namespace!r} cannot be read: {error}") from error
    if not isinstance(found, bytes) or len(found) < _SECRET_BYTES:
        raise NamespaceError(f"{keys.secret} holds no secret: `distprefix purge {config.namespace}` and begin anew")
    return found


def _descriptor_of(config: PrefixCacheConfig, hasher: ChunkHasher) -> dict[str, str]:
    """What all who share a namespace must agree on. No secret is stored, only a check of the key made of them."""
    identity = config.identity
    return {
        "schema": SCHEMA.decode(),
        "chunk_size": str(config.chunk_size),
        "hash_algorithm": config.hash_algorithm,
        "max_run": str(config.max_run),
        "shards": str(config.shards),
        "policy": config.policy,
        "identity": identity.text,
        "identity_digest": identity.digest.hex(),
        "key_check": hasher.check,
    }


def _compare(config: PrefixCacheConfig, found: dict[str, str], wanted: dict[str, str]) -> None:
    """Raise NamespaceError for what a namespace was made with otherwise."""
    name = config.namespace
    if found.get("schema") != wanted["schema"]:
        raise NamespaceError(
            f"namespace {name!r} was made by another version: its schema is {found.get('schema', 'missing')!r} there "
            f"and {wanted['schema']!r} here. Use another namespace, nothing has to be migrated, and remove this one "
            f"with `distprefix purge {name}` when no process uses it"
        )
    different = [field for field, value in wanted.items() if found.get(field) != value]
    if not different:
        return
    if different == ["key_check"]:
        raise NamespaceError(f"namespace {name!r} was made with another secret or salt: pass the same, or use another")
    there = _settings_in(found)
    here = _settings_in(wanted)
    told = [each for each in {**here, **there} if there.get(each) != here.get(each)]
    differences = "; ".join(f"{each} is {there.get(each, '')!r} there and {here.get(each, '')!r} here" for each in told)
    hint = "Use the same settings, or another namespace"
    if "hash_algorithm" in told:
        hint += ": hashes of one algorithm mean nothing under another, so there is nothing to migrate"
    raise NamespaceError(f"namespace {name!r} was made with other settings: {differences or 'its identity'}. {hint}")


def _settings_in(descriptor: Mapping[str, str]) -> dict[str, str]:
    """A descriptor as settings that people know."""
    settings = {name: value for name, value in descriptor.items() if name in _SETTINGS}
    for name, value in parts_of_text(descriptor.get("identity", "")).items():
        settings["fingerprint" if name == "other" else name] = value
    return settings


def _meta_of(config: PrefixCacheConfig) -> dict[str, str]:
    """A new shard's counts, and what scripts have to know of the settings."""
    counts = dict.fromkeys(("nodes", "chunks", "bytes", "warm", "log"), "0")
    return {
        "schema": SCHEMA.decode(),
        **counts,
        "policy": config.policy,
        "elsewhere": "1" if config.cold_url else "0",
        "cold": "0",
        "hot_hits": str(config.hot_threshold),
        "hot_ms": str(int(config.cold_timeout_s * 1000)),
        "tenant": config.identity.tenant,
        "share": f"{config.share:g}",
        "ttl_ms": str(int(config.namespace_ttl_s * 1000)),
    }


def _attach_to(client: Client, key: str, fields: dict[str, str], deadline: float) -> dict[str, str]:
    """What a hash has, after it was made where it was not there. Raises NamespaceError for a key of another type."""
    flat = [part for pair in fields.items() for part in pair]
    try:
        reply = client.call("attach", key, tuple(flat), deadline)
    except ScriptError as error:
        raise NamespaceError(f"{key} cannot be read: {error}") from error
    return {
        name.decode(errors="replace"): value.decode(errors="surrogateescape") for name, value in pairs(reply).items()
    }


def _utc() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
