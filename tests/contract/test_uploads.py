"""Long payloads: whoever writes them at once and is cut short anywhere, one upload is read, whole, or none."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

from distprefix import PrefixCacheOptimizer
from distprefix.redis.integrity import check_payloads
from distprefix.tiers import moving
from tests.lengths import short_or_long
from tests.payloads import ALWAYS, KEYS, loaded, meta, names
from tests.servers import Backend, Server, find_server
from tests.stepping import KINDS, WHOLE, Cut, every_order, in_steps, interleave

_numbers = itertools.count()
NEVER = 3600.0
TOKENS = [7] * 4
"""One chunk."""
STEPS = 6
"""More commands than a store of two values takes."""
SIZE = 700
"""Bytes of a payload of two small parts."""
CUTS = st.one_of(st.just(WHOLE), st.builds(Cut, st.integers(0, 14), st.sampled_from(KINDS)))
ORDERS = st.lists(st.integers(0, 1), max_size=40)
MINE, OTHER, THIRD = (Random(name).randbytes(SIZE) for name in ("mine", "other", "third"))


class Arena:
    """A server of its own with two writers and a third one, who comes when they are done."""

    def __init__(self, server: Server, cold: Server | None, **settings: Any) -> None:
        self.backend = Backend("own", server.client(), f"t{next(_numbers)}", url=server.url)
        self.cold = cold.client() if cold is not None else self.backend.admin
        where = {"cold_url": cold.url} if cold is not None else {}
        self.options = {"cold_codec": "raw", "payload_timeout_s": 20.0, "breaker_failures": 10_000, **where, **settings}
        names_of = ("one", "other")
        self.writers = [self.backend.open(name, strict=False, **self.options) for name in names_of]
        self.third = self.backend.open("third", **self.options)
        assert store(self.third, THIRD) == 1  # once, so that the server knows all scripts
        assert self.third.demote(ALWAYS) == 1
        assert self.third.promote(TOKENS) == 1
        self.clear()

    @property
    def servers(self) -> tuple[tuple[str, redis.Redis], ...]:
        """Kinds of keys, and where they lie."""
        return (("kv:", self.backend.admin), ("cold:", self.cold))

    def values(self) -> dict[str, int]:
        """All values of payloads, and their TTL."""
        found: dict[str, int] = {}
        for kind, server in self.servers:
            for name in names(server, self.backend, kind):
                ttl: Any = server.pttl(self.backend.keys.base + name)
                found[name] = ttl
        return found

    def let_ttls_pass(self) -> None:
        """Remove all that has a TTL: what the tree does not name."""
        for kind, server in self.servers:
            for name in names(server, self.backend, kind):
                if server.pttl(self.backend.keys.base + name) != -1:
                    server.delete(self.backend.keys.base + name)
        self.unclaim()

    def unclaim(self) -> None:
        """Let the claims of movers that died expire."""
        for name in names(self.backend.admin, self.backend, "moving:"):
            self.backend.admin.delete(self.backend.keys.base + name)

    def is_sound(self) -> None:
        """The tree is sound, and names just what is there."""
        assert self.third.check_integrity().problems == []
        cold = self.cold if self.cold is not self.backend.admin else None
        assert check_payloads(self.backend.admin, self.backend.keys, cold) == []

    def clear(self) -> None:
        """Empty everything; nothing stays that another run would find."""
        self.third.clear()
        self.third.demote(NEVER)
        self.let_ttls_pass()
        assert self.values() == {}

    def close(self) -> None:
        """Close the caches."""
        self.backend.close()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with nothing but what these tests write."""
    started = Server(find_server("valkey-9.1")).start()
    yield started
    started.stop()


@pytest.fixture(params=["plain", "encrypted"])
def arena(request: pytest.FixtureRequest, server: Server, small_parts: int) -> Iterator[Arena]:
    """Writers of the warm tier, with keys and without."""
    assert small_parts < SIZE < 2 * small_parts
    made = Arena(server, None, encryption_keys=KEYS if request.param == "encrypted" else "")
    with in_steps():
        yield made
    made.close()


@pytest.fixture(params=["here", "elsewhere"])
def moving_arena(
    request: pytest.FixtureRequest, server: Server, second: Server, small_parts: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Arena]:
    """Movers between the tiers of one server, or of two; none waits for the claim of another."""
    assert small_parts < SIZE
    monkeypatch.setattr(moving, "_is_mine", _claims_all)
    made = Arena(server, second if request.param == "elsewhere" else None, encryption_keys=KEYS)
    with in_steps():
        yield made
    made.close()


def _claims_all(*_: object) -> bool:
    return True


def store(cache: PrefixCacheOptimizer, payload: bytes) -> int:
    """How many chunks are stored, of one."""
    return cache.store(TOKENS, [payload])


