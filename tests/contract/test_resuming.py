"""Calls that resume: trim, drop, sweep and census do a bounded part a call, whatever others write in between."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer, operations
from distprefix.operations import Operation
from distprefix.redis.holders import read_holders
from distprefix.redis.journal import census
from distprefix.redis.repair import repair
from tests.contract.test_find import prompt
from tests.contract.test_model import Prefix, tokens
from tests.contract.test_tree import heads
from tests.servers import Backend
from tests.workers import sound

SMALL: dict[str, Any] = {"chunk_size": 2, "max_run": 3, "l1_ttl_s": 0}


def in_calls(cache: PrefixCacheOptimizer, operation: Operation, between: Callable[[int], object]) -> tuple[Any, int]:
    """Run an operation, and something else after each of its calls. Returns its result and the calls."""
    link = cache._state.link
    reply: Any = None
    calls = 0
    while True:
        try:
            call = operation.send(reply)
        except StopIteration as done:
            return done.value, calls
        reply = link.admin.call(call.script, link.keys.meta, call.args, time.monotonic() + 10)[0]
        calls += 1
        assert calls < 5000
        between(calls)


def chain_of(cache: PrefixCacheOptimizer, chunks: Prefix) -> bytes:
    """The hashes of a prompt's chunks."""
    state = cache._state
    read = state.read(tokens(chunks))
    return state.hashes(read, state.l1.find(read, 0.0))


def starts_with(chunks: Prefix, other: Prefix) -> bool:
    """Whether a prompt begins with another one."""
    return chunks[: len(other)] == other


def drawn(source: random.Random, begin: Prefix = ()) -> Prefix:
    """A prompt, often one with branches."""
    return begin + tuple(source.choice((0, 0, 1, 2, 3)) for _ in range(source.randint(1, 8)))


class Scene:
    """Three workers with some prompts each, and what they do meanwhile."""

    def __init__(self, server: Backend, seed: int) -> None:
        self.source = random.Random(seed)
        self.caches = {name: server.open(name, **SMALL) for name in ("w1", "w2", "w3")}
        self.keys = server.keys
        self.admin = server.admin
        self.said: dict[str, list[Prefix]] = {name: [] for name in self.caches}
        for _ in range(12):
            self.publish(self.source.choice(("w1", "w2", "w3")), drawn(self.source))
        for last in range(36):
            self.publish("w1", (0, 0, last))

    def publish(self, name: str, chunks: Prefix) -> None:
        """A worker says that it has a prompt."""
        link = self.caches[name]._state.link
        chain = chain_of(self.caches[name], chunks)
        link.publish(operations.publish(chain, 0, f"{name}/0@gpu", link.epoch, max_run=3, blocks=chain[::4]))
        self.said[name].append(chunks)

    def withdraw(self, name: str, chunks: Prefix) -> None:
        """A worker says that it no longer has a prompt's last chunk."""
        link = self.caches[name]._state.link
        link.publish(operations.trim(chain_of(self.caches[name], chunks), f"{name}/0@gpu", link.epoch))

    def evict(self) -> None:
        """A leaf is evicted."""
        self.caches["w3"]._state.link.publish(operations.evict(operations.Bounds(1, None, None), 1))

    def held(self, name: str) -> set[Prefix]:
        """Which of the prompts that a worker published it has, as the tree says."""
        cache = self.caches[name]
        return {
            chunks
            for chunks in set(self.said[name])
            if dict(cache.find_longest_cache_hit(tokens(chunks)).holders).get(f"{name}/0@gpu") == len(chunks)
        }

    def problems(self) -> list[str]:
        """What is wrong with the tree."""
        return self.caches["w3"].check_integrity().problems


@pytest.mark.parametrize("work", [1, 20])
@pytest.mark.parametrize("seed", range(3))
def test_a_trim_among_other_writers(any_server: Backend, monkeypatch: pytest.MonkeyPatch, work: int, seed: int) -> None:
    """Whatever others write between its calls, the tree is sound after each of them, and in the end all is trimmed."""
    monkeypatch.setattr(operations, "WORK_A_CALL", work)
    scene = Scene(any_server, seed)
    lost = (0, 0) if seed % 2 else (0,)
    before = scene.held("w1")
    scene.said["w1"].clear()

    def meanwhile(calls: int) -> None:
        assert calls % 8 or scene.problems() == []
        if calls < 40:
            action = scene.source.randrange(6)
            if action == 0:
                scene.publish("w1", drawn(scene.source, lost))
            elif action <= 2:
                scene.publish(scene.source.choice(("w2", "w3")), drawn(scene.source))
            elif action == 3:
                scene.withdraw("w2", drawn(scene.source))
            elif action == 4 and seed % 3 == 0:
                scene.evict()

    cache = scene.caches["w1"]
    in_calls(cache, operations.trim(chain_of(cache, lost), "w1/0@gpu", cache._state.link.epoch), meanwhile)
    assert scene.problems() == []
    anew = set(scene.said["w1"])
    scene.said["w1"] += before
    for chunks in scene.held("w1"):
        assert not starts_with(chunks, lost) or any(starts_with(new, chunks) for new in anew)
    if seed % 3:
        assert {chunks for chunks in before if not starts_with(chunks, lost)} <= scene.held("w1")


