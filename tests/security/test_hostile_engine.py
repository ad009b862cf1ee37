"""An engine that lies in its events is believed about itself alone, and makes nobody else wrong."""

from __future__ import annotations

import os
import random
import time
from typing import Any

import msgpack
import pytest

from distprefix import Chain
from distprefix.events.follower import Follower
from distprefix.events.frames import Frame
from distprefix.operations import Swept
from tests.followers import Kept, follow, holders
from tests.servers import Backend

PROMPT = list(range(64))
OTHER = list(range(500, 564))
SIZE = 16


def message(seq: int, *events: Any) -> Frame:
    """A message of these events."""
    return Frame(seq, msgpack.packb([time.time(), list(events), 0]) or b"")


def stored(keys: list[int], tokens: list[int], parent: Any = None, medium: Any = "GPU") -> list[Any]:
    """Blocks of a prompt."""
    return ["BlockStored", keys, parent, tokens, SIZE, None, medium, None, [None] * len(keys)]


def begun(backend: Backend, worker: str, **settings: Any) -> Follower:
    """A follower that leads."""
    follower, _ = follow(backend, Kept(), worker, chunk_size=SIZE, **settings)
    assert follower.begin()
    return follower


def held_fields(backend: Backend) -> set[str]:
    """Every holder that any node names."""
    admin: Any = backend.admin
    nodes = admin.scan_iter(match=f"{backend.keys.base}n:*", count=1000)
    fields = {field for node in nodes for field in admin.hkeys(node)}
    return {field[2:].decode(errors="replace") for field in fields if field.startswith(b"h:")}


MEDIA = ["GPU", "gpu@warm", "@warm", "@cold", "x/0@gpu", "", "a" * 500, "\x1b[2J", "h:", "gpu\0", "GPU ", 5, None, "{}"]


def test_no_medium_names_another_holder(real_server: Backend) -> None:
    """Whatever an engine calls its medium, all that it writes is under its own rank, and no shared tier is named."""
    evil = begun(real_server, "evil")
    for number, medium in enumerate(MEDIA):
        evil.take([message(number, stored([number * 10], [number] * SIZE, medium=medium))])
    for holder in held_fields(real_server):
        member, _, medium = holder.partition("@")
        assert member == "evil/0"
        assert medium.isidentifier() or medium.replace("-", "").replace("_", "").replace(".", "").isalnum()


def test_removals_and_clears_concern_the_engine_alone(real_server: Backend) -> None:
    """An engine that removes and clears what another one holds, by the other's own keys, takes nothing from it."""
    honest = begun(real_server, "honest")
    honest.take([message(0, stored([1, 2, 3, 4], PROMPT))])
    evil = begun(real_server, "evil")
    evil.take([message(0, stored([1, 2, 3, 4], PROMPT))])
    reader = real_server.open("reader", chunk_size=SIZE)
    assert holders(reader, PROMPT) == {"honest/0@gpu": 4, "evil/0@gpu": 4}
    evil.take([message(1, ["BlockRemoved", [1, 2, 3, 4], "GPU"])])
    assert holders(reader, PROMPT) == {"honest/0@gpu": 4}
    evil.take([message(2, ["AllBlocksCleared"])])
    assert holders(reader, PROMPT) == {"honest/0@gpu": 4}
    assert reader.sweep() == Swept(0, 0, 0) or holders(reader, PROMPT) == {"honest/0@gpu": 4}


def test_a_key_that_changes_its_meaning_credits_no_other_prompt(real_server: Backend) -> None:
    """An engine that names two prompts by the same keys is never said to hold the second where it stored the first."""
    evil = begun(real_server, "evil")
    evil.take([message(0, stored([1, 2, 3, 4], PROMPT))])
    evil.take([message(1, stored([2, 3, 4], OTHER[:48], parent=1))])
    reader = real_server.open("reader", chunk_size=SIZE)
    mixed = [*PROMPT[:16], *OTHER[:48]]
    for prompt in (PROMPT, OTHER, mixed):
        told = holders(reader, prompt)
        assert set(told) <= {"evil/0@gpu"}
    assert not (holders(reader, PROMPT).get("evil/0@gpu", 0) > 1 and holders(reader, mixed).get("evil/0@gpu", 0) > 1)
    assert reader.check_integrity().ok


