"""Payloads in random histories: the bytes come back as they went in, or the hit is a clean, shorter one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from distprefix import operations
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.lengths import short_or_long
from tests.payloads import ALWAYS, TIERS, cut, data, delete, flip, loaded, names, sound, where
from tests.servers import Backend, Server

# Random histories

PROMPTS: dict[int, list[int]] = {
    0: prompt(2),
    1: prompt(5),
    2: prompt(5, tail=2),
    3: prompt(7, tail=4),
    4: [9] * 12,
}


WHICH = st.sampled_from(sorted(PROMPTS))


_numbers = itertools.count()


class Histories(RuleBasedStateMachine):
    """Two workers that store, load, move, evict and damage, and what is there at least."""

    def __init__(self, backend: Backend, second: Server, tier: str) -> None:
        super().__init__()
        space = f"{backend.namespace}-{next(_numbers)}"
        self.backend = Backend(backend.name, backend.admin, space, url=backend.url)
        options = {"max_run": 3, **where(tier, second)}
        self.caches = [self.backend.open(f"w{at}", **options) for at in range(2)]
        self.server = second.client() if tier == "elsewhere" else backend.admin
        self.least: dict[int, int] = {}
        """Chunks of a prompt that must be there."""

    def teardown(self) -> None:
        """Remove everything."""
        self.caches[0].clear()
        self.backend.close()

    @rule(which=WHICH, who=st.integers(0, 1), most=st.integers(1, 7))
    def store(self, which: int, who: int, most: int) -> None:
        """Store some leading chunks: all of them are there then."""
        payloads = data(PROMPTS[which])[:most]
        stored = self.caches[who].store(PROMPTS[which], payloads)
        assert stored >= len(payloads)
        self.least[which] = max(self.least.get(which, 0), stored)

    @rule(which=WHICH, who=st.integers(0, 1))
    def load(self, which: int, who: int) -> None:
        """Load: right bytes, and all that must be there."""
        found = loaded(self.caches[who], PROMPTS[which])
        assert found == data(PROMPTS[which])[: len(found)]
        assert len(found) >= self.least.get(which, 0)

    @rule(who=st.integers(0, 1))
    def demote(self, who: int) -> None:
        """Make cold what can be, one level."""
        for name in names(self.backend.admin, self.backend, "moving:"):
            self.backend.admin.delete(self.backend.keys.base + name)
        self.caches[who].demote(ALWAYS)

    @rule(which=WHICH, who=st.integers(0, 1))
    def promote(self, which: int, who: int) -> None:
        """Make warm what is cold."""
        self.caches[who].promote(PROMPTS[which])

    @rule(chunks=st.integers(0, 12))
    def evict(self, chunks: int) -> None:
        """Keep so many chunks."""
        self.caches[0]._state.link.administer(operations.evict(operations.Bounds(chunks, None, None), 100))
        self.least.clear()

    @rule(
        which=WHICH,
        at=st.integers(0, 6),
        cold=st.booleans(),
        damage=st.sampled_from((flip, cut, delete)),
        later=st.booleans(),
    )
    def damage(self, which: int, at: int, cold: bool, damage: Callable[..., None], later: bool) -> None:
        """Damage a payload, if it is there; a load finds it."""
        chunks, server = heads(PROMPTS[which]), self.server if cold else self.backend.admin
        key = self.backend.keys.payload(chunks[min(at, len(chunks) - 1)], cold=cold)
        if server.exists(key) and server.ttl(key) == -1:
            part = [key, *server.scan_iter(match=f"{key}:*", count=1000)][-1] if later else key
            damage(server, part, "")
            self.least.clear()
            for tokens in PROMPTS.values():
                found = loaded(self.caches[0], tokens)
                assert found == data(tokens)[: len(found)]
            trash: Any = self.backend.admin.smembers(self.backend.keys.trash)
            if damage is not delete and key.rsplit(":", 1)[1].encode() in trash:
                server.delete(key)
            self.drop_lone_parts(server, key)

    def drop_lone_parts(self, server: Any, key: str) -> None:
        """Remove the parts of a payload whose first value is lost: no script knows their names."""
        for name in server.scan_iter(match=f"{key}:*", count=1000):
            if not server.exists(key):
                server.delete(name)

    @rule()
    def clear(self) -> None:
        """Empty everything."""
        self.caches[1].clear()
        self.least.clear()

    @invariant()
    def is_sound(self) -> None:
        """Nothing is wrong, nothing leaks."""
        if self.backend.admin.exists(self.backend.keys.meta):
            sound(self.backend, self.caches[0], self.server)


@pytest.mark.parametrize("tier", TIERS[1:])
@short_or_long("examples", 6, 40)
def test_random_histories(real_server: Backend, second: Server, small_parts: int, tier: str, examples: int) -> None:
    """Whatever happens, bytes are right or the hit is shorter, the tree is sound and no payload is left over."""
    assert small_parts < 1000
    machine: Any = lambda: Histories(real_server, second, tier)  # noqa: E731 - it is called without arguments
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=18))
