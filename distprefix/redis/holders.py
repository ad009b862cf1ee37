"""Whose coverage there is in a shard: the holders that cover any of its roots, and so all that cover anything."""

from __future__ import annotations

import re
from typing import cast

from distprefix.redis.client import Client
from distprefix.redis.keys import Keys

__all__ = ["read_holders"]

_HOLDERS_A_CALL = 1000


def read_holders(client: Client, keys: Keys, deadline: float, member: str = "") -> list[str]:
    """All holders, or those of one member; shared tiers are holders of the member "". One call for 1,000 there are."""
    pattern = re.sub(r"([\[\]*?\\^-])", r"\\\1", member) + "@*" if member else "*"
    found: set[str] = set()
    cursor = b"0"
    while True:
        command = ("HSCAN", keys.holders, cursor, "MATCH", pattern, "COUNT", _HOLDERS_A_CALL)
        reply = cast("list[object]", client.command(*command, deadline=deadline))
        cursor = cast("bytes", reply[0])
        named = cast("list[bytes]", reply[1])
        found.update(name.decode(errors="replace") for name in named[::2])
        if int(cursor) == 0:
            return sorted(found)
