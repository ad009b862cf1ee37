"""Putting a shard right after keys were lost or forged: what cannot be goes, and all counts are exact."""

from __future__ import annotations

from typing import Any, cast

from distprefix.operations import SCHEMA, drop
from distprefix.redis.client import Client, run
from distprefix.redis.integrity import Report, check_integrity
from distprefix.redis.keys import Keys
from distprefix.redis.soundness import as_bytes

__all__ = ["repair"]

_ATTEMPTS = 8
_COUNTS_A_CALL = 300


def repair(client: Client, keys: Keys, max_run: int, deadline: float) -> tuple[Report, bool]:
    """Read the whole shard and mend it, as long as nobody writes meanwhile; tried eight times.

    Returns what was found first, and whether all of it is right now. Costs what `check_integrity` does, and a few calls
    for each orphan.
    """
    first: Report | None = None
    for _ in range(_ATTEMPTS):
        seen = _counts(client, keys, deadline)
        report = check_integrity(client.redis, keys, max_run)
        if _counts(client, keys, deadline) != seen:
            continue  # others wrote while this read: it is no snapshot
        first = first or report
        if report.ok:
            return first, True
        _mend(client, keys, report, deadline)
        if not (report.fixes or report.orphans or report.strays or report.missing or report.childless):
            counted = [
                str(number).encode() for number in (report.nodes, report.chunks, report.bytes, report.warm, report.cold)
            ]
            for i in range(0, len(report.miscounted) or 1, _COUNTS_A_CALL):
                some = report.miscounted[i : i + _COUNTS_A_CALL]
                wrong = [
                    part for last, name, true in some for part in (last, name.encode(errors="surrogateescape"), true)
                ]
                client.call("repair", keys.meta, (SCHEMA, *seen, *counted, *wrong), deadline)
                seen = [*counted, seen[-1]]
    return first or Report(), False


def _mend(client: Client, keys: Keys, report: Report, deadline: float) -> None:
    for fix in report.fixes:
        client.command(fix.command, fix.key, *fix.args, deadline=deadline)
    for head in report.orphans:
        run(drop(head), client, keys.meta, deadline)
        if not client.command("HGET", keys.node(head), "r", deadline=deadline):  # scripts pass over what has no run
            client.command("UNLINK", keys.node(head), deadline=deadline)
    for last, gone in report.childless.items():
        junction = keys.junction("" if last == "root" else last)
        for head in gone:
            client.command("HDEL", junction, as_bytes(head), deadline=deadline)
        names = cast("list[bytes]", client.command("HKEYS", junction, deadline=deadline))
        if all(name == b"o" or b"@" in name for name in names):  # what is left counts children that are not there
            client.command("DEL", junction, deadline=deadline)
    for head in report.strays:
        client.command("ZREM", keys.leaves, as_bytes(head), deadline=deadline)
        client.command("ZREM", keys.hot, as_bytes(head), deadline=deadline)
    for head, accessed in report.missing.items():
        if head not in report.orphans:
            client.command("ZADD", keys.leaves, "NX", accessed, head, deadline=deadline)


def _counts(client: Client, keys: Keys, deadline: float) -> list[bytes]:
    reply: Any = client.command(
        "HMGET", keys.meta, "nodes", "chunks", "bytes", "warm", "cold", "log", deadline=deadline
    )
    return [value or b"0" for value in reply]
