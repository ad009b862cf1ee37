"""Finding what a compromised worker left in its namespace: broken structure, forged payloads and claims, foreign keys.

A worker may write to its namespace, so it may lie there. What can be proven wrong from what is in Redis is found here;
that a live worker does not hold what it claims shows only when its engine is asked for it.
"""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

import redis

from distprefix.chunking import HASH_BYTES
from distprefix.redis.client import Client, run
from distprefix.redis.integrity import check_integrity, check_payloads
from distprefix.redis.journal import census
from distprefix.redis.keys import Keys
from distprefix.redis.roster import read_roster
from distprefix.tiers.store import Flaw, PayloadStore, Want, groups

__all__ = ["Audit", "Doubt", "Finding", "Scope", "audit_namespace"]

_ATTEMPTS = 5
_GROUP_BYTES = 64 * 1024 * 1024
_TIERS = ("@warm", "@cold")


class Doubt(StrEnum):
    """What a finding is about."""

    STRUCTURE = "structure"
    """The tree breaks its own rules, or payloads and tree disagree: `distprefix maintain --repair` mends most of it."""
    PAYLOAD = "payload"
    """A payload is not what was stored for its chunk."""
    CLAIM = "claim"
    """Coverage in the name of a worker that cannot have published it."""
    KEY = "key"
    """A key of the namespace that no version of ours writes."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong."""

    doubt: Doubt
    what: str


@dataclass(frozen=True, slots=True)
class Scope:
    """What is looked at."""

    stores: Mapping[str, PayloadStore]
    """The tiers whose payloads are read, by the names that the tree has for them."""
    cold: redis.Redis | None = None
    """The other server, where cold payloads lie on one."""
    max_run: int = 256
    sample: int = 200
    """Payloads to read."""
    has_keys: bool = False
    """Whether keys for encrypted payloads are there: one that cannot be opened is a finding then."""
    must_lease: bool = False
    """Whether every worker of the namespace holds a lease: coverage of one that does not is a finding then."""


@dataclass(frozen=True, slots=True)
class Audit:
    """What was looked at, and what is wrong."""

    nodes: int
    payloads: int
    """Payloads that were read."""
    verified: int
    """Of these, the ones that are what was stored."""
    unreadable: int
    """Those for which the key or the library is not here."""
    was_still: bool
    """Whether the tree did not change while it was read; else its structure was not judged."""
    findings: tuple[Finding, ...]


class _Payload(NamedTuple):
    """A payload that the tree names."""

    head: str
    at: int
    """Of which chunk of the node."""
    chunk: bytes
    tier: str
    size: int


def audit_namespace(client: redis.Redis, keys: Keys, scope: Scope, deadline: float, seed: int | None = None) -> Audit:
    """Hold a namespace to all that can be checked from outside its workers; changes nothing.

    Redis: three SCANs of the server and a few calls for every key of the namespace, then the payloads of the sample.
    Raises UnavailableError, and what redis-py raises.
    """
    findings: list[Finding] = []
    structure = _check_structure(client, keys, scope)
    findings += [Finding(Doubt.STRUCTURE, problem) for problem in structure or ()]
    sample, nodes = _sample(client, keys, scope, random.Random(seed))  # noqa: S311 - picks what to look at
    verified, unreadable, wrong = _check_payloads(client, keys, scope, sample, deadline)
    findings += wrong
    findings += _check_claims(Client(client), keys, scope, deadline)
    findings += _check_keys(client, keys)
    return Audit(nodes, len(sample), verified, unreadable, structure is not None, tuple(findings))


def _check_structure(client: redis.Redis, keys: Keys, scope: Scope) -> list[str] | None:
    """What is wrong with tree and payloads, as long as nobody writes meanwhile; None when somebody does."""
    for _ in range(_ATTEMPTS):
        before = client.execute_command("HGETALL", keys.meta)
        problems = check_integrity(client, keys, scope.max_run).problems
        problems = problems + check_payloads(client, keys, scope.cold)
        if client.execute_command("HGETALL", keys.meta) == before:
            return problems
    return None