@pytest.mark.parametrize("parent", [1, 2, "own", 2**64 - 1, -1, b"", b"x" * 5000, [1], {}, 1.5, "text"])
def test_parents_that_cannot_be_credit_nothing(real_server: Backend, parent: Any) -> None:
    """A block that is its own parent, two that are each other's, and parents of other kinds are in no prompt."""
    evil = begun(real_server, "evil")
    keys = [7, 8, 9, 10]
    evil.take([message(0, stored(keys, PROMPT, parent=keys[0] if parent == "own" else parent))])
    evil.take([message(1, stored([1], PROMPT[:16], parent=2), stored([2], PROMPT[16:32], parent=1))])
    reader = real_server.open("reader", chunk_size=SIZE)
    assert holders(reader, PROMPT) == {}
    evil.take([message(2, stored([70], OTHER[:16]))])
    assert holders(reader, OTHER) == {"evil/0@gpu": 1}
    assert reader.check_integrity().ok


@pytest.mark.parametrize("seq", [2**31, 2**53 + 1, 2**63 - 1, 2**64 - 1])
def test_numbers_of_messages_trap_nothing(real_server: Backend, seq: int) -> None:
    """A message number at any bound is taken, and the engine that begins anew afterwards is followed as well."""
    evil = begun(real_server, "evil")
    evil.take([message(seq, stored([1], PROMPT[:16]))])
    evil.take([message(0, stored([2], OTHER[:16]))])
    evil.take([message(1, stored([3], OTHER[16:32], parent=2))])
    reader = real_server.open("reader", chunk_size=SIZE)
    assert holders(reader, OTHER).get("evil/0@gpu", 0) in (0, 2)
    evil.take([message(5, stored([1], PROMPT[:16]))])
    assert reader.check_integrity().ok


BAD_TOKENS: list[Any] = [
    [-1] * SIZE,
    [2**32] * SIZE,
    [2**64 - 1] * SIZE,
    [0.5] * SIZE,
    ["a"] * SIZE,
    [None] * SIZE,
    "x",
    {},
    5,
]


@pytest.mark.parametrize("tokens", BAD_TOKENS, ids=range(len(BAD_TOKENS)))
def test_tokens_that_are_none_are_left_out(real_server: Backend, tokens: Any) -> None:
    """An event with impossible tokens is left out and counted, and the next one counts."""
    evil = begun(real_server, "evil")
    evil.take([message(0, stored([1], tokens), stored([2], PROMPT[:16]))])
    reader = real_server.open("reader", chunk_size=SIZE)
    assert holders(reader, PROMPT) == {"evil/0@gpu": 1}
    assert sum(evil.counts.values()) + sum(evil.holdings.counts.values()) > 0


def test_engine_chains_forge_no_other_engines_chunks(real_server: Backend) -> None:
    """With its own hashes an engine claims what it likes for itself: others' coverage, runs and depths stay."""
    honest = begun(real_server, "honest", engine_chains=True)
    hashes = [os.urandom(32) for _ in range(4)]
    honest.take([message(0, stored(hashes, PROMPT))])  # pyright: ignore[reportArgumentType]
    evil = begun(real_server, "evil", engine_chains=True)
    reader = real_server.open("reader", chunk_size=SIZE)
    chain = Chain(hashes)
    orders = [[3, 2, 1, 0], [1, 0, 3, 2], [0, 1, 1, 2], [2, 2, 2, 2], [0, 0, 1, 2]]
    for seq, order in enumerate(orders):
        evil.take([message(seq, stored([hashes[at] for at in order], OTHER))])  # pyright: ignore[reportArgumentType]
        assert holders(reader, chain).get("honest/0@gpu") == 4
    assert reader.check_integrity().ok


def test_a_thousand_random_lies(real_server: Backend) -> None:
    """Random events of every kind leave the tree sound and the honest engine's coverage whole."""
    honest = begun(real_server, "honest")
    honest.take([message(0, stored([1, 2, 3, 4], PROMPT))])
    evil = begun(real_server, "evil")
    drawn = random.Random(11)
    values: list[Any] = [0, 1, 2, -1, 2**64 - 1, None, b"x", "GPU", "evil", [], {}, [1, 2], 1.5, True, b"\xff" * 40]
    kinds = ["BlockStored", "BlockRemoved", "AllBlocksCleared", "Other", "", 5, None]
    for seq in range(1000):
        events: list[Any] = []
        for _ in range(drawn.randrange(1, 4)):
            if drawn.random() < 0.5:
                keys = [drawn.randrange(8) for _ in range(drawn.randrange(1, 4))]
                tokens = PROMPT[: SIZE * len(keys)]
                events.append(stored(keys, tokens, parent=drawn.choice([None, *range(8)])))
            else:
                events.append([drawn.choice(kinds), *(drawn.choice(values) for _ in range(drawn.randrange(8)))])
        evil.take([message(seq, *events)])
    reader = real_server.open("reader", chunk_size=SIZE)
    assert holders(reader, PROMPT)["honest/0@gpu"] == 4
    assert reader.check_integrity().ok
    assert {holder.partition("@")[0] for holder in held_fields(real_server)} <= {"honest/0", "evil/0"}
