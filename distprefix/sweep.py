"""Taking away what dead workers, and older processes of living ones, left behind. It counts for nothing before."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from distprefix import operations
from distprefix.operations import Swept
from distprefix.redis.client import Client, run
from distprefix.redis.holders import read_holders
from distprefix.redis.keys import Keys
from distprefix.redis.replies import count_of, pairs
from distprefix.redis.roster import GRACE_S, read_roster, retire

__all__ = ["sweep"]

_LOCK_MS = 30_000
_HOLDERS_A_PASS = 50
_FIELDS_A_CALL = 1000


def sweep(client: Client, keys: Keys, deadline: float) -> Swept:
    """Take away what counts for nothing, unless somebody else is at it. Who died shows in the epochs.

    Two calls when there is nothing to do, else four more, one for 1,000 holders and one for some 50 nodes that the dead
    covered. A rank is swept once after each start. Raises what the client raises.
    """
    reading = read_roster(client, keys, "", deadline)
    late = reading.server_ms - 1000 * GRACE_S
    dead = [member for member, end in reading.lease_ends_ms.items() if end < late]
    if dead and reading.epochs is not None:  # heartbeats of others make them void as well, if there are others
        retire(client, keys, {member: reading.epochs.get(member) for member in dead}, deadline)
        reading = read_roster(client, keys, "", deadline)
    known = _swept(client, keys, deadline).items()
    done = {name.decode(errors="replace"): count_of(epoch) for name, epoch in known}
    epochs = reading.epochs or {}
    due = {member: epoch for member, epoch in epochs.items() if epoch > done.get(member, 0)}
    if not due:
        return Swept(0, 0, 0)
    held: dict[str, list[str]] = {}
    for holder in read_holders(client, keys, deadline):
        member = holder.partition("@")[0]
        if member in due:
            held.setdefault(member, []).append(holder)
    _note(client, keys, {member: epoch for member, epoch in due.items() if member not in held}, deadline)
    if not held or client.command("SET", keys.sweeping, "1", "NX", "PX", _LOCK_MS, deadline=deadline) is None:
        return Swept(0, 0, 0)
    total = Swept(0, 0, 0)
    try:
        for members in _passes(held):
            newest = {holder: due[member] for member in members for holder in held[member]}
            for i in range(0, len(newest), _HOLDERS_A_PASS):
                some = dict(list(newest.items())[i : i + _HOLDERS_A_PASS])
                total = total.then(run(operations.sweep(some), client, keys.meta, deadline))
            _note(client, keys, {member: due[member] for member in members}, deadline)
    finally:
        client.command("DEL", keys.sweeping, deadline=max(deadline, time.monotonic() + 1))
    return total


def _passes(held: Mapping[str, Sequence[str]]) -> Iterator[list[str]]:
    """Members that are swept together: so many that they have some tens of holders."""
    members: list[str] = []
    holders = 0
    for member, names in held.items():
        if members and holders + len(names) > _HOLDERS_A_PASS:
            yield members
            members = []
            holders = 0
        members.append(member)
        holders += len(names)
    yield members


def _note(client: Client, keys: Keys, swept: Mapping[str, int], deadline: float) -> None:
    """None of the coverage of these members under older epochs is left."""
    fields = [part for member, epoch in swept.items() for part in (member, epoch)]
    for i in range(0, len(fields), _FIELDS_A_CALL):
        client.command("HSET", keys.swept, *fields[i : i + _FIELDS_A_CALL], deadline=deadline)


def _swept(client: Client, keys: Keys, deadline: float) -> dict[bytes, bytes]:
    return pairs(client.command("HGETALL", keys.swept, deadline=deadline))
