"""What came before a key."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from distprefix.engines.chains_of_keys import ChainsOfKeys, chunk_hash, packed


def chain(*numbers: int) -> bytes:
    """Keys of 16 bytes."""
    return b"".join(number.to_bytes(16, "big") for number in numbers)


def test_a_key_has_what_came_before_it() -> None:
    """Every key of a chain that was learned is found behind those before it, the first one behind nothing."""
    chains = ChainsOfKeys()
    chains.learn(chain(1, 2, 3))
    assert [chains.before(chain(i)) for i in (1, 2, 3, 4)] == [b"", chain(1), chain(1, 2), None]


def test_a_chain_that_only_may_begin_at_the_root_changes_nothing_known() -> None:
    """What was told for sure stays, and what follows is added behind it."""
    chains = ChainsOfKeys()
    chains.learn(chain(1, 2))
    chains.learn(chain(2, 3), is_from_root=False)
    assert chains.before(chain(3)) == chain(1, 2)
    chains.learn(chain(8, 9), is_from_root=False)
    assert chains.before(chain(9)) == chain(8)
    chains.learn(chain(7, 8))
    assert chains.before(chain(9)) == chain(7, 8)


def test_leaves_are_forgotten_first() -> None:
    """What is left when there is no more room reaches the root; what nobody used for longest goes."""
    chains = ChainsOfKeys(most=4)
    chains.learn(chain(1, 2, 3))
    chains.learn(chain(5, 6))
    assert len(chains) == 4
    assert chains.before(chain(3)) is None
    assert chains.before(chain(2)) == chain(1)
    assert chains.before(chain(6)) == chain(5)


def test_a_circle_is_nothing() -> None:
    """Keys that were told to come before each other have no chain."""
    chains = ChainsOfKeys()
    chains.learn(chain(1, 2))
    chains.learn(chain(2, 1), is_from_root=False)
    assert chains.before(chain(1)) is None
    chains.clear()
    assert len(chains) == 0


def test_keys_fall_into_runs() -> None:
    """A run goes on while each key is the child of the one before; a key nobody knows goes on only when it may."""
    chains = ChainsOfKeys()
    chains.learn(chain(1, 2, 3, 4))
    assert chains.runs(chain(1, 2, 4, 9)) == [(0, 2), (2, 3), (3, 4)]
    assert chains.runs(chain(1, 2, 4, 9), guess=True) == [(0, 2), (2, 4)]
    assert chains.before(chain(9)) == chain(1, 2, 3, 4)
    assert chains.runs(b"") == []


def test_the_same_keys_have_the_same_hash() -> None:
    """A SHA256 gives its first 16 bytes, as text or bytes; anything else, with a suffix too, a digest of its own."""
    digest = hashlib.sha256(b"page")
    assert chunk_hash(digest.hexdigest()) == chunk_hash(digest.digest()) == digest.digest()[:16]
    others = {
        chunk_hash(key) for key in (digest.hexdigest() + "_k", digest.hexdigest() + "_v", "x", b"x" * 8, "z" * 64)
    }
    assert len(others) == 5
    assert chunk_hash(digest.digest()) not in others
    assert packed(["x", "x"]) == chunk_hash("x") * 2


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), max_size=12), st.integers(1, 20))
def test_it_is_right_or_knows_nothing(paths: list[list[int]], most: int) -> None:
    """Whatever was learned and forgotten, what comes before a key is its true chain, or unknown."""
    chains, true = ChainsOfKeys(most), dict[bytes, bytes]()
    for path in paths:
        hashes = [hashlib.sha256(bytes(path[: i + 1])).digest()[:16] for i in range(len(path))]
        true.update({key: b"".join(hashes[:i]) for i, key in enumerate(hashes)})
        chains.learn(b"".join(hashes))
    assert len(chains) <= most
    assert all(chains.before(key) in (None, before) for key, before in true.items())
