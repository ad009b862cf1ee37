"""What each kind of user does: a broad workload that comes to every right that the kind has."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import msgpack
import redis
from typer.testing import CliRunner

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer, operations
from distprefix.cli.app import app
from distprefix.errors import DistPrefixError
from distprefix.forget import forget_members
from distprefix.redis.client import Client, run
from distprefix.redis.connections import connect
from distprefix.redis.keys import PROBE, REGISTRY, Keys
from distprefix.redis.metrics import withdraw_metrics
from distprefix.redis.provision import load_scripts
from distprefix.redis.rights import Role
from distprefix.redis.roster import WorkerInfo, read_roster, register
from distprefix.tiers import operations as tiers

__all__ = ["NAMESPACE", "OTHER", "WORK", "Work", "prepare"]

NAMESPACE, OTHER = "one", "two"
"""The second has its cold payloads at a `cold_url`."""
TRUNK = list(range(160))
_TIMEOUT_S = 5.0


class Work:
    """Does things as one user, one after the other, whatever becomes of each."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.failed: list[str] = []
        """What raised, or ended with an error."""
        self.keys = Keys(NAMESPACE)

    def do(self, *steps: Callable[[], object]) -> None:
        """Take steps; one that fails is noted and the next one is taken."""
        for step in steps:
            try:
                step()
            except (DistPrefixError, redis.RedisError) as error:
                self.failed.append(str(error))

    def deadline(self) -> float:
        """For a call that begins now."""
        return time.monotonic() + _TIMEOUT_S

    def config(self, worker: str, **settings: Any) -> PrefixCacheConfig:
        """Settings of a worker with nothing in the background."""
        defaults: dict[str, Any] = {
            **{"url": self.url, "namespace": NAMESPACE, "worker_id": worker, "chunk_size": 4, "cold_codec": "raw"},
            **{"touch_interval_s": 0, "feed_interval_s": 0, "lookup_timeout_s": 5, "publish_timeout_s": 5},
            **{"prewarm_threshold": 1, "hot_threshold": 2, "max_cached_sequences": 5, "strict": True},
        }
        return PrefixCacheConfig(**{**defaults, **settings})

    def cli(self, *commands: Sequence[str]) -> None:
        """Run commands of the command line on the server, in this process."""
        for name, *rest in commands:
            done = CliRunner().invoke(app, [name, "--url", self.url, *rest], env={"DISTPREFIX_NAMESPACE": NAMESPACE})
            if done.exit_code not in (0, 1):
                self.failed.append(f"{name}: {done.output}")

    def prompt_file(self) -> str:
        """A file with the trunk's tokens."""
        path = self.folder / "prompt.json"
        path.write_text(json.dumps(TRUNK))
        return str(path)

    def events_file(self) -> str:
        """A file with an engine's events."""
        path = self.folder / "events.jsonl"
        batch = [1.0, [["BlockStored", [11, 12], None, list(range(3000, 3016)), 8, None, "GPU", None, [None, None]]], 0]
        path.write_text(json.dumps({"seq": 0, "payload_hex": bytes(msgpack.packb(batch) or b"").hex()}) + "\n")
        return str(path)


def prepare(admin: redis.Redis, url: str, folder: Path) -> None:
    """What provisioning does: scripts are loaded, namespaces and their secrets are there."""
    admin.flushall()
    load_scripts(admin)
    work = Work(url, folder)
    for namespace in (NAMESPACE, OTHER):
        cold = {"cold_url": url} if namespace == OTHER else {}
        PrefixCacheOptimizer(work.config("first", namespace=namespace, **cold)).close()
        keys = Keys(namespace)
        admin.hsetnx(keys.secret, "secret", "s" * 64)
        register(Client(admin), keys, "leased/0", 0, 3600, WorkerInfo(), work.deadline())


def _worker(work: Work) -> None:
    """Publish, find, store, move, evict, take back; a cold tier elsewhere; events; what happens in the background."""
    work.do(
        lambda: _use_tree(work), lambda: _use_payloads(work), lambda: _use_cold_url(work), lambda: _look_after(work)
    )
    work.cli(
        ("lookup", work.prompt_file()),
        ("workers",),
        ("ingest", "--file", work.events_file(), "--worker", "engine"),
        ("workers", "--drop", "engine"),
    )


