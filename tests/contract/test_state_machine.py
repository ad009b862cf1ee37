"""Random histories of three workers, with crashes in the middle of what takes several calls, against a model."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from distprefix import PrefixCacheOptimizer, budget, operations
from distprefix.errors import UnavailableError
from distprefix.reservations import Claim, Lease
from tests.contract.test_model import Prefix, tokens
from tests.lengths import short_or_long
from tests.servers import Backend

WORKERS = ("w1", "w2", "w3")
TTL_S = {"w1": 0.0, "w2": 0.0, "w3": 600.0}
"""w3 lives on what it has learned and on the log; the others always ask."""
LIMITS: dict[str, Any] = {
    "chunk_size": 2,
    "max_run": 3,
    "high_watermark": 1.0,
    "low_watermark": 1.0,
    "hot_threshold": 3,
    "eviction_batch_size": 2,
}
HOT_MS = 300_000
PROMPTS = st.tuples(st.integers(1, 6), st.integers(0, 4), st.integers(0, 2)).map(
    lambda parts: (0,) * parts[0] + (1,) * parts[1] + (0,) * parts[2]
)
"""Prompts that often begin alike and branch anywhere."""
WHO = st.sampled_from(WORKERS)
CALLS = st.integers(1, 3)
_numbers = itertools.count()


def prefixes(chunks: Prefix) -> set[Prefix]:
    """A prompt and all that it begins with."""
    return {chunks[:i] for i in range(1, len(chunks) + 1)}


def extends(chunks: Prefix, prefix: Prefix) -> bool:
    """Whether a prompt begins with a prefix."""
    return chunks[: len(prefix)] == prefix


def cut_short(operation: Callable[..., Generator[Any, Any, Any]], calls: int) -> Callable[..., Any]:
    """The operation, abandoned before it sends one call more than `calls`."""

    def begin(*args: Any, **options: Any) -> Generator[Any, Any, Any]:
        running, reply = operation(*args, **options), None
        for _ in range(calls):
            try:
                call = running.send(reply)
            except StopIteration as done:
                return done.value
            reply = yield call
        try:
            running.send(reply)
        except StopIteration as done:
            return done.value
        raise UnavailableError("the worker crashed here")

    return begin


@contextmanager
def crash(name: str, calls: int, **sizes: int) -> Generator[None]:
    """Let an operation take small steps, and end it after so many calls."""
    replaced: dict[str, Any] = {name: cut_short(getattr(operations, name), calls), **sizes}
    with patch.multiple(operations, **replaced):
        yield


@dataclass
class Node:
    """A radix node as it is on the server."""

    prefixes: list[Prefix]
    accessed: float
    hits: int
    held: dict[str, tuple[int, int]]
    """Worker to epoch and chunks."""
    stored: int
    """Leading chunks whose payloads are there, in either tier."""
    parent: str = ""
    """Head of the parent; empty for a root."""


@dataclass
class Shard:
    """All that is on the server."""

    nodes: dict[str, Node]
    leaves: dict[str, float]
    epochs: dict[str, int]

    @property
    def chunks(self) -> set[Prefix]:
        """Every prefix in the tree."""
        return {prefix for node in self.nodes.values() for prefix in node.prefixes}

    @property
    def stored(self) -> set[Prefix]:
        """Every prefix whose last chunk has a payload."""
        return {prefix for node in self.nodes.values() for prefix in node.prefixes[: node.stored]}

    def held(self, worker: str) -> set[Prefix]:
        """What the worker's running process covers."""
        return {
            prefix
            for node in self.nodes.values()
            for epoch, size in [node.held.get(worker, (0, 0))]
            for prefix in node.prefixes[:size]
            if epoch == self.epochs[worker]
        }

    def without(self, most_chunks: int, most_leaves: int, leased: set[Prefix]) -> set[Prefix]:
        """What an eviction leaves: the plain rule, one leaf after the other; a leaf that meets `leased` stays."""
        runs = {head: list(node.prefixes) for head, node in self.nodes.items()}
        used = {head: node.accessed for head, node in self.nodes.items()}
        order = dict(self.leaves)
        while True:
            over, many = sum(map(len, runs.values())) - most_chunks, len(order) > most_leaves
            free = [head for head in order if not leased.intersection(runs[head])]
            if (over <= 0 and not many) or not free:
                return {prefix for run in runs.values() for prefix in run}
            head = min(free, key=lambda head: (order[head], head))
            if not many and len(runs[head]) > over:
                del runs[head][-over:]
                continue
            del runs[head], order[head]
            parent = self.nodes[head].parent
            if parent and all(self.nodes[other].parent != parent for other in runs):
                used[parent] = max(used[parent], used[head])
                order[parent] = used[parent] + HOT_MS * (self.nodes[parent].hits >= LIMITS["hot_threshold"])