def two_store(arena: Arena, cuts: Sequence[Cut], order: Sequence[int]) -> list[tuple[int, int]]:
    """Two writers store other bytes for one chunk; then all is as it has to be. Returns what was picked."""
    one, other = arena.writers
    works = ((lambda: store(one, MINE), cuts[0]), (lambda: store(other, OTHER), cuts[1]))
    workers, picked = interleave(works, order)
    found = loaded(arena.third, TOKENS)
    said = (cuts, order, [worker.names for worker in workers])
    assert found in ([], [MINE], [OTHER]), said
    for worker, cut in zip(workers, cuts, strict=True):
        assert worker.result != 1 or found, said
        assert worker.result == 1 or cut != WHOLE, said
    values = arena.values()
    if cuts == (WHOLE, WHOLE):
        assert len(values) == 2, said
        assert set(values.values()) == {-1}, said
    assert store(arena.third, THIRD) == 1, said
    after = loaded(arena.third, TOKENS)
    assert after == found or (not found and after in ([MINE], [OTHER], [THIRD])), said
    arena.let_ttls_pass()
    assert loaded(arena.third, TOKENS) == after, said
    arena.is_sound()
    assert len(arena.values()) == 2, said
    arena.clear()
    return picked


def test_two_writers_in_every_order(arena: Arena) -> None:
    """In every order of their commands, two writers of one chunk leave one upload, whole, and nothing of the other."""
    count = every_order(lambda order: two_store(arena, (WHOLE, WHOLE), order))
    assert count >= 70


@short_or_long("every_step", short=False, long=True)
def test_two_writers_killed_before_every_command(arena: Arena, every_step: bool) -> None:
    """Wherever two writers are killed, at most one upload is read, whole, and a third one stores at once."""
    if arena.options["encryption_keys"]:
        pytest.skip("the order of commands is the same with encryption: the random histories have it")
    kills = [Cut(at) for at in (range(STEPS - 1) if every_step else (2, 3))]
    count = sum(
        every_order(lambda order, pair=pair: two_store(arena, pair, order))
        for pair in [*itertools.combinations_with_replacement(kills, 2), *((each, WHOLE) for each in kills)]
    )
    assert count >= (500 if every_step else 100)


@short_or_long("examples", 10, 100)
def test_two_writers_cut_short_anyhow(arena: Arena, examples: int) -> None:
    """Commands that are refused, or have an effect without an answer, leave at most one upload, whole."""

    @settings(max_examples=examples)
    @given(one=CUTS, other=CUTS, order=ORDERS)
    def histories(one: Cut, other: Cut, order: list[int]) -> None:
        two_store(arena, (one, other), order)

    histories()


def test_what_a_failed_upload_wrote_is_removed(arena: Arena) -> None:
    """A writer that is refused a part while it lives removes those that it wrote; later ones find no trace of it."""
    one, _ = arena.writers
    size = 4 * SIZE
    workers, _ = interleave([(lambda: one.store(TOKENS, [Random(1).randbytes(size)]), Cut(3, "refused"))], [])
    assert workers[0].names.count("SET") == 3
    assert workers[0].names[-1] == "UNLINK"
    assert arena.values() == {}
    arena.clear()


def two_move(arena: Arena, cuts: Sequence[Cut], order: Sequence[int], *, is_promotion: bool) -> None:
    """Two movers take one chunk to the other tier; whatever happens it is there, and a third one finishes."""
    assert store(arena.third, MINE) == 1
    if is_promotion:
        assert arena.third.demote(ALWAYS) == 1
    works = [
        (
            (lambda cache=cache: cache.promote(TOKENS)) if is_promotion else (lambda cache=cache: cache.demote(ALWAYS)),
            cut,
        )
        for cache, cut in zip(arena.writers, cuts, strict=True)
    ]
    workers, _ = interleave(works, order)
    said = (cuts, order, [worker.names for worker in workers])
    assert loaded(arena.third, TOKENS) == [MINE], said
    assert store(arena.third, MINE) == 1
    assert loaded(arena.third, TOKENS) == [MINE], said
    arena.unclaim()
    arena.third.demote(NEVER)
    arena.let_ttls_pass()
    assert loaded(arena.third, TOKENS) == [MINE], said
    arena.is_sound()
    assert len(arena.values()) == 2, said
    if is_promotion:
        arena.third.promote(TOKENS)
    else:
        arena.third.demote(ALWAYS)
    arena.third.demote(NEVER)
    assert meta(arena.backend, "cold" if is_promotion else "warm") == 0, said
    arena.let_ttls_pass()
    assert loaded(arena.third, TOKENS) == [MINE], said
    assert len(arena.values()) == 2, said
    arena.is_sound()
    arena.clear()


@short_or_long("examples", 10, 100)
@pytest.mark.parametrize("is_promotion", [False, True])
def test_two_movers_cut_short_anyhow(moving_arena: Arena, is_promotion: bool, examples: int) -> None:
    """Two movers of one chunk, each cut short anyhow, lose nothing, and a third one moves it at the first try."""

    @settings(max_examples=examples)
    @given(one=CUTS, other=CUTS, order=ORDERS)
    def histories(one: Cut, other: Cut, order: list[int]) -> None:
        two_move(moving_arena, (one, other), order, is_promotion=is_promotion)

    histories()


@pytest.mark.parametrize("is_promotion", [False, True])
def test_two_movers_in_turn(moving_arena: Arena, is_promotion: bool) -> None:
    """One mover is held up before each of its commands while the other one moves the chunk: nothing is lost."""
    for at in range(16):
        two_move(moving_arena, (WHOLE, WHOLE), [0] * at + [1] * 40, is_promotion=is_promotion)
