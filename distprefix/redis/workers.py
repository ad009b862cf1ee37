"""The workers of a namespace as people want to see them: leases, what they hold, how far their events are written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from distprefix.chunking import HASH_BYTES
from distprefix.redis.client import Client, run
from distprefix.redis.journal import census
from distprefix.redis.keys import Keys
from distprefix.redis.metrics import figure, read_metrics
from distprefix.redis.replies import clock_ms, count_of, pairs
from distprefix.redis.roster import Member, read_members, read_roster, retire
from distprefix.roster import member_of, members_of

__all__ = ["FIGURES", "describe_workers", "retire_worker"]

_STREAMS_A_CALL = 500
FIGURES = (
    "lookups",
    "tokens_hit",
    "loads",
    "tokens_loaded",
    "payload_bytes_loaded",
    "payload_bytes_loaded_cold",
    "payload_bytes_stored",
)
"""What a worker says that it did, since it began."""


def describe_workers(client: Client, keys: Keys, deadline: float) -> list[dict[str, Any]]:
    """Every rank that counts, or did: one dictionary each.

    Three calls, one for 100 nodes, one for 500 ranks and one for their streams, and one for each rank with a lease.
    Ranks that hold neither a lease nor anything in the tree, and report nothing, are left out.
    """
    members = read_members(client, keys, deadline)
    reports = read_metrics(client.redis, keys)
    server_s = clock_ms(client.command("TIME", deadline=deadline)) / 1000
    epochs = {member.name: member.epoch for member in members}
    chunks: dict[str, Counter[str]] = {}
    for _, _, holders in run(census(), client, keys.meta, deadline):
        for holder, (epoch, held, _) in holders.items():
            name, _, medium = holder.rpartition("@")
            if name and epoch == epochs.get(name):
                chunks.setdefault(name, Counter())[medium] += len(held) // HASH_BYTES
    described: list[dict[str, Any]] = []
    figures_of: dict[str, list[dict[str, Any]]] = {}
    for holder, report in reports.items():
        figures_of.setdefault(member_of(holder), []).append(report)
    for member, stream in zip(members, _streams(client, keys, members), strict=True):
        figures = figures_of.get(member.name, [])
        if member.lease_left_s is not None or member.name in chunks or stream or figures:
            one = _describe(member, dict(chunks.get(member.name, {})), stream, server_s)
            one["figures"] = {name: sum(figure(each, name) for each in figures) for name in FIGURES}
            described.append(one)
    return described


def _streams(client: Client, keys: Keys, members: list[Member]) -> Iterator[dict[bytes, bytes]]:
    """How far the events of each member are written, 500 at a time."""
    for at in range(0, len(members), _STREAMS_A_CALL):
        with client.redis.pipeline(transaction=False) as batch:
            for member in members[at : at + _STREAMS_A_CALL]:
                batch.hgetall(keys.stream(member.name))
            replies: list[Any] = batch.execute(raise_on_error=False)
        yield from (pairs(reply) if isinstance(reply, (dict, list)) else {} for reply in replies)


def retire_worker(client: Client, keys: Keys, worker: str, deadline: float) -> int:
    """Nothing that any rank of the worker published counts any more. Two calls. Returns how many ranks it had."""
    epochs = read_roster(client, keys, "", deadline).epochs or {}
    return retire(client, keys, dict.fromkeys(members_of(worker, epochs)), deadline)


def _describe(member: Member, chunks: dict[str, int], stream: dict[bytes, bytes], server_s: float) -> dict[str, Any]:
    info = member.info
    ends = count_of(stream.get(b"u")) / 1000
    sequence = count_of(stream.get(b"q"), -1)
    return {
        "worker": member.worker,
        "rank": member.rank,
        "epoch": member.epoch,
        "lease_left_s": None if member.lease_left_s is None else round(member.lease_left_s, 1),
        "live": member.lease_left_s is None or member.lease_left_s > 0,
        "address": info.address,
        "model": info.model,
        "media": sorted({*info.media, *chunks}),
        "chunks": chunks,
        "load": dict(info.load),
        "started": member.started or None,
        "events": {
            "source": stream.get(b"w", b"").decode(errors="replace"),
            "sequence": sequence if sequence >= 0 else None,
            "lag_s": info.load.get("lag_s"),
            "followed": ends > server_s,
        }
        if stream
        else None,
    }
