"""Forgetting members that are gone for good, so that what every reader has to know does not grow for ever."""

from __future__ import annotations

from distprefix.redis.client import Client
from distprefix.redis.keys import Keys

__all__ = ["FORGET_AFTER_S", "forget_members"]

FORGET_AFTER_S = 86_400.0
"""How long after it was made void a member is forgotten."""
_LOCK_MS = 3_600_000
_MEMBERS_A_CALL = 50


def forget_members(client: Client, keys: Keys, deadline: float, after_s: float = FORGET_AFTER_S) -> int:
    """Forget members that were made void long ago and of whose coverage nothing is left. Returns how many.

    Once an hour for all workers of a namespace: one call, or two and one for every 50 void members. Raises what the
    client raises.
    """
    if client.command("SET", keys.forgetting, "1", "NX", "PX", _LOCK_MS, deadline=deadline) is None:
        return 0
    forgotten, cursor = 0, b"0"
    while True:
        cursor, flat = client.command("HSCAN", keys.voided, cursor, "COUNT", 500, deadline=deadline)
        members = flat[::2]
        for at in range(0, len(members), _MEMBERS_A_CALL):
            args = (int(1000 * after_s), *members[at : at + _MEMBERS_A_CALL])
            forgotten += client.call("forget", keys.epochs, args, deadline)
        if cursor == b"0":
            return forgotten