@pytest.mark.parametrize(("work", "seed"), [(1, 0), (20, 1)])
def test_a_sweep_among_other_writers(
    any_server: Backend, monkeypatch: pytest.MonkeyPatch, work: int, seed: int
) -> None:
    """Whatever the living write between its calls, nothing of the dead is left, and what the living have stays."""
    monkeypatch.setattr(operations, "WORK_A_CALL", work)
    scene = Scene(any_server, seed)
    scene.caches["w3"].drop_worker("w1")
    living = scene.held("w2")

    def meanwhile(calls: int) -> None:
        assert calls % 8 or [each for each in scene.problems() if "w1/0@gpu" not in each] == []
        if calls < 40:
            scene.publish(scene.source.choice(("w2", "w3")), drawn(scene.source))

    in_calls(scene.caches["w3"], operations.sweep({"w1/0@gpu": 1 << 50}), meanwhile)
    assert scene.problems() == []
    assert living <= scene.held("w2")
    assert not any(name == b"h:w1/0@gpu" for value in any_server.dump().values() for name in value)
    link = scene.caches["w3"]._state.link
    assert read_holders(link.admin, link.keys, time.monotonic() + 5, "w1/0") == []


@pytest.mark.parametrize(("work", "seed"), [(1, 0), (20, 1)])
def test_a_drop_among_other_writers(any_server: Backend, monkeypatch: pytest.MonkeyPatch, work: int, seed: int) -> None:
    """Whatever others write between its calls, the tree is sound after each, and what was there before is dropped."""
    monkeypatch.setattr(operations, "WORK_A_CALL", work)
    scene = Scene(any_server, seed)
    before = scene.held("w1") | scene.held("w2")
    for said in scene.said.values():
        said.clear()

    def meanwhile(calls: int) -> None:
        assert calls % 8 or scene.problems() == []
        if calls % 3 == 0 and calls < 40:
            scene.publish(scene.source.choice(("w2", "w3")), drawn(scene.source, (4,)))

    in_calls(scene.caches["w1"], operations.drop(), meanwhile)
    assert scene.problems() == []
    reader = scene.caches["w1"]
    assert before
    for chunks in before:
        assert reader.find_longest_cache_hit(tokens(chunks)).matched_chunks == 0 or chunks[0] == 4


