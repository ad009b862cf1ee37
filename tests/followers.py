"""Followers of engines that are lists of messages."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from distprefix import PrefixCacheOptimizer
from distprefix.errors import ReplayError
from distprefix.events.follower import Follower
from distprefix.events.frames import Frame
from distprefix.events.ingester import Engine, follower_of
from distprefix.redis.journal import RedisJournal
from tests.servers import Backend

__all__ = ["Kept", "follow", "holders"]


class Kept:
    """What an engine can send again; None when it cannot be asked."""

    def __init__(self, frames: Sequence[Frame] | None = None) -> None:
        self.frames = None if frames is None else list(frames)

    def replay(self, start: int, timeout_s: float, **_: Any) -> Iterator[Frame]:
        """Messages from `start` on."""
        if self.frames is None:
            raise ReplayError
        yield from [frame for frame in self.frames if frame.seq >= start]


def follow(
    backend: Backend, kept: Kept, worker: str = "w", *, lease_s: float = 30.0, **settings: Any
) -> tuple[Follower, RedisJournal]:
    """A follower of a worker's rank 0 in the backend's namespace; the rest are settings of the cache or the engine."""
    kind, chains = settings.pop("kind", "auto"), settings.pop("engine_chains", False)
    rank, is_plain = settings.pop("rank", 0), settings.pop("is_plain", False)
    ticks: Callable[[], float] = settings.pop("ticks", time.monotonic)
    reader = backend.open("attaches", **settings)  # makes the namespace
    engine = Engine(worker=worker, endpoint="tcp://nowhere:1", kind=kind, rank=rank, is_plain=is_plain)
    client = reader._state.link.admin
    hasher = reader._state.link.hasher
    return follower_of(engine, reader.config, hasher, client, kept, lease_s=lease_s, engine_chains=chains, ticks=ticks)


def holders(reader: PrefixCacheOptimizer, tokens: Any, **extras: Any) -> dict[str, int]:
    """Who holds how many chunks of a prompt, by Redis: L1 is told to forget."""
    reader.catch_up()
    reader._state.link.refresh()
    chain = reader.chain_of(tokens, **extras) if any(extras.values()) else tokens
    return {holder.name: holder.chunks for holder in reader.find_longest_cache_hit(chain).holders}
