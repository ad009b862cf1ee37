"""What dead workers left behind is swept: exactly what counts for nothing, and nothing else."""

from __future__ import annotations

import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Generator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distprefix import PrefixCacheOptimizer, operations
from distprefix.errors import UnavailableError
from distprefix.operations import Swept
from tests.contract.test_find import prompt
from tests.contract.test_model import Model, tokens
from tests.servers import Backend
from tests.workers import LONG_S, calls_of, held, learn, sound

# Sweeping


def test_a_sweep_with_nothing_to_do_costs_two_calls(any_server: Backend) -> None:
    """Nobody died, so the tree is not read; nor is it when all was swept before."""
    cache, dead = any_server.open("w1"), any_server.open("w2")
    with calls_of(cache) as sent:
        assert cache.sweep() == Swept(0, 0, 0)
        assert sent == ["roster", "HGETALL"]  # a new rank has no older coverage
        cache.cache_prefix(prompt(8))
        sent.clear()
        assert cache.sweep() == Swept(0, 0, 0)
        assert sent == ["roster", "HGETALL"]
        dead.cache_prefix(prompt(9))
        cache.drop_worker("w2")
        sent.clear()
        assert cache.sweep() == Swept(9, 0, 1)
        assert sent == ["roster", "HGETALL", "HSCAN", "SET", "sweep", "HSET", "DEL"]
        sent.clear()
        assert cache.sweep() == Swept(0, 0, 0)
        assert sent == ["roster", "HGETALL"]
    sound(cache, 8, 1)


def test_a_sweep_takes_what_a_restarted_worker_left(any_server: Backend) -> None:
    """Coverage of the older process goes, that of the newer one stays, in one and the same node."""
    any_server.open("w1", max_run=4).cache_prefix(prompt(12), range(12))
    again = any_server.open("w1", max_run=4)
    again.cache_prefix(prompt(6), range(6))
    sound(again, 12, 3)
    swept = again.sweep()
    assert (swept.coverage, swept.chunks) == (4, 6)  # publishing anew had taken the place of two
    sound(again, 6, 2)
    reader = any_server.open("r", max_run=4)
    assert reader.find_longest_cache_hit(prompt(12), blocks_of="w1/0@gpu").block_ids == tuple(range(6))


@pytest.mark.parametrize("max_run", [1, 4, 256])
def test_a_sweep_takes_exactly_what_is_dead(any_server: Backend, max_run: int) -> None:
    """Deep chains, branches, shared nodes, parts of runs: what somebody living covers stays as it was."""
    live, dead, shared = (any_server.open(name, max_run=max_run) for name in ("w1", "w2", "w3"))
    for tail in range(1, 20, 3):
        dead.cache_prefix(prompt(22, tail=tail), range(22))
    dead.cache_prefix([7] * 160)
    live.cache_prefix(prompt(12, tail=4), range(12), {"of": "live"})
    live.cache_prefix(prompt(15))
    shared.cache_prefix(prompt(22, tail=19)[: 4 * 17], range(100, 117))
    dead.cache_prefix(prompt(22, tail=19)[: 4 * 17])
    everything = {
        tuple(asked[: 4 * i])
        for asked, count in ((prompt(12, tail=4), 12), (prompt(15), 15), (prompt(22, tail=19), 17))
        for i in range(1, count + 1)
    }
    live.drop_worker("w2")
    swept = live.sweep()
    assert swept.coverage > 100
    sound(live, len(everything))
    assert not any(b"h:w2/0@gpu" in node or b"b:w2/0@gpu" in node for node in nodes(any_server))
    reader = any_server.open("r", max_run=max_run)
    assert held(reader, prompt(22, tail=19)) == {"w3/0@gpu": 17, "w1/0@gpu": 15}
    result = reader.find_longest_cache_hit(prompt(12, tail=4), blocks_of="w1/0@gpu")
    assert result.block_ids == tuple(range(12))
    assert result.entry is not None
    assert result.entry.metadata == {"of": "live"}
    assert reader.find_longest_cache_hit(prompt(22, tail=19), blocks_of="w3/0@gpu").block_ids == tuple(range(100, 117))
    assert not reader.find_longest_cache_hit([7] * 160).hit


