"""Room on the whole server: who is over its share gives it up, and namespaces that nobody uses are removed."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from distprefix.config import PrefixCacheConfig
from distprefix.errors import DistPrefixError, NotAttachedError, SchemaError, ScriptError
from distprefix.operations import Bounds, evict
from distprefix.redis.client import Client, run
from distprefix.redis.keys import RELIEVING, REMOVING, Keys
from distprefix.redis.purge import remove_namespace
from distprefix.redis.registry import Enrolled, Memory, enroll, read_enrolled, read_memory, take_turn
from distprefix.shares import Standing, to_free

__all__ = ["REMOVING_S", "Relief", "Relieved", "budget_of", "relieve", "remove_unused"]

_log = logging.getLogger("distprefix")
_ABANDONED_MS = 120_000
"""A process notes its use once a minute: who did not for so long has left, or has been cut off."""
_EMPTY_MS = 5_000
"""Likewise where it has nothing: who uses it attaches again and has lost nothing."""
_RELIEVING_S = 2.0
REMOVING_S = 1800.0
"""How often somebody looks for namespaces that nobody uses."""
_REFUSED_S = 600.0
_POLL_S = 0.05
_BATCH = 100
_CALLS = 10_000


@dataclass(frozen=True, slots=True)
class Relieved:
    """What making room on a server did."""

    wanted: int = 0
    """Bytes that were to go."""
    freed: int = 0
    """Bytes that went, by the trees' own estimates."""
    namespaces: int = 0
    """Namespaces that gave something up."""
    removed: int = 0
    """Namespaces that were removed, because they had nothing left and nobody used them."""


def budget_of(config: PrefixCacheConfig, maxmemory: int) -> int:
    """Bytes that the whole server may use; 0 for any number."""
    return min(filter(None, (config.server_max_bytes, maxmemory)), default=0)


def relieve(
    client: Client, config: PrefixCacheConfig, deadline: float, *, is_full: bool = False, counts: Counter[str]
) -> Relieved:
    """Bring a server that is over its high watermark down to the low one. Several may call it: one does it.

    `is_full`: it refused a write, whatever its watermark is. One call when there is room; else some for each
    namespace, and those of their evictions. `counts` gets what was done. Raises what a call raises, ScriptError where
    this user of the server may not see other namespaces.
    """
    memory = read_memory(client, deadline)
    budget = budget_of(config, memory.limit)
    watermark = config.low_watermark if is_full else config.high_watermark
    if not budget or memory.used <= watermark * budget:
        return Relieved()
    while not take_turn(client, RELIEVING, _RELIEVING_S, deadline):
        if not is_full:
            return Relieved()
        time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))
        memory = read_memory(client, deadline)
        if memory.used <= config.high_watermark * budget:  # the one whose turn it was has made room
            return Relieved(freed=1)
    try:
        return _relieve(client, config, budget, memory, deadline, counts)
    finally:
        client.command("UNLINK", RELIEVING, deadline=deadline)


