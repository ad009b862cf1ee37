"""Saying that a server was restored: all that anybody was acknowledged may be lost, and nothing older counts."""

from __future__ import annotations

from typing import NamedTuple

from distprefix.operations import SCHEMA
from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.redis.roster import read_roster, retire

__all__ = ["Restored", "declare_restored"]

_MEMBERS_A_CALL = 100


class Restored(NamedTuple):
    """What was done."""

    generation: str
    """Of the shard from now on."""
    members: int
    """Ranks of workers whose coverage counts no more until they publish it again."""


def declare_restored(client: Client, keys: Keys, deadline: float) -> Restored:
    """Begin another generation of the namespace, and void what every worker published.

    Workers that live take a new epoch and publish again what they hold, within the bounds that docs/reliability.md
    states; what the dead published counts for nothing from now on. Redis calls: 2, and 1 for every 100 ranks. Raises
    NotAttachedError where there is no such namespace, UnavailableError.
    """
    reply, _, _, _ = client.call("restored", keys.meta, (SCHEMA,), deadline)
    members = list(read_roster(client, keys, "", deadline).epochs or {})
    retired = 0
    for at in range(0, len(members), _MEMBERS_A_CALL):
        retired += retire(client, keys, dict.fromkeys(members[at : at + _MEMBERS_A_CALL]), deadline)
    return Restored(reply.decode(), retired)