def _use_tree(work: Work) -> None:
    with (
        PrefixCacheOptimizer(work.config("a", worker_lease_s=3600)) as a,
        PrefixCacheOptimizer(work.config("b")) as b,
    ):
        work.do(
            lambda: a.cache_prefix(TRUNK, range(40), metadata={"kind": "trunk"}),
            lambda: b.cache_prefix(TRUNK[:80] + list(range(900, 940)), range(30)),
            lambda: b.find_longest_cache_hit(TRUNK).lease(5).renew(5),
            lambda: b.find_longest_cache_hit(list(range(70_000, 70_040))).claim(5).release(),
            lambda: b.find_longest_cache_hit(list(range(70_000, 70_040))).claim(5),
            lambda: a.find_longest_cache_hit(list(range(70_000, 70_040))).claim(5),  # b has it
            lambda: (a.pin(TRUNK), a.unpin(TRUNK)),
            lambda: (a.flush(), b.flush(), a.catch_up(), a.get_prewarm_candidates(), b.prewarm()),
            lambda: (a.cache_prefix(TRUNK[:40] + [7] * 40), b.catch_up(), b.catch_up()),
            lambda: a.remove_skipped_blocks([3]),
            *(lambda i=i: a.cache_prefix(list(range(1000 * i, 1000 * i + 8))) for i in range(12)),
            lambda: (a.maintain(), a.workers(), a.register_worker(), a._state.link.heartbeat()),
            lambda: a.update_prefix_state(a.cache_prefix(TRUNK, range(40)), range(50, 90)),
            lambda: (a._upkeep._report(), withdraw_metrics(a._state.link.admin, work.keys, "x", work.deadline())),
        )


def _use_payloads(work: Work) -> None:
    payloads = [bytes([i]) * 300 for i in range(40)]
    with (
        PrefixCacheOptimizer(work.config("p")) as writer,
        PrefixCacheOptimizer(work.config("q")) as reader,
    ):
        store = writer._tiers.payloads.warm
        work.do(
            lambda: writer.store(TRUNK, payloads),
            lambda: reader.load(TRUNK),
            lambda: reader.demote(-60),
            lambda: reader.load(TRUNK),
            lambda: reader.promote(TRUNK),
            lambda: store.pool.set([(work.keys.payload(_chunk(writer, 39)), [b"x" * 340])], work.deadline()),
            lambda: reader.load(TRUNK),  # finds it damaged, and says so
        )
        work.do(lambda: store.pool.delete([PROBE], work.deadline()))  # as a probe of a server that was off


def _chunk(cache: PrefixCacheOptimizer, at: int) -> str:
    """Name of a chunk of the trunk."""
    return cache._state.chain(cache._state.read(TRUNK))[16 * at : 16 * at + 16].hex()


def _use_cold_url(work: Work) -> None:
    payloads = [bytes([i]) * 300 for i in range(40)]
    with PrefixCacheOptimizer(work.config("c", namespace=OTHER, cold_url=work.url)) as cache:
        server = cache._tiers.payloads.cold
        assert server is not None
        cold_keys = Keys(OTHER)
        work.do(
            lambda: cache.store(TRUNK, payloads),
            lambda: cache.demote(-60),
            lambda: cache.load(TRUNK),
            lambda: server.pool.set([(cold_keys.payload(_chunk(cache, 39), cold=True), [b"x" * 340])], work.deadline()),
            lambda: cache.load(TRUNK),
            lambda: server.pool.delete([cold_keys.payload(_chunk(cache, 20), cold=True)], work.deadline()),
            lambda: cache.load(TRUNK),
            cache.clear,
            lambda: cache.demote(-60),
        )


def _look_after(work: Work) -> None:
    """What workers do once a day, or after others are gone."""
    with PrefixCacheOptimizer(work.config("d")) as d:
        calls = d._state.link.admin
        work.do(
            lambda: PrefixCacheOptimizer(work.config("gone")).close(),
            lambda: PrefixCacheOptimizer(work.config("gone")).close(),
            lambda: (d.drop_worker("gone"), d.drop_worker("b"), d.sweep()),
            lambda: forget_members(calls, work.keys, work.deadline(), after_s=-60),
            lambda: calls.command("ZADD", REGISTRY, 1, NAMESPACE, deadline=work.deadline()),
            *(
                lambda keys=keys: calls.command("HGET", keys.secret, "secret", deadline=work.deadline())
                for keys in (work.keys, Keys(OTHER))
            ),
        )


