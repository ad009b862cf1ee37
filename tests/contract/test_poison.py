"""No value in Redis traps anybody: whatever a foreign writer puts there, scripts end and calls answer."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from distprefix import PrefixCacheOptimizer, operations
from distprefix.errors import DistPrefixError, NotAttachedError, SchemaError
from distprefix.redis.client import Client
from distprefix.redis.inspect import children_of, find_node, read_stats
from distprefix.redis.integrity import check_integrity
from distprefix.redis.keys import REGISTRY
from distprefix.redis.namespaces import summarize_namespaces
from distprefix.redis.repair import repair
from distprefix.redis.scripts import SCRIPTS, load_script
from distprefix.redis.workers import describe_workers
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.poison import Change, Stored, changes
from tests.servers import Backend

LONG = prompt(40)
BRANCH = prompt(40, tail=20)
OTHER = [9000 + at for at in range(48)]
PROMPTS = (LONG, BRANCH, OTHER)
_MAX_COMMANDS = 25_000
"""That one script call may run: the longest takes some milliseconds on a sound tree, and so does this."""


def chain(tokens: list[int]) -> bytes:
    """A prompt's chunk hashes."""
    return bytes.fromhex("".join(heads(tokens)))


def settings(**more: Any) -> dict[str, Any]:
    """What readers in these tests have: they degrade, and everything is due."""
    return {
        "strict": False,
        "prewarm_threshold": 1,
        "hot_threshold": 2,
        "cold_codec": "raw",
        "payload_timeout_s": 2.0,
        "publish_timeout_s": 5.0,
        **more,
    }


def build(backend: Backend) -> None:
    """Workers, branches, payloads in both tiers, leases, a claim, a stream, candidates and reports."""
    one = backend.open("a", worker_lease_s=3600, **settings())
    two = backend.open("b", **settings())
    one.cache_prefix(LONG, range(40), metadata={"kind": "long"})
    two.cache_prefix(BRANCH, range(100, 140))
    one.store(LONG, [os.urandom(100)] * 40)
    one.store(OTHER, [bytes(200)] * 12)
    two.demote(idle_s=0)
    one.store(BRANCH, [os.urandom(100)] * 40)
    for each in (one, two):
        for tokens in PROMPTS:
            each.find_longest_cache_hit(tokens)
        each.flush()
    two.find_longest_cache_hit(LONG).lease(ttl_s=3600)
    two.find_longest_cache_hit(prompt(8, tail=8)).claim(ttl_s=3600)
    one.pin(OTHER)
    call(backend, "stream", "eng/0", "owner", 3_600_000, "test")
    call(backend, "report", "a/0@gpu x", b"\x81\xa7lookups\x01", meta=f"dp:{{{backend.namespace}}}:metrics")


def call(backend: Backend, script: str, *args: Any, meta: str = "") -> Any:
    """Run a script as anybody can."""
    loaded = load_script(script)
    admin: Any = backend.admin
    shard = loaded.tells_damage
    first = (operations.SCHEMA,) if shard else ()
    return admin.eval(loaded.body, 1, meta or backend.keys.meta, *first, *args)


