"""Taking away what dead workers, and older processes of living ones, left behind. It counts for nothing before."""

from __future__ import annotations

import time

from distprefix import operations
from distprefix.operations import Swept
from distprefix.redis.client import Client, run
from distprefix.redis.keys import Keys
from distprefix.redis.replies import pairs
from distprefix.redis.roster import read_roster

__all__ = ["sweep"]

_LOCK_MS = 30_000
_MOST_MEMBERS = 500


def sweep(client: Client, keys: Keys, deadline: float) -> Swept:
    """Take away what counts for nothing, unless somebody else is at it. Who died shows in the epochs.

    Three calls when there is nothing to do, else one more for about 20 leaves. Raises what the client raises.
    """
    reading = read_roster(client, keys, "", deadline)
    done = {name.decode(): int(epoch) for name, epoch in _swept(client, keys, deadline).items() if epoch.isdigit()}
    epochs = reading.epochs or {}
    due = {member: epoch for member, epoch in epochs.items() if epoch > max(1, done.get(member, 1))}
    due = dict(list(due.items())[:_MOST_MEMBERS])
    if not due or client.command("SET", keys.sweeping, "1", "NX", "PX", _LOCK_MS, deadline=deadline) is None:
        return Swept(0, 0, 0)
    try:
        swept = run(operations.sweep(due), client, keys.meta, deadline)
        fields = [part for member, epoch in due.items() for part in (member, epoch)]
        client.command("HSET", keys.swept, *fields, deadline=deadline)
    finally:
        client.command("DEL", keys.sweeping, deadline=max(deadline, time.monotonic() + 1))
    return swept


def _swept(client: Client, keys: Keys, deadline: float) -> dict[bytes, bytes]:
    return pairs(client.command("HGETALL", keys.swept, deadline=deadline))
