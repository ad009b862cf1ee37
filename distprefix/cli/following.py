"""What `distprefix ingest` follows: engines by their endpoints, or a file of messages."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import redis

from distprefix.config import PrefixCacheConfig
from distprefix.errors import ConfigError, InvalidInputError, ReplayError
from distprefix.events.frames import Frame
from distprefix.events.ingester import Engine, follower_of, status_of
from distprefix.events.limits import EngineLimits
from distprefix.lines import parse_json, read_lines
from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.redis.namespace import attach

__all__ = ["engines_of", "follow_file"]

_BATCH = 1000
_WRITE_S = 10.0
_PAUSE_S = 0.05
_MAX_LINE_BYTES = (64 << 20) + 4096
"""A message of 32 MiB in hex."""
_END_SEQUENCE = 2**64 - 1


def engines_of(
    endpoints: Sequence[str],
    replays: Sequence[str],
    workers: Sequence[str],
    addresses: Sequence[str],
    *,
    ranks: int,
    own_ranks: Sequence[int] = (),
    common: Mapping[str, Any],
) -> list[Engine]:
    """One for each rank of each endpoint, or for the one rank in `own_ranks` that an endpoint is of.

    `common`: other fields of `Engine`, the same for all. Raises ConfigError when the lists do not go together.
    """
    if not endpoints:
        raise ConfigError("nothing to follow: pass --engine tcp://host:port and --worker NAME, or --file")
    if own_ranks and ranks > 1:
        raise ConfigError(
            "--ranks counts ports up from rank 0, --rank says of which rank each port is: pass one of both"
        )
    lists = {"worker": workers, "replay": replays, "address": addresses, "rank": own_ranks}
    for name, given in lists.items():
        if len(given) != len(endpoints) and (given or name == "worker"):
            raise ConfigError(f"--{name} is given {len(given)} times for {len(endpoints)} engines: one for each")
    return [
        Engine(
            worker=workers[i],
            rank=own_ranks[i] if own_ranks else rank,
            endpoint=_shifted(endpoint, rank),
            replay=_shifted(replays[i], rank) if replays else None,
            address=addresses[i] if addresses else "",
            **common,
        )
        for i, endpoint in enumerate(endpoints)
        for rank in range(ranks)
    ]


def _shifted(endpoint: str, rank: int) -> str:
    """Engines give each data-parallel rank the port after the one before."""
    found = re.fullmatch(r"(.*:)(\d+)", endpoint)
    return f"{found[1]}{int(found[2]) + rank}" if found and rank else endpoint


class _NothingToReplay:
    def replay(self, start: int, timeout_s: float, **_: Any) -> Iterator[Frame]:  # noqa: ARG002 - as engines are asked
        """A file is read once."""
        raise ReplayError


def follow_file(
    path: Path,
    engine: Engine,
    config: PrefixCacheConfig,
    client: redis.Redis,
    *,
    engine_chains: bool,
    limits: EngineLimits | None = None,
) -> dict[str, Any]:
    """Apply the messages of a file: JSON lines with `seq` and `payload_hex`, gzip or plain. Returns how it went.

    The file is read whole before anything is written. Raises InvalidInputError for a file or line that makes no sense.
    The worker holds no lease: what the file says counts until the worker is dropped or registered again.
    """
    frames = list(_messages(path))
    calls = Client(client)
    hasher = attach(calls, Keys(config.namespace), config, time.monotonic() + 5).hasher
    follower, journal = follower_of(
        engine,
        config,
        hasher,
        calls,
        _NothingToReplay(),
        lease_s=0.0,
        engine_chains=engine_chains,
        limits=limits,
    )
    if not follower.begin():
        raise ConfigError(f"another ingester writes the events of {engine.worker}")
    try:
        for start in range(0, len(frames), _BATCH):
            follower.take(frames[start : start + _BATCH])
        until = time.monotonic() + _WRITE_S
        while not follower.is_written and time.monotonic() < until:  # a file that clears all the time is paced
            time.sleep(_PAUSE_S)
            follower.write()
    finally:
        journal.resign()
    return status_of(engine, follower, "done", Counter())


def _messages(path: Path) -> Iterator[Frame]:
    for line in read_lines(str(path), _MAX_LINE_BYTES, InvalidInputError):
        try:
            row: Any = parse_json(line.text)
            if row.get("payload_hex") is not None:
                yield Frame(_sequence(row["seq"]), bytes.fromhex(row["payload_hex"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInputError(f"{line.where}: no message with seq and payload_hex ({error})") from error


def _sequence(value: Any) -> int:
    """A sequence number as engines have them: eight bytes, of which all ones mean the end."""
    if type(value) is not int or not 0 <= value < _END_SEQUENCE:
        raise ValueError(f"seq is {repr(value)[:40]}")
    return value
