"""Forgetting members that are gone for good, so that what every reader has to know does not grow for ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.roster import member_of

__all__ = ["FORGET_AFTER_S", "forget_members"]

FORGET_AFTER_S = 86_400.0
"""How long after it was made void a member is forgotten."""
_LOCK_MS = 3_600_000
_MEMBERS_A_CALL = 50


def forget_members(client: Client, keys: Keys, deadline: float, after_s: float = FORGET_AFTER_S) -> int:
    """Forget members that were made void long ago and of whose coverage nothing is left. Returns how many.

    Once an hour for all workers of a namespace: one call, or three and one for every 500 holders in the tree and 500
    void members, and up to four for 50 void members of which no coverage is left. Raises what the client raises.
    """
    if client.command("SET", keys.forgetting, "1", "NX", "PX", _LOCK_MS, deadline=deadline) is None:
        return 0
    covering = {member_of(holder) for page in _scan(client, keys.holders, deadline) for holder in page}
    forgotten = 0
    for page in _scan(client, keys.voided, deadline):
        members = [member for member in page if member not in covering]
        for at in range(0, len(members), _MEMBERS_A_CALL):
            args = (int(1000 * after_s), *members[at : at + _MEMBERS_A_CALL])
            names = client.call("forget", keys.epochs, args, deadline)
            _forget_writes(client, keys, names, deadline)
            forgotten += len(names)
    return forgotten


def _forget_writes(client: Client, keys: Keys, members: Sequence[bytes], deadline: float) -> None:
    """How many writes of these members the shard has taken is not needed any more."""
    if not members:
        return
    names = client.command("HMGET", keys.writers, *members, deadline=deadline)
    counted = [name for name in names if name is not None]
    if counted:
        client.command("HDEL", keys.meta, *counted, deadline=deadline)
        client.command("HDEL", keys.writers, *members, deadline=deadline)


def _scan(client: Client, key: str, deadline: float) -> Iterator[list[str]]:
    """The fields of a hash, page by page."""
    cursor = b"0"
    while True:
        cursor, flat = client.command("HSCAN", key, cursor, "COUNT", 500, deadline=deadline)
        yield [name.decode(errors="surrogateescape") for name in flat[::2]]
        if int(cursor) == 0:
            return
