"""Workers for tests: who counts, when leases end, what is sent."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

from distprefix import PrefixCacheOptimizer
from tests.servers import Backend

__all__ = ["LONG_S", "calls_of", "held", "learn", "let_lease_end", "sound"]

LONG_S = 600.0
"""A lease that is not renewed while a test runs."""


def learn(*caches: PrefixCacheOptimizer) -> None:
    """These caches read now who counts and until when, and what the log says."""
    for cache in caches:
        cache._state.link.roster.version = ""
        cache._state.link.refresh()
        cache.catch_up()


def let_lease_end(backend: Backend, member: str, in_s: float) -> None:
    """The lease ends so long from now, or did so long ago."""
    seconds, micros = backend.admin.time()  # pyright: ignore[reportGeneralTypeIssues]
    end = int(1000 * (seconds + micros / 1e6 + in_s))
    backend.admin.zadd(backend.keys.workers, {member: end})


def held(reader: PrefixCacheOptimizer, asked: list[int]) -> dict[str, int]:
    """Who holds how many leading chunks of a prompt, as this cache says."""
    return dict(reader.find_longest_cache_hit(asked).holders)


@contextlib.contextmanager
def calls_of(*caches: PrefixCacheOptimizer) -> Generator[list[str]]:
    """The commands that these caches send from now on: names of scripts, and of what is none."""
    sent: list[str] = []
    clients = [
        client
        for cache in caches
        for client in (cache._state.link.lookups, cache._state.link.publishes, cache._state.link.admin)
    ]

    def spy(client: Any) -> None:
        call, command = client.call, client.command

        def count_call(script: str, *args: Any) -> Any:
            sent.append(script)
            client.call = call  # it may call itself, for a server that knows no flags
            try:
                return call(script, *args)
            finally:
                client.call = count_call

        def count_command(*args: Any, **options: Any) -> Any:
            if args[0] not in ("EVALSHA", "EVALSHA_RO", "SCRIPT LOAD"):
                sent.append(args[0])
            return command(*args, **options)

        client.call, client.command = count_call, count_command

    for client in clients:
        spy(client)
    yield sent
    for client in clients:
        del client.call, client.command


def sound(cache: PrefixCacheOptimizer, chunks: int, nodes: int | None = None) -> None:
    """The tree keeps its invariants, counts exactly, and has so many chunks and nodes."""
    report = cache.check_integrity()
    assert (report.problems, report.chunks) == ([], chunks)
    assert nodes in (None, report.nodes)
