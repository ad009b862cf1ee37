"""Taking away what dead workers, and older processes of living ones, left behind. It counts for nothing before."""

from __future__ import annotations

import time

from distprefix import operations
from distprefix.operations import Swept
from distprefix.redis.client import Client, run
from distprefix.redis.keys import Keys
from distprefix.redis.replies import pairs
from distprefix.redis.roster import GRACE_S, read_roster, retire

__all__ = ["sweep"]

_LOCK_MS = 30_000
_MEMBERS_A_PASS = 500


def sweep(client: Client, keys: Keys, deadline: float) -> Swept:
    """Take away what counts for nothing, unless somebody else is at it. Who died shows in the epochs.

    Two calls when there is nothing to do, else three more and one for 5 nodes. Raises what the client raises.
    """
    reading = read_roster(client, keys, "", deadline)
    late = reading.server_ms - 1000 * GRACE_S
    dead = [member for member, end in reading.lease_ends_ms.items() if end < late]
    if dead and reading.epochs is not None:  # heartbeats of others make them void as well, if there are others
        retire(client, keys, {member: reading.epochs.get(member) for member in dead}, deadline)
        reading = read_roster(client, keys, "", deadline)
    known = _swept(client, keys, deadline).items()
    done = {name.decode(errors="replace"): int(epoch) for name, epoch in known if epoch.isdigit()}
    epochs = reading.epochs or {}
    due = {member: epoch for member, epoch in epochs.items() if epoch > max(1, done.get(member, 1))}
    if not due or client.command("SET", keys.sweeping, "1", "NX", "PX", _LOCK_MS, deadline=deadline) is None:
        return Swept(0, 0, 0)
    total = Swept(0, 0, 0)
    try:
        for i in range(0, len(due), _MEMBERS_A_PASS):
            members = dict(list(due.items())[i : i + _MEMBERS_A_PASS])
            swept = run(operations.sweep(members), client, keys.meta, deadline)
            fields = [part for member, epoch in members.items() for part in (member, epoch)]
            client.command("HSET", keys.swept, *fields, deadline=deadline)
            total = total.then(swept)
    finally:
        client.command("DEL", keys.sweeping, deadline=max(deadline, time.monotonic() + 1))
    return total


def _swept(client: Client, keys: Keys, deadline: float) -> dict[bytes, bytes]:
    return pairs(client.command("HGETALL", keys.swept, deadline=deadline))