@dataclass
class Leased:
    """A lease and what it protects."""

    lease: Lease
    worker: str
    prefix: Prefix
    usable: bool = True
    """Whether the process that took it is still there."""


@dataclass
class Model:
    """What is so, whatever the package says."""

    has: dict[str, set[Prefix]] = field(default_factory=lambda: {worker: set() for worker in WORKERS})
    """What Redis was told that the worker has."""
    own: dict[str, set[Prefix]] = field(default_factory=lambda: {worker: set() for worker in WORKERS})
    """What the worker has blocks of."""
    waiting: dict[str, list[Prefix]] = field(default_factory=lambda: {worker: [] for worker in WORKERS})
    """What it took back and Redis was not told."""
    tree: set[Prefix] = field(default_factory=set[Prefix])
    blocks: dict[tuple[str, Prefix], int] = field(default_factory=dict[tuple[str, Prefix], int])
    leases: list[Leased] = field(default_factory=list[Leased])
    claims: dict[Prefix, str] = field(default_factory=dict[Prefix, str])
    """Missing prefix to who computes it."""

    def ids(self, worker: str, chunks: Prefix) -> list[int]:
        """Blocks of a prompt's chunks: each worker has its own for every prefix."""
        wanted = [(worker, chunks[:i]) for i in range(1, len(chunks) + 1)]
        return [self.blocks.setdefault(each, len(self.blocks)) for each in wanted]

    def held(self, worker: str, chunks: Prefix) -> int:
        """How many leading chunks of a prompt the worker has."""
        return len(prefixes(chunks) & self.has[worker])

    def settle(self, worker: str) -> None:
        """Redis took what waited."""
        for prefix in self.waiting[worker]:
            self.has[worker] = {each for each in self.has[worker] if not extends(each, prefix)}
        self.waiting[worker].clear()

    @property
    def leased(self) -> set[Prefix]:
        """What no eviction may take."""
        return set[Prefix]().union(*(prefixes(each.prefix) for each in self.leases))