def _reader(work: Work) -> None:
    """Where a prompt is, who lives, what changed."""
    client = connect(work.url, _TIMEOUT_S)
    calls = Client(client)
    meta = work.keys.meta
    chain = b""
    with contextlib.suppress(redis.RedisError):
        junction: Any = client.hkeys(work.keys.junction(""))
        chain = bytes.fromhex(junction[0].decode())
    work.do(
        lambda: run(operations.walk(chain, 0), calls, meta, work.deadline()),
        lambda: run(tiers.where([chain]), calls, meta, work.deadline()),
        lambda: run(operations.hot(10), calls, meta, work.deadline()),
        lambda: run(operations.prewarm([chain.hex()], 10), calls, meta, work.deadline()),
        lambda: calls.call("feed", meta, (operations.SCHEMA, "", 10), work.deadline()),
        lambda: calls.call("feed", meta, (operations.SCHEMA, "0-0", 10), work.deadline()),
        lambda: calls.call("guess", meta, (operations.SCHEMA, chain.hex(), 10), work.deadline()),
        lambda: read_roster(calls, work.keys, "", work.deadline()),
        lambda: calls.command("HGET", work.keys.secret, "secret", deadline=work.deadline()),
    )
    client.close()
    work.cli(("lookup", work.prompt_file()), ("workers",))


def _inspector(work: Work) -> None:
    """All commands that show something; what docs/redis-cli.md has beyond that is run by its own test."""
    client = connect(work.url, _TIMEOUT_S)
    heads: list[str] = []
    with contextlib.suppress(redis.RedisError):
        found: Any = client.hkeys(work.keys.junction(""))
        heads = [head.decode() for head in found]
    node = work.keys.node(heads[0] if heads else "0")
    for command in (
        *(("EXISTS", node), ("HMGET", node, "p"), ("HLEN", node), ("HSCAN", node, 0), ("HSTRLEN", node, "r")),
        *(("HKEYS", node), ("MEMORY", "USAGE", node), ("OBJECT", "ENCODING", node), ("TYPE", node)),
        *(("GET", work.keys.claim("x")), ("PTTL", work.keys.moving("x")), ("GET", work.keys.version)),
        *(("XREVRANGE", work.keys.log, "+", "-"), ("XRANGE", work.keys.log, "-", "+"), ("XLEN", work.keys.log)),
        *(("XINFO", "STREAM", work.keys.log), ("ZREVRANGE", work.keys.hot, 0, 9), ("ZSCORE", work.keys.leaves, "x")),
        *(("ZMSCORE", work.keys.leaves, "x"), ("ZRANGE", work.keys.changes, 0, -1), ("HGETALL", work.keys.trash)),
        *(("HGETALL", key) for key in (work.keys.swept, work.keys.voided, work.keys.writers, work.keys.holders)),
        *(("TYPE", key) for key in (work.keys.trash, work.keys.kept, work.keys.unsettled)),
        *(("TYPE", key) for key in (work.keys.sweeping, work.keys.forgetting)),
    ):
        with contextlib.suppress(redis.ResponseError):
            client.execute_command(*command)
    client.close()
    head = heads[0] if heads else "0" * 32
    work.cli(("stats",), ("tree",), ("top",), ("workers",), ("namespaces",), ("node", head), ("node", head[:10]))


def _operator(work: Work) -> None:
    """All that keeps namespaces in order, and what workers do."""
    with connect(work.url, _TIMEOUT_S) as client, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        work.do(lambda: load_scripts(client), lambda: client.script_load("return 1"))
    _worker(work)
    where = ("--namespace", OTHER)
    work.cli(
        *(("namespaces",), ("stats",), ("maintain", "--repair"), ("maintain", "--max-chunks", "1")),
        *(
            ("maintain", "--repair", *where, "--cold-url", work.url),
            ("audit",),
            ("audit", *where, "--cold-url", work.url),
        ),
        *(("restored", "--all"), ("provision", "--namespace", "three", "--set", "chunk_size=4")),
    )


WORK: dict[Role, Callable[[Work], None]] = {
    Role.WORKER: _worker,
    Role.READER: _reader,
    Role.INSPECTOR: _inspector,
    Role.OPERATOR: _operator,
}
"""By the kind of user."""