def script_calls(backend: Backend) -> dict[str, Callable[[], object]]:
    """Every script, with arguments that it may get."""
    long, branch = chain(LONG), chain(BRANCH)
    root, lower = heads(LONG)[0], heads(BRANCH)[20]
    epochs = backend.keys.epochs
    everybody = ("a/0@gpu", 10**15, "b/0@gpu", 10**15, "@warm", 10**15)

    def do(script: str, *args: Any, meta: str = "") -> Callable[[], object]:
        return lambda: call(backend, script, *args, meta=meta)

    return {
        "attach": do("attach", "schema", "4", meta=backend.keys.descriptor),
        "census": do("census", 10_000, "root"),
        "claim": do("claim", lower, "c", 1000),
        "disprove": do("disprove", "@warm", long[:16], b"\x8c\0\0\0", b"", "", "", 1000),
        "drop": do("drop", root, "", 1000),
        "dropped": do("dropped", lower, bytes.fromhex(lower)),
        "enroll": do("enroll", backend.namespace, meta=REGISTRY),
        "erase": do("erase", 10**12),
        "evict": do("evict", 25, 0, "", "", "", 0, "1"),
        "feed": do("feed", "0-0", 1000),
        "forget": do("forget", 0, "a/0", "b/0", meta=epochs),
        "guess": do("guess", heads(LONG)[19], 512),
        "heartbeat": do("heartbeat", "a/0", 1, 1000, 0, meta=epochs),
        "hot": do("hot", 0, 200),
        "idle": do("idle", 0, 0, 50, ""),
        "ingest": do(
            *("ingest", 256, "eng/0", "1 0", 10**13, "1", "d", "1.0", b"", "gpu", 0, long, b"12345678" * 40),
            *("gpu", "", long[:160], b""),
        ),
        "insert": do("insert", 256, "c/0@gpu", 1, 0, branch + os.urandom(64), b"", b""),
        "lease": do("lease", "x", 1000, long),
        "move": do("move", root, "@warm", b"\x8c\0\0\0" * 20, b"\x8c\0\0\0" * 20),
        "prewarm": do("prewarm", 4096, lower, root, heads(OTHER)[0]),
        "register": do("register", "c/0", 0, 1000, meta=epochs),
        "repair": do("repair", 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1),
        "report": do("report", "x", b"\x80", meta=f"dp:{{{backend.namespace}}}:metrics"),
        "restored": do("restored"),
        "retire": do("retire", "a/0", "", meta=epochs),
        "roster": do("roster", "", "-inf", 0, 500, "a/0", meta=epochs),
        "settled": do("settled", root, long[:160]),
        "store": do("store", 256, 0, long, 0),
        "stream": do("stream", "eng/0", "owner", 1000, "test"),
        "sweep": do("sweep", 1000, "root", *everybody),
        "touch": do("touch", 2, root, 1, 0, lower, 1, 0, heads(OTHER)[0], 1, 0),
        "trim": do("trim", "@warm", 1, long[:160], "", 1000),
        "turn": do("turn", 1, meta=f"{backend.keys.base}turn"),
        "used": do("used"),
        "walk": do("walk", "a/0@gpu", long),
        "where": do("where", long, branch),
    }


def readers(backend: Backend, cache: PrefixCacheOptimizer) -> Iterator[tuple[str, Callable[[], object]]]:
    """Every public call that reads or maintains, those that change most last."""
    keys, admin = backend.keys, backend.admin
    client = Client(admin)
    soon = time.monotonic() + 20
    for tokens in PROMPTS:
        yield "find_longest_cache_hit", lambda tokens=tokens: matched(cache.find_longest_cache_hit(tokens), tokens)
        yield "find_stored", lambda tokens=tokens: within(cache.find_stored(tokens), tokens)
    yield "blocks_of", lambda: cache.find_longest_cache_hit(LONG, blocks_of="a/0@gpu").block_ids
    yield "candidates", lambda: [str(entry) for entry in cache.get_prewarm_candidates(10)]
    yield "prewarm", lambda: cache.prewarm(time_s=5)
    yield "catch_up", cache.catch_up
    yield "workers", cache.workers
    yield "check_integrity", cache.check_integrity
    yield "read_stats", lambda: read_stats(admin, keys)
    yield "children_of", lambda: children_of(admin, keys, "")
    yield "find_node", lambda: find_node(admin, keys, heads(LONG)[3])
    yield "namespaces", lambda: summarize_namespaces(admin)
    yield "describe_workers", lambda: describe_workers(client, keys, soon)
    yield "lease", lambda: cache.find_longest_cache_hit(LONG).lease(ttl_s=5).release()
    yield "claim", lambda: cache.find_longest_cache_hit(prompt(8, tail=8)).claim(ttl_s=5).release()
    yield "publish", lambda: cache.cache_prefix([*LONG, *range(80)], range(60))
    yield "flush", cache.flush
    yield "demote", lambda: cache.demote(idle_s=0, timeout_s=5)
    yield "promote", lambda: cache.promote(LONG, 3)
    yield "remove", lambda: cache.remove_skipped_blocks([3, 30])
    yield "sweep", cache.sweep
    yield "drop_worker", lambda: cache.drop_worker("b")
    yield "maintain", cache.maintain
    yield "clear", cache.clear


def matched(hit: Any, tokens: list[int]) -> None:
    """A hit is no longer than the prompt, and its parts can be looked at."""
    chunks = len(tokens) // 4
    assert hit.matched_chunks <= chunks
    assert all(0 <= holder.chunks <= chunks for holder in hit.holders)
    assert str(hit.entry)
    assert len(hit.block_ids) <= chunks


def within(found: int, tokens: list[int]) -> None:
    """No more is stored than the prompt has."""
    assert 0 <= found <= len(tokens) // 4


def commands_run(admin: Any) -> int:
    """Commands that the server ran so far, those of scripts among them."""
    return sum(stats["calls"] for stats in admin.info("commandstats").values())


def raised(run: Callable[[], object]) -> Exception | None:
    """What a call raises."""
    try:
        run()
    except Exception as error:  # noqa: BLE001 - whatever it is, the test says with which change
        return error
    return None