def test_a_census_reads_every_node_once(any_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """A census in small parts tells each node once; that of a holder those it covers, with their chunks."""
    monkeypatch.setattr("distprefix.redis.journal.WORK_A_CALL", 5)
    scene = Scene(any_server, 1)
    nodes, calls = in_calls(scene.caches["w1"], census(), lambda _: None)
    assert len(nodes) == scene.caches["w1"].check_integrity().nodes
    assert calls > 5
    found, _ = in_calls(scene.caches["w1"], census(["w2/0@gpu"]), lambda _: None)
    covered = [node for node in nodes if "w2/0@gpu" in node.holders]
    assert len(found) == len(covered) < len(nodes)
    chunks = sum(len(node.holders["w2/0@gpu"][1]) for node in covered)
    assert sum(len(node.holders["w2/0@gpu"][1]) for node in found) == chunks
    assert in_calls(scene.caches["w1"], census(["other/0@gpu"]), lambda _: None) == ([], 1)


def test_a_stale_end_behind_a_shorter_new_one_is_swept(any_server: Backend) -> None:
    """A restarted worker published less of a node, which was split behind that: what follows is found all the same."""
    any_server.open("w1").cache_prefix(prompt(10))
    any_server.open("w2").cache_prefix(prompt(9))
    any_server.open("w1").cache_prefix(prompt(12))
    any_server.open("w2").cache_prefix(prompt(10, tail=9))
    again = any_server.open("w1")
    again.cache_prefix(prompt(4))
    any_server.open("w3").cache_prefix(prompt(8, tail=6))
    assert again.check_integrity().problems == []
    again.sweep()
    assert again.check_integrity().problems == []
    epoch = b"%d:" % again._state.link.epoch
    found = [value for node in any_server.dump().values() if isinstance(node, dict) for value in node.items()]
    assert [value for name, value in found if name == b"h:w1/0@gpu" and not value.startswith(epoch)] == []


def test_wrong_counts_are_found_and_mended(any_server: Backend) -> None:
    """Integrity tells of each count of a junction that is not exact, and repair makes it so."""
    scene = Scene(any_server, 2)
    cache = scene.caches["w1"]
    junction = next(name for name in any_server.dump() if ":j:" in name and not name.endswith("root"))
    any_server.admin.hincrby(junction, "w1/0@gpu", 3)
    any_server.admin.hset(junction, "other/0@gpu", 1)
    any_server.admin.hdel(any_server.keys.holders, "w2/0@gpu")
    report = cache.check_integrity()
    assert len(report.miscounted) == len(report.problems) == 3
    link = cache._state.link
    assert repair(link.admin, link.keys, 3, time.monotonic() + 60)[1]
    assert cache.check_integrity().problems == []


def test_a_count_of_lost_children_ends(any_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a junction counts children that a failover took, trims and drops end, and take all that there is."""
    monkeypatch.setattr(operations, "WORK_A_CALL", 1)
    cache = any_server.open(max_run=2)
    for last in range(60):
        cache.cache_prefix(prompt(6, tail=3) + [last] * 4)
    for name in [name for name in any_server.dump() if ":n:" in name and name > f"{any_server.keys.base}n:8"]:
        if any_server.admin.hget(name, "d") == b"6":
            any_server.admin.delete(name)
    chain = bytes.fromhex("".join(heads(prompt(6, tail=3))))
    link = cache._state.link
    in_calls(cache, operations.trim(chain[:32], "w1/0@gpu", link.epoch), lambda _: None)
    assert not any(b"h:w1/0@gpu" in node and node[b"d"] != b"0" for node in nodes_of(any_server))
    in_calls(cache, operations.drop(), lambda _: None)
    assert nodes_of(any_server) == []


def nodes_of(backend: Backend) -> list[dict[bytes, bytes]]:
    """The fields of every node."""
    return [value for key, value in backend.dump().items() if key.startswith(f"{backend.keys.base}n:")]


# Counted work


def commands_of(backend: Backend, action: Callable[[], object]) -> int:
    """How many commands the server ran for something, those of scripts included."""

    def count() -> int:
        stats: Any = backend.admin.info("commandstats")
        return sum(each["calls"] for name, each in stats.items() if name != "cmdstat_info")

    before = count()
    action()
    return count() - before


@pytest.mark.parametrize("children", [50, 5000])
def test_children_that_a_holder_does_not_cover_cost_nothing(real_server: Backend, children: int) -> None:
    """A trim, a sweep and a census of a holder with no covered child are as long whatever children there are."""
    cache, other = real_server.open("w1"), real_server.open("w2")
    link = cache._state.link
    chain = bytes.fromhex("".join(heads(prompt(4))))
    for child in range(children):
        last = (b"%016d" % child)[-16:]
        link.publish(operations.publish(chain + last, 0, "w1/0@gpu", link.epoch, max_run=256))
    other.cache_prefix(prompt(4))
    other._state.link.publish(operations.trim(chain + b"0" * 16, "w2/0@gpu", 1 << 50))  # loads the script
    epoch = other._state.link.epoch

    def work() -> None:
        in_calls(other, census(["w2/0@gpu"]), lambda _: None)
        in_calls(other, operations.sweep({"w2/0@gpu": epoch}), lambda _: None)
        other._state.link.publish(operations.trim(chain, "w2/0@gpu", epoch))

    assert commands_of(real_server, work) < 60
    sound(cache, children + 4, children + 1)


def test_a_deep_chain_is_trimmed_in_proportion(real_server: Backend) -> None:
    """A trim of a chain of nodes visits each once, in calls that each change some tens of them."""
    cache = real_server.open("w1", max_run=1)
    link = cache._state.link
    chain = b"".join(b"%016d" % at for at in range(5000))
    costs: list[int] = []
    for size in (1000, 5000):
        link.publish(operations.publish(chain[: 16 * size], 0, "w1/0@gpu", link.epoch, max_run=1))
        results: list[tuple[Any, int]] = []

        def trim(results: list[tuple[Any, int]] = results) -> None:
            results.append(in_calls(cache, operations.trim(chain[:16], "w1/0@gpu", link.epoch), lambda _: None))

        costs.append(commands_of(real_server, trim))
        assert results[0][0] == size
        assert results[0][1] > size / 100
    assert costs[1] < 6 * costs[0]
    assert costs[1] < 50 * 5000
    sound(cache, 0)
