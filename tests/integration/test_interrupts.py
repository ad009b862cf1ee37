"""Ctrl-C, or a signal handler that raises, at any place within a call: the cache works on, and says nothing untrue."""

from __future__ import annotations

import signal
import time
from array import array
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer
from distprefix.chunking import HASH_BYTES
from tests.faults import wait_until
from tests.interrupts import Interrupt, interrupt, is_interrupted
from tests.lengths import short_or_long
from tests.servers import Backend

CHUNKS = 9
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*unclosed <socket:ResourceWarning",  # what an interrupt leaves with nobody is closed by its finalizer
    "ignore::pytest.PytestUnraisableExceptionWarning",
)
Call = Callable[[], object]


class Scene:
    """A worker that is interrupted, and a reader that is told by Redis alone."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.used: list[list[int]] = []
        """Prompts whose coverage is looked at."""
        self.names: dict[int, str] = {}
        self.worker = backend.open("a", l1_payload_bytes=10_000, max_run=4, payload_timeout_s=20)
        self.reader = backend.open("b", l1_ttl_s=0, max_run=4)
        self._numbers = iter(range(1, 1 << 30))
        self._blocks = iter(range(0, 1 << 31, CHUNKS))

    def prompt(self) -> list[int]:
        """A prompt that shares its first chunks with others."""
        number = next(self._numbers)
        tokens = [*range(8), *[number % 3] * 8, *[1000 + number] * (4 * CHUNKS - 16)]
        self.used.append(tokens)
        return tokens

    def blocks(self) -> range:
        """Block ids that were not used before."""
        first = next(self._blocks)
        return range(first, first + CHUNKS)

    def published(self) -> tuple[list[int], range, str]:
        """A prompt that the worker has, its blocks and its name."""
        tokens = self.prompt()
        blocks = self.blocks()
        return tokens, blocks, self.worker.cache_prefix(tokens, blocks)

    def check(self, *, whole: bool = False) -> None:
        """Nothing is held, the counts are those of what they count, and Redis says no more than the worker has."""
        worker = self.worker
        worker._state.own._max_chunks = 10_000
        assert held_locks(worker) == []
        assert worker.health().off == ()
        check_counts(worker)
        tokens, blocks, _ = self.published()
        assert worker.find_longest_cache_hit(tokens).matched_chunks == CHUNKS
        assert worker.get_computed_blocks(tokens) == list(blocks)
        worker.flush()
        self.reader.flush()
        assert worker._state.outbox.waiting == 0
        for each in self.used[-4:] if not whole else self.used:
            own = worker.get_computed_blocks(each)
            told = self.reader.find_longest_cache_hit(each, blocks_of=worker.config.holder)
            covered = dict(told.holders).get(worker.config.holder, 0)
            assert covered <= len(own), f"{covered} are told, {len(own)} are there"
            assert told.block_ids[:covered] == tuple(own[:covered])
        assert worker.remove_skipped_blocks(blocks) == CHUNKS
        assert worker.config.holder not in dict(self.reader.find_longest_cache_hit(tokens).holders)
        if whole:
            assert worker.check_integrity().problems == []


def _is_within(backend: Backend, most: int) -> bool:
    return connections(backend) <= most


def connections(backend: Backend) -> int:
    """How many connections the server has."""
    clients: Any = backend.admin.client_list()
    return len(clients)


def held_locks(cache: PrefixCacheOptimizer) -> list[str]:
    """What a call has left locked."""
    state = cache._state
    link = state.link
    locks: dict[str, Any] = {
        "state": state.lock,
        "feed": state.feed._polling,
        "touches": state.outbox.touches._lock,
        "payloads": cache._tiers.payloads.cache._lock,
        "reads": link.breakers.reads._lock,
        "writes": link.breakers.writes._lock,
        "closing": cache._closing,
    }
    locks |= {f"client {i}": client._count for i, client in enumerate((link.lookups, link.publishes, link.admin))}
    locks |= {f"pool {name}": pool._lock for name, pool in cache._tiers.pools.items()}
    turns = {"sending": state.outbox._sending, "attaching": link._attaching}
    held = [name for name, lock in locks.items() if is_interrupted(lock)]
    return held + [name for name, turn in turns.items() if turn.holder is not None]


def check_counts(cache: PrefixCacheOptimizer) -> None:
    """The counts of L1 and of own blocks are those of a recount, unless both are to begin anew."""
    l1, own = cache._state.l1, cache._state.own
    if not l1.is_torn:
        queued = {id(entry[3]) for entry in l1._queue}
        for tree in l1._trees.values():
            tree.check_integrity()
            assert all(id(node) in queued for node in tree.iter_nodes() if not node.children)
    if not own.is_torn:
        own._tree.check_integrity()
        for node in own._tree.iter_nodes():
            assert node.children or node in own._leaves
            for i, block in enumerate(array("I", node.blocks)):
                assert (node, node.start + i) in own._valid(block, own._references[block])
            assert len(node.blocks) * (HASH_BYTES // 4) == len(node.run)
    counts = cache._state.counts
    assert counts["hits"] == counts["hits_hot"] + counts["hits_warm"] + counts["hits_stored"]


def look_up(scene: Scene) -> Call:
    """A look-up that asks Redis."""
    tokens = scene.prompt()
    scene.reader.cache_prefix(tokens, range(CHUNKS))
    return lambda: scene.worker.find_longest_cache_hit(tokens)


def look_up_in_l1(scene: Scene) -> Call:
    """A look-up that L1 answers."""
    tokens, _, _ = scene.published()
    return lambda: scene.worker.find_longest_cache_hit(tokens)


def publish(scene: Scene) -> Call:
    """A publish of a new prompt."""
    tokens = scene.prompt()
    blocks = scene.blocks()
    return lambda: scene.worker.cache_prefix(tokens, blocks, {"a": 1})


def move(scene: Scene) -> Call:
    """A prefix that lies in other blocks now."""
    _, _, name = scene.published()
    blocks = scene.blocks()
    return lambda: scene.worker.update_prefix_state(name, blocks)


def remove(scene: Scene) -> Call:
    """Blocks that are taken back."""
    _, blocks, _ = scene.published()
    return lambda: scene.worker.remove_skipped_blocks(blocks[4:])


def give_up(scene: Scene) -> Call:
    """A publish for which an older prompt is given up."""
    scene.worker._state.own._max_chunks = max(1, len(scene.worker._state.own))
    tokens = scene.prompt()
    blocks = scene.blocks()
    return lambda: scene.worker.cache_prefix(tokens, blocks)


def store(scene: Scene) -> Call:
    """Payloads that are stored."""
    tokens = scene.prompt()
    return lambda: scene.worker.store(tokens, [bytes([i]) * 200 for i in range(CHUNKS)])


def load(scene: Scene) -> Call:
    """Payloads that are loaded, through L1."""
    tokens = scene.prompt()
    assert scene.reader.store(tokens, [bytes([i]) * 200 for i in range(CHUNKS)]) == CHUNKS

    def call() -> None:
        loaded = scene.worker.load(tokens)
        assert [bytes(payload) for payload in loaded.payloads] == [bytes([i]) * 200 for i in range(CHUNKS)]

    return call


def lease(scene: Scene) -> Call:
    """A lease that is taken and released."""
    tokens, _, _ = scene.published()
    hit = scene.worker.find_longest_cache_hit(tokens)

    def call() -> None:
        with hit.lease(5.0) as taken:
            assert taken.active

    return call


def claim(scene: Scene) -> Call:
    """A claim that is made and released."""
    hit = scene.worker.find_longest_cache_hit(scene.prompt())

    def call() -> None:
        taken = hit.claim(0.5)
        assert taken.mine
        taken.release()

    return call


def flush(scene: Scene) -> Call:
    """Retractions and touches that are sent."""
    tokens, blocks, _ = scene.published()
    scene.worker.find_longest_cache_hit(tokens)
    for at in (8, 5):
        removed, lost = scene.worker._state.own.remove([blocks[at]])
        scene.worker._publisher._retract(lost)
        assert removed
    return scene.worker.flush


def catch_up(scene: Scene) -> Call:
    """The log, when it is read."""
    scene.worker.catch_up()
    tokens, _, _ = scene.published()
    scene.reader.cache_prefix(tokens[:20], range(5))
    return scene.worker.catch_up


def pin(scene: Scene) -> Call:
    """A prompt that is pinned and unpinned."""
    tokens, _, _ = scene.published()

    def call() -> None:
        scene.worker.pin(tokens)
        scene.worker.unpin(tokens)

    return call


def attach_again(scene: Scene) -> Call:
    """A publish under a new epoch."""
    tokens = scene.prompt()
    scene.worker._state.link.detach()
    blocks = scene.blocks()
    return lambda: scene.worker.cache_prefix(tokens, blocks)


def reconnect(scene: Scene) -> Call:
    """Calls over new connections."""
    tokens = scene.prompt()
    scene.worker._state.link.publishes._end_idle()
    scene.worker._state.link.lookups._end_idle()
    blocks = scene.blocks()

    def call() -> None:
        scene.worker.find_longest_cache_hit(tokens)
        scene.worker.cache_prefix(tokens, blocks)

    return call


def maintain(scene: Scene) -> Call:
    """The budget of the shared tree."""
    return scene.worker.maintain


def prewarm(scene: Scene) -> Call:
    """L1, when it is filled."""
    return scene.worker.prewarm


CALLS = {
    each.__name__: each
    for each in (
        *(look_up, look_up_in_l1, publish, move, remove, give_up, store, load, lease, claim, flush, catch_up, pin),
        *(attach_again, reconnect, maintain, prewarm),
    )
}


@pytest.mark.parametrize("name", CALLS)
@short_or_long("tries", short=12, long=60)
def test_a_call_may_be_interrupted_at_any_place(real_server: Backend, name: str, tries: int) -> None:
    """Whatever a signal handler cuts short: locks are free, counts right, and nothing is over-reported."""
    scene = Scene(real_server)
    scene.check()
    places = count_places(scene, CALLS[name])
    step = max(1, places // tries)
    before = connections(real_server)
    for at in range(1 + Random().randrange(step), places + 40, step):
        call = CALLS[name](scene)
        if interrupt(call, at):
            scene.check(whole=at % (20 * step) == 0)
    scene.check(whole=True)
    wait_until(lambda: connections(real_server) <= before + 6)


def count_places(scene: Scene, call: Callable[[Scene], Call]) -> int:
    """At how many places a call may be interrupted, when it goes as calls mostly go."""
    call(scene)()
    low, high = 1, 1
    made = call(scene)
    while interrupt(made, high):
        low, high = high, 2 * high
        made = call(scene)
    while high - low > 8:
        middle = (low + high) // 2
        if interrupt(call(scene), middle):
            low = middle
        else:
            high = middle
    return high


@short_or_long("step", short=60, long=8)
def test_closing_may_be_interrupted_at_any_place(real_server: Backend, step: int) -> None:
    """A cache whose closing is cut short is closed by closing again, with all its connections."""
    at = 1
    while True:
        base = connections(real_server)
        cache = real_server.open("a")
        cache.cache_prefix(list(range(16)), range(4))
        cache.store(list(range(16)), [b"x" * 100] * 4)
        if not interrupt(cache.close, at):
            break
        cache.close()
        assert held_locks(cache) == []
        assert cache._state.unusable
        wait_until(partial(_is_within, real_server, base))
        at += step


@short_or_long("step", short=400, long=40)
def test_opening_may_be_interrupted_at_any_place(real_server: Backend, step: int) -> None:
    """A cache whose opening is cut short leaves no connection, and another one opens."""
    base = connections(real_server)
    at = 1
    while interrupt(lambda: real_server.open("a"), at):
        at += step
        wait_until(lambda: connections(real_server) <= base + 1)
    assert real_server.open("a").cache_prefix(list(range(16)), range(4))


@short_or_long("seconds", short=2, long=10)
def test_signals_that_raise(real_server: Backend, seconds: int) -> None:
    """With a timer whose handler raises at random, a thousand calls leave the cache in order."""
    scene = Scene(real_server)
    random = Random()
    base = connections(real_server)
    interrupted = 0

    def handler(_number: int, frame: Any) -> None:
        if frame is not None and frame.f_code.co_name == "pack":  # hiredis crashes there: not our code
            signal.setitimer(signal.ITIMER_REAL, 2e-5)
            return
        raise Interrupt

    before = signal.signal(signal.SIGALRM, handler)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            call = CALLS[random.choice(list(CALLS))](scene)
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(5e-5, 3e-3))
                call()
                signal.setitimer(signal.ITIMER_REAL, 0)
            except Interrupt:
                interrupted += 1
            finally:
                for _ in range(2):
                    try:
                        signal.setitimer(signal.ITIMER_REAL, 0)
                        break
                    except Interrupt:
                        interrupted += 1
            scene.check()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    scene.check(whole=True)
    assert interrupted > 5
    wait_until(lambda: connections(real_server) <= base + 8)
