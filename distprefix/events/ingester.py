"""Following engines' events into the shared tree, each in a thread of its own, for as long as this process lives."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import redis

from distprefix.background import Schedule
from distprefix.config import SHORTEST_LEASE_S, PrefixCacheConfig, check_name
from distprefix.errors import ConfigError, DistPrefixError, FencedError, LostHistoryError, NotAttachedError
from distprefix.events.engine import Connected, EngineSocket
from distprefix.events.follower import Follower
from distprefix.events.frames import Frame
from distprefix.events.holdings import Holdings
from distprefix.events.limits import EngineLimits
from distprefix.hashing import ChunkHasher
from distprefix.printable import printable
from distprefix.redis.address import parse_address
from distprefix.redis.client import Client
from distprefix.redis.connections import connect
from distprefix.redis.endpoint import Endpoint
from distprefix.redis.journal import RedisJournal
from distprefix.redis.keys import Keys
from distprefix.redis.namespace import attach
from distprefix.redis.proof import prove
from distprefix.redis.roster import WorkerInfo, read_members
from distprefix.sweep import sweep

__all__ = ["Engine", "Ingester", "follower_of", "status_of"]

_log = logging.getLogger("distprefix")
_TIMEOUT_S = 5.0
_WAIT_S = 0.2
_SWEEP_S = 10.0
_MAX_STATE = 300
_SWEEP_TIMEOUT_S = 60.0
_TWO_MODELS = (
    "the model here is {0!r}, and {1} serves {2!r}: give each model a namespace, "
    "or pass --same-model when both names mean one model"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """An engine, or one data-parallel rank of it, and what it is called in the namespace.

    Raises ConfigError for a name or a kind that cannot be.
    """

    worker: str
    endpoint: str
    """Where it publishes, ``tcp://host:port``; ``tcp://*:port`` when it connects to us."""
    replay: str | None = None
    """Where it answers for what was missed. Without it every gap and every restart costs what it holds."""
    rank: int = 0
    kind: str = "auto"
    """vllm, sglang, or auto."""
    is_plain: bool = False
    """Where the engine does not say what a block depends on besides tokens, it depends on nothing: no salts, no images.
    Otherwise such blocks are credited to nobody."""
    topic: str = ""
    model: str = ""
    address: str = ""
    """Where it takes requests, for routers."""

    def __post_init__(self) -> None:
        check_name("worker", self.worker)
        if self.kind not in ("auto", "vllm", "sglang"):
            raise ConfigError(f"kind is {self.kind!r}: it must be auto, vllm or sglang")

    @property
    def member(self) -> str:
        """This rank of the worker."""
        return f"{self.worker}/{self.rank}"


def follower_of(
    engine: Engine,
    config: PrefixCacheConfig,
    hasher: ChunkHasher,
    client: Client,
    replays: Any,
    *,
    lease_s: float,
    engine_chains: bool,
    limits: EngineLimits | None = None,
    ticks: Callable[[], float] = time.monotonic,
) -> tuple[Follower, RedisJournal]:
    """What follows this engine into the namespace that the settings name."""
    keys = Keys(config.namespace)
    holdings = Holdings(
        config.chunk_size,
        hasher,
        engine_chains=engine_chains,
        max_blocks=config.max_own_chunks,
        limits=limits,
    )
    info = WorkerInfo(engine.address, engine.model)
    journal = RedisJournal(client, keys, engine.member, engine.endpoint, info, lease_s=lease_s, max_run=config.max_run)
    follower = Follower(
        engine.member,
        holdings,
        journal,
        replays,
        kind=engine.kind,
        is_plain=engine.is_plain,
        rank=engine.rank,
        beat_s=(lease_s or SHORTEST_LEASE_S) / 3,
        clock=time.time,
        ticks=ticks,
    )
    return follower, journal


def status_of(engine: Engine, follower: Follower, state: str, before: Counter[str]) -> dict[str, Any]:
    """How following goes; `before`: what was counted of messages before they got there."""
    holdings, position = follower.holdings, follower.position
    counts = {**follower.counts, **holdings.counts, **before}
    return {
        "worker": engine.worker,
        "rank": engine.rank,
        "endpoint": engine.endpoint,
        "state": state,
        "epoch": follower.epoch,
        "sequence": position.seq if position else None,
        "chunks": dict(holdings.chunks),
        "blocks": len(holdings),
        "block_bytes": holdings.bytes,
        "parked": holdings.parked,
        "lag_s": round(follower.lag_s, 3),
        "counts": dict(sorted(counts.items())),
    }


