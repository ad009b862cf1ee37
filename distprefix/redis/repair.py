"""Counting a shard anew and correcting what its meta says."""

from __future__ import annotations

from typing import Any

from distprefix.operations import SCHEMA
from distprefix.redis.client import Client
from distprefix.redis.integrity import Report, check_integrity
from distprefix.redis.keys import Keys

__all__ = ["repair_counts"]

_ATTEMPTS = 5


def repair_counts(client: Client, keys: Keys, max_run: int, deadline: float) -> tuple[Report, bool]:
    """Read the whole shard, and correct its counts where nobody wrote meanwhile; tried five times.

    Returns what was found, and whether the counts are right now. Costs what `check_integrity` does, and one script.
    """
    report = Report()
    for _ in range(_ATTEMPTS):
        seen = _counts(client, keys, deadline)
        report = check_integrity(client.redis, keys, max_run)
        if _counts(client, keys, deadline) != seen:
            continue  # others wrote while this read: it is no snapshot
        counted = [str(number).encode() for number in (report.nodes, report.chunks, report.bytes)]
        if seen[:3] == counted or client.call("repair", keys.meta, (SCHEMA, *seen, *counted), deadline):
            return report, True
    return report, False


def _counts(client: Client, keys: Keys, deadline: float) -> list[bytes]:
    reply: Any = client.command("HMGET", keys.meta, "nodes", "chunks", "bytes", "log", deadline=deadline)
    return [value or b"0" for value in reply]
