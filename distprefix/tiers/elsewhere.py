"""Cold payloads on another server: having it keep or drop them, since no script reaches both servers.

A copy is written with a TTL. Once the tree names it as cold, the other server is asked to keep it; until then the tree
has a note that this is still to be done, so that any process can do it. What the tree drops is named in `trash`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, cast

import redis

from distprefix.chunking import HASH_BYTES
from distprefix.errors import ScriptError, UnavailableError
from distprefix.redis.client import Client, run
from distprefix.redis.keys import Keys
from distprefix.redis.replies import pairs
from distprefix.tiers import operations
from distprefix.tiers.envelope import HEADER_BYTES, upload_of

__all__ = ["Elsewhere"]

_DROP_S = 120
_A_TIME = 200


class Elsewhere:
    """The other server's small commands. Every method raises UnavailableError when one of the two does not answer."""

    def __init__(self, client: Client, keys: Keys, server: Client, timeout_s: float) -> None:
        self._client = client
        self._timeout_s = timeout_s
        self._keys = keys
        self._server = server

    def settle(self, deadline: float) -> int:
        """Have it keep what became cold. Returns the nodes settled. A call, and some for each node."""
        waiting = pairs(self._client.command("HGETALL", self._keys.unsettled, deadline=deadline))
        for head, chunks in waiting.items():
            self._each(chunks, deadline, "PERSIST")
            run(operations.settled(head, chunks), self._client, self._keys.meta, deadline)
        return len(waiting)

    def empty_trash(self, deadline: float) -> int:
        """Have it drop, in two minutes, what the tree dropped. Returns the chunks. A call, and some for each."""
        chunks: Any = self._client.command("SRANDMEMBER", self._keys.trash, _A_TIME, deadline=deadline)
        for chunk in chunks:
            packed = bytes.fromhex(chunk.decode())
            self._each(packed, deadline, "EXPIRE", _DROP_S)
            run(operations.dropped(packed), self._client, self._keys.meta, deadline)
        return len(chunks)

    def reclaim(self, deadline: float) -> int:
        """Have it drop what the tree does not name, as after the tree's server lost its data. Returns the chunks.

        A scan of its keys, a call for each of this namespace and one for its chunk.
        """
        found = 0
        base = f"{self._keys.base}cold:"
        for name in self._scan(f"{base}*"):
            chunk, _, part = name.removeprefix(base).partition(":")
            if self._ask(deadline, "PTTL", name) != -1:
                continue  # what has a TTL expires, or is being moved
            if part:
                self._drop_lone_part(name, chunk, deadline)
            elif not self._client.command("SISMEMBER", self._keys.kept, chunk, deadline=deadline):
                found += cast("int", self._client.command("SADD", self._keys.trash, chunk, deadline=deadline))
        while self.empty_trash(deadline):
            pass
        return found

    def close(self) -> None:
        """Close the connections."""
        self._server.close()

    def _drop_lone_part(self, name: str, chunk: str, deadline: float) -> None:
        """Remove a part whose first value is of another upload, or is not there."""
        if name not in self._keys_of(bytes.fromhex(chunk), deadline):
            self._ask(deadline, "UNLINK", name)

    def _scan(self, pattern: str) -> Iterator[str]:
        try:
            for name in self._server.redis.scan_iter(match=pattern, count=1000):
                yield name.decode()
        except redis.RedisError as error:
            raise UnavailableError(f"the server of the cold tier does not answer: {error}") from error

    def _each(self, chunks: bytes, deadline: float, command: str, *args: Any) -> None:
        """Send a command for every value of some chunks' payloads, the first value of each last."""
        for at in range(0, len(chunks), HASH_BYTES):
            for key in reversed(self._keys_of(chunks[at : at + HASH_BYTES], deadline)):
                self._ask(deadline, command, key, *args)

    def _keys_of(self, chunk: bytes, deadline: float) -> list[str]:
        """Keys of a chunk's payload, as the header in the first value names them."""
        first = self._keys.payload(chunk.hex(), cold=True)
        header: Any = self._ask(deadline, "GETRANGE", first, 0, HEADER_BYTES - 1)
        upload, values = upload_of(header or b"")
        return [first, *(self._keys.part(chunk.hex(), upload.hex(), n, cold=True) for n in range(1, values))]

    def _ask(self, deadline: float, *command: Any) -> Any:
        try:
            return self._server.command(*command, deadline=min(deadline, time.monotonic() + self._timeout_s))
        except ScriptError as error:
            if "WRONGTYPE" in str(error):
                return 0  # no payload, and so without parts
            raise UnavailableError(f"the server of the cold tier refuses a command: {error}") from error