class Ingester:
    """Follows engines until it is stopped. Several may be started for one engine: one writes, the others stand by.

    A worker's lease lasts `lease_s` after its engine was last heard of, and so does the right to write: another
    ingester goes on that long after this one died, from the message written last. `limits` bounds what each engine may
    make it keep. An engine whose model is not the one that live workers of the namespace name is not followed, unless
    `same_model` says that the names mean one: what its blocks hold is of no use to the others.
    Raises ConfigError, NamespaceError or UnavailableError when it cannot begin.
    """

    def __init__(
        self,
        config: PrefixCacheConfig,
        engines: Sequence[Engine],
        *,
        lease_s: float = 10.0,
        engine_chains: bool = False,
        same_model: bool = False,
        client: redis.Redis | None = None,
        limits: EngineLimits | None = None,
    ) -> None:
        members = [engine.member for engine in engines]
        twice = [member for member, times in Counter(members).items() if times > 1]
        if twice or not engines:
            raise ConfigError(f"{twice[0]} is named twice: every engine needs a name" if twice else "name an engine")
        self._same_model = same_model
        models = sorted({engine.model for engine in engines if engine.model})
        if len(models) > 1 and not same_model:
            raise ConfigError(_TWO_MODELS.format(models[0], "another engine here", models[1]))
        if lease_s < SHORTEST_LEASE_S:
            raise ConfigError(f"lease_s is {lease_s}: at least {SHORTEST_LEASE_S:g} seconds are needed")
        self.config = config
        if client is None and config.url is not None:
            prove(parse_address(config.url), _TIMEOUT_S)
        endpoint = Endpoint("url")
        self.client = Client(client or connect(config.url or "", _TIMEOUT_S, endpoint), endpoint=endpoint)
        """The way to Redis that the streams share."""
        self._keys = Keys(config.namespace)
        self._secret = b""
        self._sweeps = Schedule()
        self._sweeping = threading.Lock()
        self.attach()
        self._stop = threading.Event()
        self.streams = [Stream(engine, self, lease_s, limits, engine_chains=engine_chains) for engine in engines]
        self._threads = [
            threading.Thread(target=stream.run, args=(self._stop,), daemon=True) for stream in self.streams
        ]

    def start(self) -> Self:
        """Begin. Returns itself."""
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """End, and let other ingesters go on at once. The workers' leases run out unless one does."""
        self._stop.set()
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(timeout=2 * _TIMEOUT_S)
        self.client.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def attach(self) -> None:
        """Make the namespace, or compare with it; anew after a flush. Raises what `attach` raises."""
        deadline = time.monotonic() + _TIMEOUT_S
        attached = attach(self.client, self._keys, self.config, deadline, self._secret)
        self._secret = attached.secret
        self.hasher = attached.hasher
        """What names the namespace's chunks."""

    def check_model(self, engine: Engine) -> None:
        """Raise ConfigError when another worker that lives here serves another model."""
        if self._same_model or not engine.model:
            return
        for member in read_members(self.client, self._keys, time.monotonic() + _TIMEOUT_S):
            other = member.info.model
            lives = member.lease_left_s is not None and member.lease_left_s > 0
            if lives and other not in ("", engine.model):
                raise ConfigError(_TWO_MODELS.format(engine.model, member.name, other))

    def sweep(self) -> None:
        """Take away what no longer counts, of anybody, now and then: one of the streams does it for all."""
        with self._sweeping:
            due = self._sweeps.is_due("sweep", _SWEEP_S)
        if due:
            sweep(self.client, self._keys, time.monotonic() + _SWEEP_TIMEOUT_S)