def _relieve(
    client: Client, config: PrefixCacheConfig, budget: int, memory: Memory, deadline: float, counts: Counter[str]
) -> Relieved:
    """As `relieve`, in its turn."""
    wanted = max(int(memory.used - config.low_watermark * budget), budget // 100)
    enrolled, now_ms = read_enrolled(client, deadline)
    known = {each.standing.name: each for each in enrolled if each.is_known}
    plan = to_free([each.standing for each in known.values()], budget, wanted, now_ms)
    freed = given = removed = 0
    for standing, amount in plan:
        if time.monotonic() >= deadline:
            break
        freed += _evict(client, standing, amount, deadline, counts)
        given += 1
        since_ms = now_ms - (_ABANDONED_MS if standing.bytes else _EMPTY_MS)
        if amount >= standing.bytes and standing.used_ms < since_ms:
            removed += _remove(client, known[standing.name], since_ms, deadline)
    counts["relief_bytes"] += freed
    counts["relief_namespaces"] += given
    counts["namespaces_removed"] += removed
    _log.info("made room on the server: %d of %d bytes from %d namespaces", freed, wanted, given)
    return Relieved(wanted, freed, given, removed)


def remove_unused(client: Client, deadline: float, counts: Counter[str]) -> int:
    """Remove the namespaces that nobody has used for as long as their makers said. Returns how many.

    A call for each namespace, and those of each removal. Raises what a call raises.
    """
    enrolled, now_ms = read_enrolled(client, deadline)
    removed = 0
    for each in enrolled:
        if time.monotonic() >= deadline:
            break
        since_ms = now_ms - each.ttl_ms
        if each.ttl_ms and each.is_known and each.standing.used_ms < since_ms:
            removed += _remove(client, each, since_ms, deadline)
    counts["namespaces_removed"] += removed
    return removed


def _evict(client: Client, standing: Standing, amount: int, deadline: float, counts: Counter[str]) -> int:
    """Have a namespace give up so many bytes, whatever is leased or pinned in it. Returns the bytes that went."""
    keys = Keys(standing.name)
    bounds = Bounds(None, max(0, standing.bytes - amount), None)
    try:
        for _ in range(_CALLS):
            evicted = run(evict(bounds, _BATCH, takes_leased=True), client, keys.meta, deadline)
            counts["relief_evicted_chunks"] += evicted.chunks
            if not evicted.more:
                break
    except (NotAttachedError, SchemaError):  # removed meanwhile
        return 0
    return min(amount, standing.bytes)


def _remove(client: Client, each: Enrolled, since_ms: int, deadline: float) -> int:
    """Remove a namespace that is not used. One whose cold payloads are elsewhere stays, or they would be lost there."""
    if each.cold_is_elsewhere and each.standing.bytes:
        return 0
    try:
        return int(remove_namespace(client, each.standing.name, since_ms, deadline))
    except SchemaError:
        return 0


class Relief:
    """What one process does for the whole server. Its methods never raise on Redis failing."""

    def __init__(self, client: Client, keys: Keys, config: PrefixCacheConfig, counts: Counter[str]) -> None:
        self._client = client
        self._keys = keys
        self._config = config
        self._counts = counts
        self._warned = False
        self._refused_until: dict[str, float] = {}
        """What this user of the server may not do, and until when it is not tried again."""

    @property
    def enroll_interval_s(self) -> float:
        """How often a use of the namespace is noted, well before it would be taken for unused."""
        ttl_s = self._config.namespace_ttl_s
        return min(60.0, ttl_s / 4) if ttl_s else 60.0

    def enroll(self, deadline: float) -> None:
        """Note that this process uses its namespace. Two calls."""
        self._quietly("enroll", lambda: enroll(self._client, self._keys, self._config.namespace, deadline))

    def relieve(self, deadline: float, *, is_full: bool = False) -> bool:
        """Make room on the server where it is over its budget. Whether any was made."""
        done: list[Relieved] = []

        def work() -> None:
            done.append(relieve(self._client, self._config, deadline, is_full=is_full, counts=self._counts))

        self._quietly("relieve", work)
        return bool(done and done[0].freed)

    def remove_unused(self, deadline: float) -> None:
        """Remove namespaces that nobody uses, unless another process has looked for them lately."""

        def work() -> None:
            if take_turn(self._client, REMOVING, REMOVING_S, deadline):
                remove_unused(self._client, deadline, self._counts)

        self._quietly("remove", work)

    def _quietly(self, kind: str, work: Callable[[], object]) -> None:
        if time.monotonic() < self._refused_until.get(kind, 0.0):
            return
        try:
            work()
        except NotAttachedError:  # flushed: the next publish attaches again
            return
        except ScriptError as error:
            self._refused_until[kind] = time.monotonic() + _REFUSED_S
            self._counts["relief_refused"] += 1
            if not self._warned:
                self._warned = True
                _log.warning(
                    "this process may not look after the whole server (%s): have a user who may run "
                    "`distprefix maintain --server`",
                    error,
                )
        except DistPrefixError:
            self._counts["relief_failed"] += 1
