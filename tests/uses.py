"""What the shared tree says of how its nodes were used."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from distprefix.redis.inspect import read_node
from tests.contract.test_tree import heads
from tests.servers import Backend

__all__ = ["Use", "age", "commands", "let_pass", "node_heads", "server_ms", "uses"]

_ASKED = ("evalsha", "evalsha_ro", "get", "set")
"""Commands that calls of caches may come to; what scripts run is counted under its own names."""


class Use(NamedTuple):
    """Of a node."""

    hits: int
    accessed_ms: int


def node_heads(backend: Backend, tokens: Sequence[int]) -> list[str]:
    """Heads of the nodes on a prompt's path."""
    return [head for head in heads(list(tokens)) if read_node(backend.admin, backend.keys, head) is not None]


def uses(backend: Backend, tokens: Sequence[int]) -> list[Use]:
    """How each node on a prompt's path was used, from the root on."""
    records = [read_node(backend.admin, backend.keys, head) for head in heads(list(tokens))]
    return [Use(record.hits, record.accessed_ms) for record in records if record is not None]


def server_ms(backend: Backend) -> int:
    """The server's clock."""
    seconds, micros = backend.admin.time()  # pyright: ignore[reportGeneralTypeIssues]
    return 1000 * int(seconds) + int(micros) // 1000


def age(backend: Backend, seconds: float) -> None:
    """Everything in the tree was used last so long ago, and so stands in the order of eviction."""
    then = server_ms(backend) - int(1000 * seconds)
    admin: Any = backend.admin
    for name in admin.scan_iter(match=backend.keys.node("*"), count=1000):
        admin.hset(name, "a", str(then))
    for leaf in admin.zrange(backend.keys.leaves, 0, -1):
        admin.zadd(backend.keys.leaves, {leaf: then})


def let_pass(backend: Backend, seconds: float) -> None:
    """So much time passes: all that was used was used so much longer ago."""
    gone, admin = int(1000 * seconds), backend.admin
    for name in admin.scan_iter(match=backend.keys.node("*"), count=1000):
        admin.hincrby(name, "a", -gone)
    leaves: Any = admin.zrange(backend.keys.leaves, 0, -1)
    for leaf in leaves:
        admin.zincrby(backend.keys.leaves, -gone, leaf)


@contextlib.contextmanager
def commands(backend: Backend) -> Generator[dict[str, int]]:
    """How often the server ran scripts and commands of the data path meanwhile; filled in at the end."""
    counts: dict[str, int] = {}
    before = _calls(backend)
    yield counts
    after = _calls(backend)
    counts.update({name: after[name] - before[name] for name in after if after[name] > before[name]})


def _calls(backend: Backend) -> dict[str, int]:
    stats: Any = backend.admin.info("commandstats")
    found = {name: stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in _ASKED}
    found["script"] = found.pop("evalsha") + found.pop("evalsha_ro")
    return found
