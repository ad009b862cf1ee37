"""Chains are found again from keys in any order, as far as they are known from the root on."""

from __future__ import annotations

import random

from distprefix.chunking import HASH_BYTES
from distprefix.engines.chains import KeyChains

TOKENS = {0: 32, 3: 64}


def key(group: int, chunk: int) -> bytes:
    """A 32-byte block hash and a group."""
    return bytes([group + 1, chunk]) * 16 + group.to_bytes(4, "big")


def positions(group: int, count: int) -> dict[bytes, int]:
    """What a scheduler records of a request with so many chunks."""
    return {key(group, chunk): (chunk + 1) * TOKENS[group] for chunk in range(count)}


def hashes(group: int, count: int) -> bytes:
    """A group's leading hashes."""
    return b"".join(key(group, chunk)[:HASH_BYTES] for chunk in range(count))


def test_chains_of_groups_are_apart_and_whole() -> None:
    """Each group has a chain of its own."""
    chains = KeyChains(TOKENS)
    chains.learn({**positions(0, 4), **positions(3, 2)})
    assert chains.chain(0, 9) == hashes(0, 4)
    assert chains.chain(0, 3) == hashes(0, 3)
    assert chains.chain(3, 2) == hashes(3, 2)
    assert [chains.chunk(key(0, chunk)) for chunk in range(5)] == [0, 1, 2, 3, None]
    assert chains.chunk(key(3, 1)) == 1


def test_order_does_not_matter_and_growing_neither() -> None:
    """Keys may come one by one, in any order."""
    every = list(positions(0, 50).items())
    random.Random(3).shuffle(every)
    chains, shown = KeyChains(TOKENS), dict[bytes, int]()
    for name, end in every:
        shown[name] = end
        chains.learn(shown)
    assert chains.chain(0, 50) == hashes(0, 50)
    assert [chains.chunk(key(0, chunk)) for chunk in range(50)] == list(range(50))


def test_what_is_behind_a_gap_is_unknown_until_it_is_filled() -> None:
    """A chain ends at the first chunk that nobody has told of."""
    shown = positions(0, 4)
    end = shown.pop(key(0, 1))
    chains = KeyChains(TOKENS)
    chains.learn(shown)
    assert chains.chain(0, 4) == hashes(0, 1)
    assert [chains.chunk(key(0, chunk)) for chunk in range(4)] == [0, None, None, None]
    shown[key(0, 1)] = end
    chains.learn(shown)
    assert chains.chain(0, 4) == hashes(0, 4)


def test_parts_of_chunks_and_other_groups_are_in_no_chain() -> None:
    """Keys that end inside a chunk, of groups that there are not, or too short."""
    chains = KeyChains(TOKENS)
    other = b"x" * 32 + (1).to_bytes(4, "big")
    chains.learn({key(0, 0): 32, key(0, 7): 40, key(0, 8): 0, other: 32, b"short" + bytes(4): 64})
    assert chains.chain(0, 9) == hashes(0, 1)
    assert chains.chunk(key(0, 7)) is chains.chunk(key(0, 8)) is chains.chunk(other) is None


def test_a_second_hash_for_a_place_is_no_part_of_the_chain() -> None:
    """What a chain has once stays."""
    chains, shown = KeyChains(TOKENS), positions(0, 2)
    chains.learn(shown)
    shown[key(0, 99)] = 32
    chains.learn(shown)
    assert chains.chain(0, 9) == hashes(0, 2)
    assert chains.chunk(key(0, 99)) is None


def test_runs_are_cut_at_gaps_and_groups() -> None:
    """Transfers go run by run, in order, without what is in no chain."""
    chains = KeyChains(TOKENS)
    chains.learn({**positions(0, 6), **positions(3, 3)})
    wanted = {key(0, 4): 14, key(3, 1): 31, key(0, 1): 11, key(0, 2): 12, key(0, 77): 99, key(3, 0): 30}
    first, second, third = chains.runs(wanted, wanted.values())
    assert first == (0, 1, hashes(0, 3), (key(0, 1), key(0, 2)), (11, 12))
    assert second == (0, 4, hashes(0, 5), (key(0, 4),), (14,))
    assert third == (3, 0, hashes(3, 2), (key(3, 0), key(3, 1)), (30, 31))
    assert chains.runs([], []) == []