def nodes(backend: Backend) -> list[dict[bytes, bytes]]:
    """The fields of every node."""
    return [value for key, value in backend.dump().items() if key.startswith(f"{backend.keys.base}n:")]


def test_a_sweep_of_everything(any_server: Backend) -> None:
    """When nobody lives the tree is empty, roots and all."""
    cache, dead = any_server.open("w1"), any_server.open("w2", max_run=256)
    for tail in range(1, 30):
        dead.cache_prefix(prompt(31, tail=tail), range(31), {"tail": tail})
    cache.drop_worker("w2")
    cache.sweep()
    sound(cache, 0, 0)
    assert list(any_server.dump()) == [any_server.keys.meta]


@pytest.mark.parametrize("branches", [1, 2, 3])
def test_a_leaf_that_a_sweep_makes_is_cut(any_server: Backend, branches: int) -> None:
    """An inner node that the living hold in part ends where they do, once its last branch has gone."""
    live, dead = any_server.open("w1"), any_server.open("w2")
    live.cache_prefix(prompt(10), range(10))
    for branch in range(branches):
        dead.cache_prefix([*prompt(10), *[50 + branch] * 8])
    live.remove_skipped_blocks([4])
    live.drop_worker("w2")
    live.sweep()
    sound(live, 4, 1)
    assert held(any_server.open("r"), prompt(10)) == {"w1/0@gpu": 4}


def test_leases_do_not_keep_what_nobody_has(any_server: Backend) -> None:
    """A lease keeps a prompt from eviction; dead coverage goes all the same, and what lives stays leased."""
    live, dead = any_server.open("w1"), any_server.open("w2")
    live.cache_prefix(prompt(5))
    dead.cache_prefix(prompt(9))
    dead.cache_prefix([7] * 20)
    leases = [live.find_longest_cache_hit(asked).lease(600) for asked in (prompt(9), [7] * 20)]
    assert [lease.chunks for lease in leases] == [9, 5]
    live.drop_worker("w2")
    live.sweep()
    sound(live, 5, 1)
    with any_server_cache(any_server, l2_max_chunks=1) as evicting:
        assert evicting.maintain().chunks == 0
        for lease in leases:
            lease.release()
        assert evicting.maintain().chunks > 0


@contextlib.contextmanager
def any_server_cache(backend: Backend, **changes: Any) -> Generator[PrefixCacheOptimizer]:
    """A cache of another worker."""
    with PrefixCacheOptimizer(
        backend.config("other", high_watermark=1.0, low_watermark=1.0, **changes), client=backend.client
    ) as made:
        yield made


def test_metadata_of_what_is_cut_goes(any_server: Backend) -> None:
    """It told of a prompt that ended behind the cut."""
    live, dead = any_server.open("w1"), any_server.open("w2")
    live.cache_prefix(prompt(5))
    dead.cache_prefix(prompt(9), None, {"of": "dead"})
    live.drop_worker("w2")
    live.sweep()
    sound(live, 5, 1)
    entry = any_server.open("r").find_longest_cache_hit(prompt(9)).entry
    assert entry is not None
    assert not entry.metadata


def test_readers_are_told_what_went(any_server: Backend) -> None:
    """L1s forget what a sweep removed or cut, by the log."""
    live, dead, reader = any_server.open("w1"), any_server.open("w2"), any_server.open("r")
    reader.catch_up()
    live.cache_prefix(prompt(5))
    dead.cache_prefix(prompt(9))
    dead.cache_prefix([7] * 20)
    for asked in (prompt(9), [7] * 20):
        reader.find_longest_cache_hit(asked)
    assert reader.get_metrics()["l1_chunks"] == 14
    live.drop_worker("w2")
    live.sweep()
    reader.catch_up()
    assert reader.get_metrics()["l1_chunks"] == 5