def poison(backend: Backend, stored: Stored, change: Change) -> None:
    """Try one change against every script and every public call. Raises AssertionError that says which."""
    admin = backend.admin
    place = f"{change.key!r}: {str(change.commands)[:200]}"

    def restore() -> bool:
        stored.restore()
        with contextlib.suppress(redis.ResponseError):
            change.apply(admin)
            return True
        return False

    if not restore():
        return
    before = commands_run(admin)
    for name, run in script_calls(backend).items():
        with contextlib.suppress(redis.ResponseError):  # a refusal is an answer, and so is a script's error
            run()
        assert admin.ping(), f"{name} keeps the server from answering, {place}"
        after = commands_run(admin)
        assert after - before < _MAX_COMMANDS, f"{name} ran {after - before} commands, {place}"
        before = after
    restore()
    try:
        cache = backend.open("reader", **settings(breaker_failures=10**6))
    except DistPrefixError:
        return
    for name, run in readers(backend, cache):
        error = raised(run)
        is_ours = isinstance(error, DistPrefixError) and not isinstance(error, ValueError)  # no caller is to blame
        assert error is None or is_ours, f"{name} raises {error!r}, {place}"
        assert admin.ping(), f"{name} keeps the server from answering, {place}"
    cache.close()
    backend.opened.remove(cache)


def sample_of_changes(own: Backend, count: int, seed: int) -> tuple[Stored, list[Change]]:
    """A tree as it is stored, without workers, and some of the changes that its keys may suffer."""
    build(own)
    own.close()
    own.opened.clear()
    stored = Stored(own.admin)
    possible = list(changes(own))
    return stored, random.Random(seed).sample(possible, min(count, len(possible)))


@pytest.mark.parametrize(
    ("count", "seed"),
    [(400, 1), *(pytest.param(1500, seed, marks=[pytest.mark.long, pytest.mark.timeout(900)]) for seed in (2, 3))],
)
@pytest.mark.timeout(240)
def test_no_value_traps_a_script_or_a_reader(own: Backend, count: int, seed: int) -> None:
    """Any change of any key: scripts end within bounds, the server answers, and calls raise nothing but our errors."""
    stored, sampled = sample_of_changes(own, count, seed)
    for change in sampled:
        poison(own, stored, change)


@pytest.mark.parametrize(
    ("count", "seed"),
    [(150, 4), pytest.param(4000, 5, marks=[pytest.mark.long, pytest.mark.timeout(900)])],
)
@pytest.mark.timeout(240)
def test_repair_removes_what_cannot_be(own: Backend, count: int, seed: int) -> None:
    """After any change of any key repair has the shard right, and another look finds nothing wrong."""
    stored, sampled = sample_of_changes(own, count, seed)
    for change in sampled:
        stored.restore()
        with contextlib.suppress(redis.ResponseError):
            change.apply(own.admin)
        if change.key == own.keys.meta.encode() and own.admin.type(change.key) != b"hash":
            continue  # there is no namespace then
        try:
            _, is_right = repair(Client(own.admin), own.keys, 256, time.monotonic() + 20)
        except (NotAttachedError, SchemaError):
            continue
        place = f"{change.key!r}: {str(change.commands)[:200]}"
        assert is_right, place
        assert check_integrity(own.admin, own.keys).problems == [], place


def test_repair_removes_nodes_without_a_run(own: Backend) -> None:
    """A node that lost its run, wherever it is, is removed with what follows it."""
    build(own)
    own.close()
    own.opened.clear()
    stored = Stored(own.admin)
    admin: Any = own.admin
    for key in list(admin.scan_iter(match=f"{own.keys.base}n:*", count=1000)):
        stored.restore()
        admin.hdel(key, "r")
        _, is_right = repair(Client(own.admin), own.keys, 256, time.monotonic() + 20)
        assert is_right
        assert not admin.exists(key)


def test_all_scripts_are_tried_and_do_something(own: Backend) -> None:
    """Every script of the package is called, and on a sound tree none of these calls fails but where it must."""
    build(own)
    stored = Stored(own.admin)
    assert sorted(script_calls(own)) == sorted(SCRIPTS)
    refused: set[str] = set()
    for name, run in script_calls(own).items():
        stored.restore()
        try:
            run()
        except redis.ResponseError:
            refused.add(name)
    assert refused == {"heartbeat"}, "its epoch is not that of the member"


def test_what_is_counted_is_sound_when_nothing_is_wrong(own: Backend) -> None:
    """A sound tree is never said to be damaged, whatever is done with it."""
    build(own)
    cache = own.open("reader", **settings())
    for _, run in readers(own, cache):
        run()
    assert [each.get_metrics()["tree_damaged"] for each in own.opened] == [0, 0, 0]