def _sample(client: redis.Redis, keys: Keys, scope: Scope, pick: random.Random) -> tuple[list[_Payload], int]:
    """Payloads picked evenly from all that the tree names, and how many nodes it has."""
    picked: list[_Payload] = []
    seen = nodes = 0
    for name in client.scan_iter(match=keys.node("*"), count=1000):
        nodes += 1
        for payload in _payloads_of(client, name):
            if payload.tier not in scope.stores:
                continue
            seen += 1
            if len(picked) < scope.sample:
                picked.append(payload)
                continue
            at = pick.randrange(seen)
            if at < scope.sample:
                picked[at] = payload
    return picked, nodes


def _payloads_of(client: redis.Redis, name: bytes) -> Iterator[_Payload]:
    """The payloads of one node; none for a key that is no node."""
    try:
        reply: Any = client.execute_command("HMGET", name, "r", *(f"b:{tier}" for tier in _TIERS))
    except redis.ResponseError:
        return
    run_, *columns = (value or b"" for value in reply)
    head = name.decode().rpartition(":")[2]
    for tier, column in zip(_TIERS, columns, strict=True):
        for at, size in enumerate(array("I", column[: len(column) // 4 * 4])):
            chunk = run_[at * HASH_BYTES : (at + 1) * HASH_BYTES]
            if size and len(chunk) == HASH_BYTES:
                yield _Payload(head, at, chunk, tier, size)


def _check_payloads(
    client: redis.Redis, keys: Keys, scope: Scope, sample: list[_Payload], deadline: float
) -> tuple[int, int, list[Finding]]:
    """How many payloads are right, how many cannot be opened here, and what is wrong with the others."""
    verified = unreadable = 0
    findings: list[Finding] = []
    for tier, store in scope.stores.items():
        ours = [payload for payload in sample if payload.tier == tier]
        for group in groups(ours, lambda payload: payload.size, _GROUP_BYTES):
            read = store.read([Want(payload.chunk, payload.size) for payload in group], deadline)
            for payload, got in zip(group, read, strict=True):
                if not isinstance(got, Flaw):
                    verified += 1
                elif got.reason == "unreadable" and not scope.has_keys:
                    unreadable += 1
                elif payload in _payloads_of(client, keys.node(payload.head).encode()):  # still named, not evicted
                    text = f"payload of chunk {payload.chunk.hex()} in {tier.removeprefix('@')} is {got.reason}"
                    findings.append(Finding(Doubt.PAYLOAD, f"{text}; node {payload.head}"))
    return verified, unreadable, findings


def _check_claims(client: Client, keys: Keys, scope: Scope, deadline: float) -> list[Finding]:
    """Coverage that no registered process can have published."""
    claimed: Counter[tuple[str, int]] = Counter()
    for _, _, holders in run(census(), client, keys.meta, deadline):
        for holder, (epoch, held, _) in holders.items():
            claimed[holder, epoch] += len(held) // HASH_BYTES
    reading = read_roster(client, keys, "", deadline)  # after the tree: who published is registered by then
    epochs = reading.epochs or {}
    findings: list[Finding] = []
    for (holder, epoch), chunks in sorted(claimed.items()):
        member = holder.rpartition("@")[0]
        if not member:
            continue  # a shared tier
        own = epochs.get(member)
        left_ms = reading.lease_ends_ms.get(member, 0) - reading.server_ms
        problem = ""
        if own is None:
            problem = "is not registered"
        elif epoch > own:
            problem = f"says epoch {epoch}, and {own} is the newest that it was given"
        elif scope.must_lease and epoch == own and left_ms <= 0:
            problem = "holds no lease"
        if problem:
            findings.append(Finding(Doubt.CLAIM, f"{holder} covers {chunks} chunks and {problem}"))
    return findings


def _check_keys(client: redis.Redis, keys: Keys) -> list[Finding]:
    """Keys under the namespace's prefixes that are none of ours."""
    findings: list[Finding] = []
    for pattern in (f"{keys.base}*", keys.members()):
        for name in sorted(set(client.scan_iter(match=pattern, count=1000))):
            text = name.decode(errors="replace")
            if not keys.is_ours(text):
                findings.append(Finding(Doubt.KEY, f"{text} is none of ours"))
    return findings
