"""What `distprefix ingest` follows: engines by their endpoints, or a file of messages."""

from __future__ import annotations

import gzip
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import redis

from distprefix.config import PrefixCacheConfig
from distprefix.errors import ConfigError, InvalidInputError, ReplayError
from distprefix.events.frames import Frame
from distprefix.events.ingester import Engine, follower_of, status_of
from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.redis.namespace import attach

__all__ = ["engines_of", "follow_file"]

_BATCH = 1000


def engines_of(
    endpoints: Sequence[str],
    replays: Sequence[str],
    workers: Sequence[str],
    addresses: Sequence[str],
    *,
    ranks: int,
    kind: str,
    model: str,
    topic: str,
) -> list[Engine]:
    """One for each rank of each endpoint. Raises ConfigError when the lists do not go together."""
    if not endpoints:
        raise ConfigError("nothing to follow: pass --engine tcp://host:port and --worker NAME, or --file")
    for name, given in (("worker", workers), ("replay", replays), ("address", addresses)):
        if len(given) != len(endpoints) and (given or name == "worker"):
            raise ConfigError(f"--{name} is given {len(given)} times for {len(endpoints)} engines: one for each")
    return [
        Engine(
            worker=workers[i],
            rank=rank,
            endpoint=_shifted(endpoint, rank),
            replay=_shifted(replays[i], rank) if replays else None,
            kind=kind,
            model=model,
            topic=topic,
            address=addresses[i] if addresses else "",
        )
        for i, endpoint in enumerate(endpoints)
        for rank in range(ranks)
    ]


def _shifted(endpoint: str, rank: int) -> str:
    """Engines give each data-parallel rank the port after the one before."""
    found = re.fullmatch(r"(.*:)(\d+)", endpoint)
    return f"{found[1]}{int(found[2]) + rank}" if found and rank else endpoint


class _NothingToReplay:
    def replay(self, start: int, timeout_s: float) -> Iterator[Frame]:  # noqa: ARG002 - as engines are asked
        """A file is read once."""
        raise ReplayError


def follow_file(
    path: Path, worker: str, config: PrefixCacheConfig, client: redis.Redis, *, kind: str, engine_chains: bool
) -> dict[str, Any]:
    """Apply the messages of a file: JSON lines with `seq` and `payload_hex`, gzip or plain. Returns how it went.

    The file is read whole before anything is written. Raises InvalidInputError for a file or line that makes no sense.
    The worker holds no lease: what the file says counts until the worker is dropped or registered again.
    """
    frames = list(_messages(path))
    calls = Client(client)
    hasher = attach(calls, Keys(config.namespace), config, time.monotonic() + 5).hasher
    engine = Engine(worker=worker, endpoint=str(path), kind=kind)
    follower, journal = follower_of(
        engine, config, hasher, calls, _NothingToReplay(), lease_s=0.0, engine_chains=engine_chains
    )
    if not follower.begin():
        raise ConfigError(f"another ingester writes the events of {worker}")
    try:
        for start in range(0, len(frames), _BATCH):
            follower.take(frames[start : start + _BATCH])
    finally:
        journal.resign()
    return status_of(engine, follower, "done", Counter())


def _messages(path: Path) -> Iterator[Frame]:
    try:
        data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line) if line.strip() else {}
            if row.get("payload_hex") is not None:
                yield Frame(int(row["seq"]), bytes.fromhex(row["payload_hex"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InvalidInputError(f"{path}, line {number}: no message with seq and payload_hex ({error})") from error