class Stream:
    """One engine's thread."""

    def __init__(
        self, engine: Engine, ingester: Ingester, lease_s: float, limits: EngineLimits | None, *, engine_chains: bool
    ) -> None:
        self.engine = engine
        self.state = "starting"
        """starting, waiting for the engine, following, standby, or what went wrong."""
        self._ingester = ingester
        self._socket = EngineSocket(engine.endpoint, engine.replay, topic=engine.topic, limits=limits)
        self._lease_s = lease_s
        self._engine_chains = engine_chains
        self._limits = limits
        self._begin_anew()
        self._beat_s = lease_s / 3
        self._leads = False
        self._schedule = Schedule()

    def status(self) -> dict[str, Any]:
        """How it goes, for people and JSON."""
        dropped = Counter({f"dropped_{name}": count for name, count in self._socket.dropped.items()})
        return status_of(self.engine, self.follower, self.state, dropped + self._socket.counts)

    def run(self, stop: threading.Event) -> None:
        """Follow the engine until `stop` is set."""
        try:
            while not stop.is_set():
                self._round(stop)
        finally:
            self._socket.close()
            if self._leads:
                self._quietly(self._journal.resign)

    def _round(self, stop: threading.Event) -> None:
        try:
            self._step()
        except FencedError:
            self._leads, self.state = False, "standby"
        except LostHistoryError as error:
            self.follower.reports.warning("history_lost", "the stream goes on from what Redis still has: %s", error)
            self._leads = False
            self.follower.counts["history_lost"] += 1
            self._schedule.hasten("begin")
        except NotAttachedError:
            self._leads = False
            self._quietly(self._ingester.attach)
            if self._hasher.check != self._ingester.hasher.check:
                self._begin_anew()  # another process has made the namespace, with another secret
        except DistPrefixError as error:
            self._trouble(str(error))
            stop.wait(1.0)
        except Exception as error:  # noqa: BLE001 - the thread must go on, whatever it met
            self.follower.reports.exception("failed", "following the engine failed")
            self._trouble(f"failed: {error}")
            stop.wait(1.0)

    def _begin_anew(self) -> None:
        """Know nothing of the engine, and name its chunks as the namespace does now."""
        ingester = self._ingester
        self._hasher = ingester.hasher
        self.follower, self._journal = follower_of(
            self.engine,
            ingester.config,
            self._hasher,
            ingester.client,
            self._socket,
            lease_s=self._lease_s,
            engine_chains=self._engine_chains,
            limits=self._limits,
        )

    def _trouble(self, state: str) -> None:
        """What is in memory may differ from what was written: go on from there."""
        self._leads = False
        self.state = printable(state, _MAX_STATE)
        self.follower.counts["troubles"] += 1

    def _step(self) -> None:
        self.follower.reports.flush()
        frames, connected = list[Frame](), False
        for arrival in self._socket.receive(_WAIT_S):
            if isinstance(arrival, Frame):
                frames.append(arrival)
            elif isinstance(arrival, Connected):
                connected = True
            else:
                self.follower.reports.warning("gone", "the engine at %s is gone", self.engine.endpoint)
                if self._leads:
                    self.follower.suspend()
        if not self._leads:
            self._begin(frames)
            return
        self._keep(known=not connected)
        if connected:
            self.follower.resume()
            self._schedule.hasten("beat")  # it counts again
            frames = self._not_replayed(frames)
        self.follower.take(frames)
        self.state = "following" if self._socket.connected else "waiting for the engine"

    def _begin(self, frames: list[Frame]) -> None:
        if not self._socket.connected:
            self.state = "waiting for the engine"
        elif self._schedule.is_due("begin", 1.0):
            self._ingester.check_model(self.engine)
            self._leads = self.follower.begin()
            self.state = "following" if self._leads else "standby"
            if self._leads:
                self.follower.take(self._not_replayed(frames))
                self._schedule.hasten("beat")

    def _not_replayed(self, frames: list[Frame]) -> list[Frame]:
        """What came before the engine was asked is in its answer, or came from an engine that is no more."""
        return [] if self.follower.answered else frames

    def _keep(self, *, known: bool) -> None:
        """Say that this ingester lives, and the engine if it does and is `known` to be the one that it was."""
        if self._schedule.is_due("beat", self._beat_s):
            lead, follower = self._journal.lead(), self.follower
            if lead is None or (lead.epoch == follower.epoch and lead.position != follower.position):
                raise FencedError  # another has the right, or had it and wrote
            if not known:
                self._schedule.hasten("beat")
            elif self._socket.connected:
                self.follower.heartbeat()
        self._quietly(self._ingester.sweep)

    def _quietly(self, what: Any) -> None:
        try:
            what()
        except DistPrefixError as error:
            _log.debug("%s: %s", self.engine.member, error)
