"""Cold payloads on another server: telling it what to keep and what to drop, since no script reaches both servers.

A copy is written with an end. Once the tree says that it is cold, the other server is told to keep it; until then the
tree says that this is still to be done, so that whoever comes by can do it. What the tree drops is named in `trash`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import redis

from distprefix.chunking import HASH_BYTES
from distprefix.errors import UnavailableError
from distprefix.redis.client import Client, run
from distprefix.redis.keys import Keys
from distprefix.redis.replies import pairs
from distprefix.tiers import operations
from distprefix.tiers.store import PART_BYTES

__all__ = ["Elsewhere"]

_GONE_S = 120
_A_TIME = 200


class Elsewhere:
    """The other server's small commands. Every method raises UnavailableError when one of the two does not answer."""

    def __init__(self, client: Client, keys: Keys, server: redis.Redis) -> None:
        self._client = client
        self._keys = keys
        self._server = server

    def settle(self, deadline: float) -> int:
        """Have it keep what became cold. Returns the nodes settled. A call, and some for each node."""
        waiting = pairs(self._client.command("HGETALL", self._keys.unsettled, deadline=deadline))
        for head, chunks in waiting.items():
            self._each(chunks, "PERSIST")
            run(operations.settled(head, chunks), self._client, self._keys.meta, deadline)
        return len(waiting)

    def empty_trash(self, deadline: float) -> int:
        """Have it drop, in two minutes, what the tree dropped. Returns the chunks. A call, and some for each."""
        chunks: Any = self._client.command("SRANDMEMBER", self._keys.trash, _A_TIME, deadline=deadline)
        for chunk in chunks:
            packed = bytes.fromhex(chunk.decode())
            self._each(packed, "EXPIRE", _GONE_S)
            run(operations.dropped(packed), self._client, self._keys.meta, deadline)
        return len(chunks)

    def reclaim(self, deadline: float) -> int:
        """Have it drop what the tree knows nothing of, as after the tree's server lost its data. Returns the chunks.

        A scan of its keys, a call for each of this namespace and one for its chunk.
        """
        found, base = 0, f"{self._keys.base}cold:"
        for name in self._scan(f"{base}*"):
            chunk = name.removeprefix(base)
            if ":" in chunk or self._ask("PTTL", name) != -1:
                continue  # a part goes with the first; what has an end goes by itself, or is being moved
            if not self._client.command("SISMEMBER", self._keys.kept, chunk, deadline=deadline):
                found += cast("int", self._client.command("SADD", self._keys.trash, chunk, deadline=deadline))
        while self.empty_trash(deadline):
            pass
        return found

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def _scan(self, pattern: str) -> Iterator[str]:
        try:
            for name in self._server.scan_iter(match=pattern, count=1000):
                yield name.decode()
        except redis.RedisError as error:
            raise _unavailable(error) from error

    def _each(self, chunks: bytes, command: str, *args: Any) -> None:
        """Send a command for every part of some chunks."""
        for at in range(0, len(chunks), HASH_BYTES):
            chunk, part = chunks[at : at + HASH_BYTES].hex(), 0
            while True:
                key = self._keys.payload(chunk, part, cold=True)
                length = cast("int", self._ask("STRLEN", key))
                self._ask(command, key, *args)
                if length != PART_BYTES:
                    break
                part += 1

    def _ask(self, *command: Any) -> Any:
        try:
            return self._server.execute_command(*command)
        except redis.ResponseError:  # another hand wrote it: it has no parts
            return 0
        except redis.RedisError as error:
            raise _unavailable(error) from error


def _unavailable(error: redis.RedisError) -> UnavailableError:
    return UnavailableError(f"the server of the cold tier does not answer: {error}")
