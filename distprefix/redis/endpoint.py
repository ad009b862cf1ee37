"""What all connections to one server share: whether they may still be used, and what the server says of itself.

A name may lead to another server after a failover while connections stay open to the old one, which is a read-only
replica by then. So every new connection asks for ROLE before it is used, and an answer that only a replica, or a server
that is not ready, can give ends all connections: the next ones resolve the name anew.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

__all__ = ["IDENTITY", "Endpoint", "Identity", "ReplicaError", "read_identity"]

IDENTITY = (("ROLE",), ("INFO", "server", "replication"))
"""What a new connection asks. A server that refuses one of them is taken for a primary that did not change."""
_PROMOTED_S = 30.0
"""How long after a promotion the absence of a key proves nothing: the old primary may come back with it."""


class ReplicaError(ConnectionError):
    """The connection leads to a replica."""


class Identity(NamedTuple):
    """What a server says of itself; empty where it does not say."""

    role: str = ""
    """``master`` or ``slave``."""
    run_id: str = ""
    """Another one after each start of the process."""
    replication_id: str = ""
    """Another one after a promotion."""
    was_replica: bool = False
    """Whether the server continues the history of another one."""


class Endpoint:
    """The server that a URL leads to now. Thread-safe."""

    def __init__(self, name: str = "") -> None:
        self.name = name
        """The setting that names it, for messages."""
        self.generation = 0
        """Connections of an older generation are not used any more."""
        self.renewals: Counter[str] = Counter()
        """How often all connections were ended, by cause."""
        self.identity = Identity()
        """Of the server that the newest connection led to."""
        self.warned_of_scripts_at = float("-inf")
        """When the log last said that the server lacks scripts (time.monotonic)."""
        self._promoted_at = float("-inf")
        self._lock = threading.RLock()  # a signal handler may close the cache in the middle of a call

    def renew(self, cause: str, generation: int | None = None) -> None:
        """End every connection of this generation (by default the current one): each is replaced when it is needed."""
        with self._lock:
            if generation is None or generation == self.generation:
                self.generation += 1
                self.renewals[cause] += 1

    def admit(self, identity: Identity) -> None:
        """Take note of what a new connection leads to. Raises ReplicaError for a replica.

        Where that is another server than before, all older connections end.
        """
        if identity.role == "slave":
            raise ReplicaError(f"{self.name or 'the url'} leads to a read-only replica: it has to lead to the primary")
        with self._lock:
            before = self.identity
            self.identity = identity
            is_other = before.run_id != "" and identity.run_id not in ("", before.run_id)
            is_promoted = identity.replication_id != before.replication_id and identity.was_replica
            if is_promoted:
                self._promoted_at = time.monotonic()
            if is_other:
                self.generation += 1
                self.renewals["another server"] += 1

    @property
    def is_settled(self) -> bool:
        """Whether the absence of a key is evidence: the server was not promoted just now."""
        return time.monotonic() - self._promoted_at >= _PROMOTED_S


def read_identity(role: Any, info: Any) -> Identity:
    """An Identity from the replies to `IDENTITY`, of either protocol; None for a reply that was an error."""
    fields = _fields(info)
    said = role[0].decode() if isinstance(role, list) and role and isinstance(role[0], bytes) else ""
    second = fields.get("second_repl_offset", "-1")
    return Identity(
        role=said if said in ("master", "slave") else fields.get("role", ""),
        run_id=fields.get("run_id", ""),
        replication_id=fields.get("master_replid", ""),
        was_replica=second.lstrip("-").isdigit() and int(second) >= 0,
    )


def _fields(info: Any) -> Mapping[str, str]:
    text = info.decode(errors="replace") if isinstance(info, bytes) else info if isinstance(info, str) else ""
    pairs = (line.partition(":") for line in text.splitlines() if ":" in line)
    return {name: value.strip() for name, _, value in pairs}