def test_an_interrupted_sweep_is_done_again(any_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is cut short leaves coverage that counts for nothing, and lets the next one begin at once, which ends it."""
    monkeypatch.setattr(operations, "WORK_A_CALL", 1)
    live, dead = any_server.open("w1"), any_server.open("w2")
    live.cache_prefix(prompt(5))
    for tail in range(1, 201):
        dead.cache_prefix([*prompt(5), tail, *range(15)])
    live.drop_worker("w2")
    client = live._state.link.admin
    call, left = client.call, [100]

    def fail(script: str, *args: Any) -> Any:
        if script == "sweep" and left[0] == 0:
            raise UnavailableError("it died here")
        left[0] -= script == "sweep"
        return call(script, *args)

    with monkeypatch.context() as patch:
        patch.setattr(client, "call", fail)
        with pytest.raises(UnavailableError):
            live.sweep()
    assert all("does not cover the parent" in problem for problem in live.check_integrity().problems)
    assert any_server.admin.exists(any_server.keys.sweeping) == 0
    live.sweep()
    sound(live, 5, 1)
    assert live.sweep() == Swept(0, 0, 0)


def test_two_sweepers_do_not_meet(any_server: Backend) -> None:
    """While one sweeps the other leaves it to it; a lock that a dead one left ends by itself."""
    one, two, dead = any_server.open("w1"), any_server.open("w2"), any_server.open("w3")
    dead.cache_prefix(prompt(9))
    one.drop_worker("w3")
    any_server.admin.set(any_server.keys.sweeping, "1", px=100)
    with calls_of(two) as sent:
        assert two.sweep() == Swept(0, 0, 0)
        assert "sweep" not in sent
    sound(one, 9)
    time.sleep(0.11)
    assert two.sweep() == Swept(9, 1, 9)
    assert one.sweep() == Swept(0, 0, 0)
    sound(one, 0)


def test_sweepers_and_publishers_at_once(real_server: Backend) -> None:
    """Sweeps that run at once, without the lock too, take nothing living, and the counts stay exact."""
    writers = [real_server.open(f"w{i}", max_run=4) for i in range(3)]
    sweepers = [real_server.open(f"s{i}", max_run=4) for i in range(2)]
    errors: list[BaseException] = []
    stop = threading.Event()

    def work(action: Callable[[], object]) -> None:
        try:
            while not stop.is_set():
                action()
        except BaseException as error:  # noqa: BLE001 - told by the test
            errors.append(error)

    def sweep(cache: PrefixCacheOptimizer) -> None:
        epochs = cache._state.link.roster._epochs
        newest = {f"{member}@gpu": epoch for member, epoch in epochs.items()}
        cache._state.link.administer(operations.sweep(newest))
        learn(cache)

    threads = [threading.Thread(target=work, args=(lambda c=cache: sweep(c),)) for cache in sweepers]
    for thread in threads:
        thread.start()
    for i, cache in itertools.product(range(40), writers):
        cache.cache_prefix(prompt(4 + i % 9, tail=1 + i % 5), range(4 + i % 9))
        if i % 5 == 0 and cache is writers[0]:
            cache.register_worker(lease_s=LONG_S)
    stop.set()
    for thread in threads:
        thread.join()
    assert errors == []
    learn(*writers)
    sweepers[0].sweep()
    report = writers[0].check_integrity()
    assert report.problems == []
    for i in range(40):
        found = held(real_server.open("r", max_run=4), prompt(4 + i % 9, tail=1 + i % 5))
        assert found["w1/0@gpu"] == found["w2/0@gpu"] == 4 + i % 9


def test_a_sweep_of_very_many_members(any_server: Backend) -> None:
    """Those that cover nothing are noted as swept without a look at the tree."""
    live, dead = any_server.open("w1"), any_server.open("w9999")
    live.cache_prefix(prompt(5))
    dead.cache_prefix(prompt(9))
    any_server.admin.hset(any_server.keys.epochs, mapping={f"w{i}/0": 2 for i in range(2, 1203)})
    any_server.admin.zadd(any_server.keys.changes, {f"w{i}/0": i for i in range(2, 1203)})
    live.drop_worker("w9999")
    assert live.sweep() == Swept(9, 0, 4)
    assert any_server.admin.hlen(any_server.keys.swept) == 1203
    assert live.sweep() == Swept(0, 0, 0)
    sound(live, 5, 1)


@pytest.mark.parametrize("value", [b"", b"x:y", b"1", b"1:0", b"9:99999"])
def test_a_sweep_passes_over_damaged_nodes(any_server: Backend, value: bytes) -> None:
    """What another hand wrote into a node keeps nothing else from being swept, and the counts are exact."""
    live, dead = any_server.open("w1"), any_server.open("w2")
    for token in range(5):
        dead.cache_prefix([token] * 20)
    broken = any_server.keys.node(next(key for key in any_server.dump() if ":n:" in key).rpartition(":")[2])
    any_server.admin.hset(broken, "h:w3/0@gpu", value)
    any_server.admin.hincrby(any_server.keys.meta, "bytes", 70)
    live.drop_worker("w2")
    live.sweep()
    assert any_server.admin.hget(any_server.keys.meta, "chunks") == b"5"
    any_server.admin.hdel(broken, "h:w3/0@gpu")
    any_server.admin.hincrby(any_server.keys.meta, "bytes", -70)
    sound(live, 5, 1)


# Anything


PUBLISHES = st.lists(
    st.tuples(
        st.sampled_from(["w1", "w2", "w3"]),
        st.sampled_from(["publish", "publish", "publish", "remove"]),
        st.lists(st.integers(0, 1), min_size=1, max_size=10).map(tuple),
    ),
    max_size=20,
)


@settings(max_examples=15)
@given(
    steps=PUBLISHES, dead=st.sets(st.sampled_from(["w1", "w2", "w3"]), min_size=1), max_run=st.sampled_from([2, 3, 64])
)
def test_what_a_sweep_leaves_is_what_the_living_have(
    any_server: Backend, steps: list[tuple[str, str, tuple[int, ...]]], dead: set[str], max_run: int
) -> None:
    """Whatever was published and by whomever: the tree is the union of what the living hold, just that, and sound."""
    model = Model()
    options: dict[str, Any] = {"chunk_size": 2, "max_run": max_run, "l1_ttl_s": 0}
    backend = Backend("", any_server.admin, f"{any_server.namespace}-{max_run}", any_server.url, any_server.client)
    caches = {name: backend.open(name, **options) for name in ("w1", "w2", "w3", "s")}
    caches["s"].clear()
    try:
        for worker, action, chunks in steps:
            if action == "publish":
                caches[worker].cache_prefix(tokens(chunks), model.ids(worker, chunks))
                model.publish(worker, chunks)
            else:
                caches[worker].remove_skipped_blocks([model.block(worker, chunks)])
                model.remove(worker, chunks)
        for worker in dead:
            caches["s"].drop_worker(worker)
            model.has[worker] = set()
        caches["s"].sweep()
        everything = set[tuple[int, ...]]().union(*model.has.values())
        sound(caches["s"], len(everything))
        learn(caches["s"])
        for _, _, chunks in steps:
            wanted = {f"{worker}/0@gpu": size for worker in model.has if (size := model.held(worker, chunks))}
            assert held(caches["s"], tokens(chunks)) == wanted
        before = backend.dump()
        operation = operations.sweep({f"{worker}/0@gpu": 1 << 40 for worker in dead})
        assert caches["s"]._state.link.administer(operation) == Swept(0, 0, 0)
        assert backend.dump() == before
    finally:
        backend.close()
