"""A process whose clock is wrong changes nothing for others: what processes compare is the server's time."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Generator
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer
from distprefix.redis.metrics import read_metrics
from tests.cli.test_workers import ingesting, where
from tests.contract.test_find import prompt
from tests.fake_engine import FakeEngine, until
from tests.payloads import data
from tests.servers import Backend
from tests.uses import let_pass, server_ms

SHIFTS = [
    pytest.param(3600, id="an hour ahead"),
    pytest.param(10 * 365 * 86400, id="ten years ahead"),
    pytest.param(-3600, id="an hour behind"),
    pytest.param(0, id="right"),
]
CHUNKS = 6
BUDGET = 40 * CHUNKS
SHIFTED = """
import time
right = time.time
time.time = lambda: right() + {shift}
"""
"""The beginning of a program whose clock is wrong."""

WORKER = """
import json, sys
from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
settings, prompts, payloads = json.loads(sys.stdin.readline())
with PrefixCacheOptimizer(PrefixCacheConfig(**settings)) as cache:
    for tokens in prompts:
        cache.cache_prefix(tokens)
        cache.find_longest_cache_hit(tokens)
        cache.find_longest_cache_hit(tokens).entry.touch()
    for tokens in payloads:
        cache.store(tokens, [bytes([1]) * 1000] * (len(tokens) // 4))
        cache.load(tokens)
    cache.flush()
    print(json.dumps({"demoted": cache.demote(), "epoch": cache.get_metrics()["epoch"]}), flush=True)
    sys.stdin.readline()
"""


def one_of(number: int) -> list[int]:
    """A prompt of its own."""
    return [1000 * number + at for at in range(4 * CHUNKS)]


@contextlib.contextmanager
def shifted(backend: Backend, shift: int, **settings: Any) -> Generator[dict[str, Any]]:
    """A worker with another clock, which has published, looked up, stored, loaded and demoted, and goes on to live."""
    settings |= {"url": backend.url, "namespace": backend.namespace, "worker_id": "shifted", "chunk_size": 4}
    settings |= {"strict": True, "lookup_timeout_s": 20, "publish_timeout_s": 20, "touch_interval_s": 0.05}
    prompts = [one_of(100 + number) for number in range(30)]
    payloads = [one_of(200 + number) for number in range(5)]
    running = subprocess.Popen(
        [sys.executable, "-c", SHIFTED.format(shift=shift) + WORKER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert running.stdin is not None
        assert running.stdout is not None
        running.stdin.write(json.dumps([settings, prompts, payloads]) + "\n")
        running.stdin.flush()
        yield json.loads(running.stdout.readline())
    finally:
        running.communicate("\n", timeout=60)


def leaves(backend: Backend) -> list[tuple[bytes, float]]:
    """The order of eviction."""
    found: Any = backend.admin.zrange(backend.keys.leaves, 0, -1, withscores=True)
    return found


@pytest.mark.parametrize("policy", ["lru", "cost"])
@pytest.mark.parametrize("shift", SHIFTS)
def test_a_wrong_clock_changes_nothing_for_others(real_server: Backend, shift: int, policy: str) -> None:
    """Order of eviction, the hit rate of others, demotion, and who is seen alive are as with a clock that is right."""
    settings: dict[str, Any] = {"l2_max_chunks": BUDGET, "policy": policy, "hot_threshold": 10**6}
    healthy = real_server.open("healthy", touch_interval_s=0.05, l1_max_bytes=0, **settings)
    stored = one_of(300)
    healthy.store(stored, data(stored))
    began = server_ms(real_server)
    with shifted(real_server, shift, **settings) as found:
        ended = server_ms(real_server)
        assert found["demoted"] == 0
        assert began <= found["epoch"] <= ended
        for name in real_server.admin.scan_iter(match=real_server.keys.node("*"), count=1000):
            values: Any = real_server.admin.hmget(name, "a", "c")
            accessed, created = map(int, values)
            assert began - 60_000 <= created <= accessed <= ended
        assert all(began - 60_000 <= score <= ended for _, score in leaves(real_server))
        until(lambda: {"healthy/0@gpu", "shifted/0@gpu"} == set(read_metrics(real_server.admin, real_server.keys)))
        reports = read_metrics(real_server.admin, real_server.keys)
        assert all(1000 * report["at"] <= server_ms(real_server) for report in reports.values())
    until(lambda: set(read_metrics(real_server.admin, real_server.keys)) == {"healthy/0@gpu"})

    # What the other one left is older than all that comes now.
    let_pass(real_server, 10)
    for turn in range(3):
        for number in range(30):
            hit = healthy.find_longest_cache_hit(one_of(number))
            assert hit.matched_chunks == (CHUNKS if turn else 0)
            healthy.cache_prefix(one_of(number))
    held = [number for number in range(100, 130) if healthy.find_longest_cache_hit(one_of(number))]
    assert len(held) <= 10
    assert healthy.demote() == 0


@pytest.mark.parametrize("shift", SHIFTS[:3])
def test_a_reader_with_a_wrong_clock_sees_the_same(
    real_server: Backend, shift: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads with a wrong clock sees the same workers alive, finds the same, and demotes and evicts the same."""
    healthy = real_server.open("healthy", touch_interval_s=0.05)
    healthy.register_worker(lease_s=60.0)
    healthy.cache_prefix(prompt(4))
    healthy.store(one_of(1), data(one_of(1)))
    until(lambda: "healthy/0@gpu" in read_metrics(real_server.admin, real_server.keys))
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + shift)
    assert "healthy/0@gpu" in read_metrics(real_server.admin, real_server.keys)
    reader: PrefixCacheOptimizer = real_server.open("reader")
    assert reader.find_longest_cache_hit(prompt(4)).matched_chunks == 4
    assert reader.find_stored(one_of(1)) == CHUNKS
    (member,) = [member for member in reader.workers() if member.worker == "healthy"]
    assert member.lease_left_s is not None
    assert 0 < member.lease_left_s <= 60
    assert (reader.demote(), reader.sweep().coverage, reader.maintain().chunks) == (0, 0, 0)
    hit = reader.find_longest_cache_hit(prompt(6))
    claim = hit.claim(60)
    monkeypatch.undo()
    other = healthy.find_longest_cache_hit(prompt(6)).claim(60)
    assert (claim.mine, other.mine) == (True, False)
    assert abs(other.since - server_ms(real_server) / 1000) < 60


@pytest.mark.parametrize("shift", SHIFTS[:3])
def test_an_ingester_with_a_wrong_clock_is_followed(real_server: Backend, shift: int) -> None:
    """`workers` says of a stream that it is followed, whatever clocks the ingester and the reader have."""
    reader = "from distprefix.cli import main; main()"
    options = ("workers", *where(real_server), "--json")
    with FakeEngine() as engine:
        followed = ("--engine", engine.endpoint, "--replay", engine.replay_endpoint or "", "--worker", "e1")
        with ingesting(real_server, *followed, before=SHIFTED.format(shift=shift)):
            engine.wait_for_subscriber()
            engine.prefill(prompt(6))
            until(lambda: real_server.admin.hget(real_server.keys.stream("e1/0"), "q") == b"0", 30)
            for clock in (0, shift):
                program = SHIFTED.format(shift=clock) + reader
                shown = subprocess.run(
                    [sys.executable, "-c", program, *options], capture_output=True, text=True, timeout=60, check=True
                )
                (listed,) = json.loads(shown.stdout)
                assert (listed["worker"], listed["live"], listed["chunks"]) == ("e1", True, {"gpu": 6})
                assert listed["events"]["followed"] is True
                assert 0 < listed["lease_left_s"] < 600