class Histories(RuleBasedStateMachine):
    """The steps. After each of them the whole shard is what the model says."""

    server: Backend
    options: Mapping[str, Any] = {}
    """Settings besides."""

    def __init__(self) -> None:
        super().__init__()
        name = f"{self.server.namespace}-{next(_numbers)}"
        self.backend = Backend("", self.server.admin, name, url=self.server.url)
        self.admin: Any = self.server.admin
        self.model = Model()
        self.caches: dict[str, PrefixCacheOptimizer] = {}
        self.names: dict[bytes, Prefix] = {}
        self.claims: list[tuple[str, Prefix, Claim]] = []
        self.asked: list[Prefix] = []
        """What was looked up last: w3 must not go on believing it."""

    @initialize()
    def open_all(self) -> None:
        """Start the workers."""
        for worker in WORKERS:
            self.start(worker)

    def teardown(self) -> None:
        """Close everything and remove the keys."""
        for cache in self.caches.values():
            cache.close()
        keys = list(self.admin.scan_iter(match=f"{self.backend.keys.base}*", count=1000))
        self.admin.delete(*keys, *self.backend.keys.own)

    def start(self, worker: str) -> None:
        """Open a worker's cache."""
        config = self.backend.config(worker, **LIMITS, l1_ttl_s=TTL_S[worker], **self.options)
        self.caches[worker] = PrefixCacheOptimizer(config)
        self.caches[worker].catch_up()

    def refreshed(self, worker: str) -> PrefixCacheOptimizer:
        """A worker's cache that knows what was removed and who has restarted."""
        cache = self.caches[worker]
        cache.catch_up()
        cache._state.link.refresh()
        return cache

    def name(self, chunks: Prefix) -> None:
        """Remember which prefixes a prompt's hashes stand for."""
        state = self.caches["w1"]._state
        prompt = state.read(tokens(chunks))
        hashes = state.hashes(prompt, state.l1.find(prompt, 0.0))
        for i in range(len(chunks)):
            self.names[hashes[16 * i : 16 * i + 16]] = chunks[: i + 1]

    def read(self) -> Shard:
        """The whole shard, by plain commands."""
        keys, nodes, ends, parents = self.backend.keys, dict[str, Node](), {"": ""}, dict[str, str]()
        for key in self.admin.scan_iter(match=f"{keys.base}n:*", count=1000):
            fields: dict[bytes, bytes] = self.admin.hgetall(key)
            head, run = key.decode().rpartition(":")[2], fields[b"r"]
            held: dict[str, tuple[int, int]] = {}
            for name, value in fields.items():
                if name.startswith(b"h:"):
                    epoch, _, size = value.partition(b":")
                    held[name[2:].decode().partition("/")[0]] = (int(epoch), int(size))
            tiers = [held.pop(tier, (1, 0))[1] for tier in ("@warm", "@cold")]
            named = [self.names[run[i : i + 16]] for i in range(0, len(run), 16)]
            nodes[head] = Node(named, float(fields[b"a"]), int(fields[b"n"]), held, max(tiers))
            parents[head], ends[run[-16:].hex()] = fields[b"p"].decode(), head
        for head, node in nodes.items():
            node.parent = ends[parents[head]]
        leaves = {head.decode(): score for head, score in self.admin.zrange(keys.leaves, 0, -1, withscores=True)}
        epochs = {
            name.decode().partition("/")[0]: int(epoch) for name, epoch in self.admin.hgetall(keys.epochs).items()
        }
        return Shard(nodes, leaves, epochs)

    def take_in(self, *workers: str) -> None:
        """After a step that took something out: the tree, and what these workers hold, as the server says."""
        shard, model = self.read(), self.model
        assert shard.chunks <= model.tree
        model.tree = shard.chunks
        for worker in workers:
            assert shard.held(worker) <= model.has[worker]
            model.has[worker] = shard.held(worker)
        model.leases = [each for each in model.leases if each.prefix in model.tree]

    def fulfil(self, worker: str, chunks: Prefix) -> None:
        """Publishing a prompt ends the claims that the process has on it."""
        for held in [each for each in self.claims if each[0] == worker and extends(chunks, each[1])]:
            self.claims.remove(held)
            self.model.claims.pop(held[1], None)

    @rule(worker=WHO, chunks=PROMPTS, described=st.booleans())
    def publish(self, worker: str, chunks: Prefix, described: bool) -> None:
        """A worker says that it has a prompt."""
        model, waited = self.model, bool(self.model.waiting[worker])
        self.name(chunks)
        metadata = {"n": len(chunks)} if described else None
        self.caches[worker].cache_prefix(tokens(chunks), model.ids(worker, chunks), metadata)
        model.settle(worker)
        model.has[worker] |= prefixes(chunks)
        model.own[worker] |= prefixes(chunks)
        model.tree |= prefixes(chunks)
        self.fulfil(worker, chunks)
        if waited:
            self.take_in()

    @rule(worker=WHO, chunks=PROMPTS, calls=CALLS)
    def crash_in_publish(self, worker: str, chunks: Prefix, calls: int) -> None:
        """A publish ends after some of its calls: its beginning is there, whole, and nothing else."""
        model, done = self.model, False
        self.name(chunks)
        with crash("publish", calls, WINDOW=3), suppress(UnavailableError):
            self.caches[worker].cache_prefix(tokens(chunks), model.ids(worker, chunks))
            done = True
        model.settle(worker)
        model.own[worker] |= prefixes(chunks)
        shard, most = self.read(), prefixes(chunks)
        least = most if done else prefixes(chunks[: 3 * calls])
        assert least | model.has[worker] <= shard.held(worker) <= most | model.has[worker]
        assert model.has[worker] | least <= shard.chunks <= model.tree | most
        model.has[worker], model.tree = shard.held(worker), shard.chunks
        model.leases = [each for each in model.leases if each.prefix in model.tree]
        if done:
            self.fulfil(worker, chunks)

    @rule(worker=WHO, chunks=PROMPTS)
    def look_up(self, worker: str, chunks: Prefix) -> None:
        """Who always asks is told what is so; who lives on the log is never told more."""
        cache, model = self.refreshed(worker), self.model
        self.asked = [chunks, *self.asked[:3]]
        wanted = {f"{each}/0@gpu": held for each in WORKERS if (held := model.held(each, chunks))}
        result = cache.find_longest_cache_hit(tokens(chunks))
        told = {holder: held for holder, held in result.holders if not holder.startswith("@")}
        assert result.matched_chunks == max(dict(result.holders).values(), default=0)
        assert all(held <= wanted.get(holder, 0) for holder, held in told.items())
        assert told == wanted or TTL_S[worker] > 0
        for each in WORKERS:
            asked = cache.find_longest_cache_hit(tokens(chunks), blocks_of=f"{each}/0@gpu")
            assert {who: held for who, held in asked.holders if not who.startswith("@")} == wanted
            assert list(asked.block_ids) == model.ids(each, chunks)[: model.held(each, chunks)]
        own = len(prefixes(chunks) & model.own[worker])
        assert cache.get_computed_blocks(tokens(chunks)) == model.ids(worker, chunks)[:own]

    @rule(worker=WHO)
    def flush(self, worker: str) -> None:
        """A worker tells Redis of its hits and of what waits."""
        self.caches[worker].flush()
        self.model.settle(worker)
        self.take_in()

    @rule(worker=WHO, chunks=PROMPTS, calls=st.integers(0, 3))
    def remove(self, worker: str, chunks: Prefix, calls: int) -> None:
        """A worker loses a block and all that lies behind it; with `calls`, Redis hears of it only in part for now."""
        model, cache = self.model, self.caches[worker]
        block = model.ids(worker, chunks)[-1]
        if calls:
            with crash("trim", calls, WORK_A_CALL=1):
                removed = cache.remove_skipped_blocks([block])
        else:
            removed = cache.remove_skipped_blocks([block])
        assert removed == (chunks in model.own[worker])
        if removed:
            model.own[worker] = {each for each in model.own[worker] if not extends(each, chunks)}
            model.waiting[worker].append(chunks)
        if removed and not cache.get_metrics()["retractions_waiting"]:
            model.settle(worker)
            self.take_in()
        else:
            lost = [each for each in model.has[worker] if any(extends(each, cut) for cut in model.waiting[worker])]
            kept = model.has[worker].difference(lost)
            self.take_in(worker)
            assert kept <= model.has[worker]

    @rule(k=st.integers(0, 12), leaves=st.none() | st.integers(1, 6))
    def evict(self, k: int, leaves: int | None) -> None:
        """Just what has to go goes, in the order of last use, and nothing that is leased."""
        before, model = self.read(), self.model
        most, most_leaves = max(1, len(before.chunks) - k), leaves or 10_000
        wanted = before.without(most, most_leaves, model.leased)
        options = {**LIMITS, "l2_max_chunks": most, "max_cached_sequences": most_leaves}
        with PrefixCacheOptimizer(self.backend.config("evictor", **options)) as cache:
            evicted = cache.maintain()
        after = self.read()
        assert model.leased <= after.chunks
        assert after.chunks == wanted
        assert (evicted.chunks, evicted.more) == (len(before.chunks) - len(after.chunks), False)
        self.keep(after)

    @rule(k=st.integers(1, 12))
    def crash_in_evict(self, k: int) -> None:
        """An eviction ends after its first leaf: what went is a part of what had to go."""
        before, model = self.read(), self.model
        most = max(1, len(before.chunks) - k)
        options = {**LIMITS, "l2_max_chunks": most, "eviction_batch_size": 1}
        with patch.object(budget, "_CALLS", 1), PrefixCacheOptimizer(self.backend.config("e", **options)) as cache:
            cache.maintain()
        after = self.read()
        assert before.without(most, 10_000, model.leased) <= after.chunks <= before.chunks
        self.keep(after)

    def keep(self, after: Shard) -> None:
        """Holders have what is left of what they had, and what is left is whole."""
        model = self.model
        assert after.chunks <= model.tree
        assert all(prefixes(prefix) <= after.chunks for prefix in after.chunks)
        model.tree = after.chunks
        for worker in WORKERS:
            model.has[worker] &= after.chunks
        model.leases = [each for each in model.leases if each.prefix in after.chunks]

    @rule(worker=WHO, chunks=PROMPTS)
    def lease(self, worker: str, chunks: Prefix) -> None:
        """A worker protects what it found."""
        result = self.refreshed(worker).find_longest_cache_hit(tokens(chunks))
        lease = result.lease(600)
        assert (lease.chunks, lease.active) == (result.matched_chunks, result.hit)
        if result.hit:
            self.model.leases.append(Leased(lease, worker, chunks[: result.matched_chunks]))

    @precondition(lambda self: any(each.usable for each in self.model.leases))
    @rule(data=st.data(), end=st.booleans())
    def renew_or_release(self, data: st.DataObject, end: bool) -> None:
        """A lease of what is there can be renewed, and when it is released it protects nothing any more."""
        chosen = data.draw(st.sampled_from([each for each in self.model.leases if each.usable]))
        self.refreshed(chosen.worker)
        if end:
            chosen.lease.release()
            self.model.leases.remove(chosen)
        else:
            assert chosen.lease.renew(600)

    @rule(worker=WHO, chunks=PROMPTS)
    def claim(self, worker: str, chunks: Prefix) -> None:
        """Who claims first is who computes."""
        result = self.refreshed(worker).find_longest_cache_hit(tokens(chunks))
        claim, missing = result.claim(600), chunks[: result.matched_chunks + 1]
        if result.matched_chunks == len(chunks):
            assert claim.mine
            return
        assert claim.worker == self.model.claims.setdefault(missing, worker)
        assert claim.mine == (claim.worker == worker)
        if claim.mine and not any(each[:2] == (worker, missing) for each in self.claims):
            self.claims.append((worker, missing, claim))

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def unclaim(self, data: st.DataObject) -> None:
        """Who took a claim can take it back."""
        chosen = data.draw(st.sampled_from(self.claims))
        self.claims.remove(chosen)
        chosen[2].release()
        del self.model.claims[chosen[1]]

    @rule(worker=WHO, calls=st.integers(0, 12))
    def drop(self, worker: str, calls: int) -> None:
        """A worker empties the namespace; with `calls` it crashes on the way, and what is left is whole."""
        model, before = self.model, self.read()
        if calls:
            with crash("drop", calls, WORK_A_CALL=1), suppress(UnavailableError):
                self.caches[worker].clear()
                model.own[worker].clear()
        else:
            self.caches[worker].clear()
            model.own[worker].clear()
        after = self.read()
        assert len(after.nodes) <= (len(before.nodes) if calls else 0)
        assert len(after.nodes) >= len(before.nodes) - calls or not calls
        self.keep(after)

    @rule(worker=WHO, gracefully=st.booleans())
    def restart(self, worker: str, gracefully: bool) -> None:
        """A worker starts anew, after a crash or a good end: what it published before counts for nothing."""
        model = self.model
        if gracefully:
            self.caches[worker].close()
        else:
            self.caches[worker]._state.unusable = "crashed"
            self.caches[worker]._tiers.close()
            self.caches[worker]._state.link.close()
        for state in (model.waiting[worker], model.has[worker], model.own[worker]):
            state.clear()
        for each in model.leases:
            each.usable = each.usable and each.worker != worker
        self.claims = [each for each in self.claims if each[0] != worker]
        self.start(worker)
        self.take_in()

    @rule(worker=WHO, by=WHO)
    def drop_worker(self, worker: str, by: str) -> None:
        """A worker is given up by another and started anew: nothing that it published before counts."""
        assert self.caches[by].drop_worker(worker) == 1
        assert self.read().held(worker) == set()
        self.restart(worker, gracefully=False)

    @rule(worker=WHO, calls=st.integers(1, 12))
    def crash_in_sweep(self, worker: str, calls: int) -> None:
        """A sweep ends after some of its calls: what counts stays, and the next one finds the rest."""
        with crash("sweep", calls, WORK_A_CALL=1), suppress(UnavailableError):
            self.caches[worker].sweep()
        after = self.read()
        assert {each: after.held(each) for each in WORKERS} == self.model.has
        self.keep(after)

    @rule(worker=WHO)
    def sweep(self, worker: str) -> None:
        """What counts for nothing goes, and what nobody covers with it; what counts stays."""
        swept = self.caches[worker].sweep()
        after, model = self.read(), self.model
        assert {each: after.held(each) for each in WORKERS} == model.has
        assert swept.chunks == len(model.tree) - len(after.chunks)
        for node in after.nodes.values():
            assert all(epoch == after.epochs[each] for each, (epoch, _) in node.held.items())
        self.keep(after)

    @invariant()
    def whole(self) -> None:
        """Nothing is damaged, the counts are exact, and the shard is what the model says."""
        if not self.caches:
            return
        assert self.caches["w1"].check_integrity().problems == []
        shard = self.read()
        assert shard.chunks == self.model.tree
        assert {worker: shard.held(worker) for worker in WORKERS} == self.model.has
        assert self.model.leased <= self.model.tree
        follower = self.refreshed("w3")
        for chunks in self.asked:
            for holder, held in follower.find_longest_cache_hit(tokens(chunks)).holders:
                if not holder.startswith("@"):
                    assert held <= self.model.held(holder.partition("/")[0], chunks)


@short_or_long("examples", 10, 60)
def test_the_shard_is_what_the_model_says(real_server: Backend, examples: int) -> None:
    """Whatever three workers do and wherever they crash: all is sound, exactly counted and found as the model says."""

    class OnThisServer(Histories):
        server = real_server

    run_state_machine_as_test(OnThisServer, settings=settings(max_examples=examples, stateful_step_count=30))
