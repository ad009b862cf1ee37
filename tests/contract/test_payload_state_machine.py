"""The random histories of workers, with payloads: stored, loaded and moved, with a crash inside each."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from random import Random
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule, run_state_machine_as_test

from distprefix.errors import UnavailableError
from distprefix.redis.client import Client
from distprefix.redis.data import DataPool
from distprefix.redis.integrity import check_payloads
from distprefix.tiers.elsewhere import Elsewhere
from tests.contract.test_model import Prefix, tokens
from tests.contract.test_state_machine import PROMPTS, WHO, Histories, Shard, prefixes
from tests.lengths import short_or_long
from tests.payloads import ALWAYS, TIERS, names, where
from tests.servers import Backend, Server

STEPS = st.integers(0, 12)


def data(chunks: Prefix) -> list[bytes]:
    """A payload for every chunk of a prompt, some of one value and some of several small parts."""
    drawn = [Random(repr(chunks[: i + 1])) for i in range(len(chunks))]
    return [each.randbytes(each.choice((30, 30, 900))) + bytes(30) for each in drawn]


@contextmanager
def crash_after(steps: int) -> Generator[list[int]]:
    """Let no server be asked for anything after so many calls; the last values that are written are not all written.

    Gives how many calls were refused.
    """
    left, refused = [steps], [0]

    def is_dead() -> bool:
        left[0] -= 1
        refused[0] += left[0] < 0
        return left[0] < 0

    def dies(real: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if is_dead():
                raise UnavailableError("the worker crashed here")
            return real(*args, **options)

        return call

    write = DataPool.set

    def half(self: DataPool, values: Sequence[Any], deadline: float, **options: Any) -> list[bool]:
        if is_dead():
            if left[0] == -1:
                write(self, values[: len(values) // 2], deadline, **options)
            raise UnavailableError("the worker crashed here")
        return write(self, values, deadline, **options)

    with (
        patch.object(Client, "command", dies(Client.command)),
        patch.object(DataPool, "get", dies(DataPool.get)),
        patch.object(DataPool, "delete", dies(DataPool.delete)),
        patch.object(Elsewhere, "_ask", dies(Elsewhere._ask)),
        patch.object(DataPool, "set", half),
    ):
        yield refused


class Payloads(Histories):
    """The steps of the histories, and those of payloads."""

    cold_server: Any

    def __init__(self) -> None:
        super().__init__()
        self.stored: set[Prefix] = set()
        """Every prefix whose last chunk has a payload."""

    def teardown(self) -> None:
        """Remove the cold payloads too."""
        super().teardown()
        for key in self.cold_server.scan_iter(match=f"{self.backend.keys.base}*", count=1000):
            self.cold_server.delete(key)

    def keep(self, after: Shard) -> None:
        """What went from the tree took its payload along."""
        super().keep(after)
        self.stored &= after.chunks

    def take_in(self, *workers: str) -> None:
        """Whatever a worker gives up, nothing with a payload goes."""
        super().take_in(*workers)
        assert self.stored <= self.model.tree

    def are_right(self, worker: str, chunks: Prefix, *, whole: bool) -> None:
        """What a load gives is right, and all there is unless something crashed."""
        found = self.caches[worker].load(tokens(chunks))
        assert list(map(bytes, found.payloads)) == data(chunks)[: found.chunks]
        there = len(prefixes(chunks) & self.stored)
        assert found.chunks <= there
        assert found.chunks == there or not whole

    @rule(worker=WHO, chunks=PROMPTS)
    def store(self, worker: str, chunks: Prefix) -> None:
        """A worker stores the payloads of a prompt: all are there then."""
        self.name(chunks)
        assert self.caches[worker].store(tokens(chunks), data(chunks)) == len(chunks)
        self.stored |= prefixes(chunks)
        self.model.tree |= prefixes(chunks)

    @rule(worker=WHO, chunks=PROMPTS, steps=STEPS)
    def crash_in_store(self, worker: str, chunks: Prefix, steps: int) -> None:
        """A store ends anywhere: nothing is lost, and what the tree tells of is there."""
        self.name(chunks)
        with crash_after(steps), suppress(UnavailableError):
            self.caches[worker].store(tokens(chunks), data(chunks))
        shard = self.read()
        assert self.stored <= shard.stored <= self.stored | prefixes(chunks)
        assert self.model.tree <= shard.chunks <= self.model.tree | shard.stored
        self.stored, self.model.tree = shard.stored, shard.chunks

    @rule(worker=WHO, chunks=PROMPTS)
    def load(self, worker: str, chunks: Prefix) -> None:
        """A worker loads what is there of a prompt."""
        self.are_right(worker, chunks, whole=True)

    @rule(worker=WHO, chunks=PROMPTS, steps=STEPS)
    def crash_in_load(self, worker: str, chunks: Prefix, steps: int) -> None:
        """A load ends anywhere: what it gave until then is right, and nothing is lost."""
        with crash_after(steps), suppress(UnavailableError):
            self.are_right(worker, chunks, whole=False)

    @rule(worker=WHO)
    def demote(self, worker: str) -> None:
        """A worker makes cold what can be: nothing is lost."""
        for name in names(self.admin, self.backend, "moving:"):
            self.admin.delete(self.backend.keys.base + name)  # of a mover that crashed: it would end by itself
        self.caches[worker].demote(ALWAYS)

    @rule(worker=WHO, steps=STEPS)
    def crash_in_demote(self, worker: str, steps: int) -> None:
        """A demotion ends anywhere: nothing is lost."""
        with crash_after(steps), suppress(UnavailableError):
            self.caches[worker].demote(ALWAYS)

    @rule(worker=WHO, chunks=PROMPTS)
    def promote(self, worker: str, chunks: Prefix) -> None:
        """A worker makes a prompt warm: nothing is lost."""
        self.caches[worker].promote(tokens(chunks))

    @rule(worker=WHO, chunks=PROMPTS, steps=STEPS)
    def crash_in_promote(self, worker: str, chunks: Prefix, steps: int) -> None:
        """A promotion ends anywhere: nothing is lost."""
        with crash_after(steps), suppress(UnavailableError):
            self.caches[worker].promote(tokens(chunks))

    @invariant()
    def all_payloads_are_accounted_for(self) -> None:
        """What the tree names is there with just that many bytes, and nothing else is, but for what goes by itself."""
        if not self.caches:
            return
        assert self.read().stored == self.stored
        if self.admin.exists(self.backend.keys.meta):
            assert check_payloads(self.admin, self.backend.keys, self.cold_server) == []


@pytest.mark.parametrize("tier", TIERS[1:])
@short_or_long("examples", 4, 25)
def test_payloads_are_what_the_model_says(
    real_server: Backend, second: Server, small_parts: int, tier: str, examples: int
) -> None:
    """Whatever three workers do with payloads and wherever they crash: no wrong byte, none lost, none left over."""
    assert small_parts < 900

    class OnThisServer(Payloads):
        server = real_server
        options = where(tier, second)
        cold_server = second.client() if tier == "elsewhere" else real_server.admin

    run_state_machine_as_test(OnThisServer, settings=settings(max_examples=examples, stateful_step_count=30))
