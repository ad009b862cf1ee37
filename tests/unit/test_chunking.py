"""Prompts in every form, their chunks, and what is refused."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprefix import Chain
from distprefix.chunking import pack_block_ids, read_prompt
from distprefix.errors import InvalidInputError

FORMS: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "tuple": tuple,
    "array I": lambda tokens: array("I", tokens),
    "array L": lambda tokens: array("L", tokens),
    "array q": lambda tokens: array("q", tokens),
    "array Q": lambda tokens: array("Q", tokens),
    "numpy uint32": lambda tokens: np.array(tokens, np.uint32),
    "numpy int64": lambda tokens: np.array(tokens, np.int64),
    "numpy uint64": lambda tokens: np.array(tokens, np.uint64),
    "numpy strided": lambda tokens: np.repeat(np.array(tokens, np.uint32), 2)[::2],
    "bytes": lambda tokens: array("I", tokens).tobytes(),
    "bytearray": lambda tokens: bytearray(array("I", tokens).tobytes()),
    "memoryview": lambda tokens: memoryview(array("I", tokens).tobytes()),
    "memoryview I": lambda tokens: memoryview(array("I", tokens)),
    "memoryview strided": lambda tokens: memoryview(array("I", [t for token in tokens for t in (token, 1)]))[::2],
}


@given(tokens=st.lists(st.integers(0, 2**32 - 1), max_size=40), chunk_size=st.integers(1, 5))
def test_all_forms_are_equal(tokens: list[int], chunk_size: int) -> None:
    """Every accepted form of the same tokens gives the same bytes, chunks, and the same rest."""
    chunks = len(tokens) // chunk_size
    for name, form in FORMS.items():
        given_ = form(tokens)
        prompt = read_prompt(given_, chunk_size, 1000)
        assert prompt.view.tobytes() == array("I", tokens[: chunks * chunk_size]).tobytes(), name
        assert (prompt.chunks, prompt.stride, prompt.length) == (chunks, 4 * chunk_size, len(tokens)), name
        rest = given_[prompt.unit * chunks :]
        assert read_prompt(rest, 1, 1000).view.tobytes() == array("I", tokens[chunks * chunk_size :]).tobytes(), name


@pytest.mark.parametrize("kind", [np.int8, np.int16, np.int32, np.uint8, np.uint16])
def test_small_numpy_types(kind: Any) -> None:
    """NumPy arrays of narrower integers are tokens too, one an element."""
    assert read_prompt(np.array([1, 2, 127], kind), 1, 10).view.tobytes() == array("I", [1, 2, 127]).tobytes()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([1, -1], r"token 1 is -1: token ids lie in \[0, 2\^32\)"),
        ([1, 2, 2**32], r"token 2 is 4294967296"),
        ((0, 2**70), r"token 1 is"),
        ([1, 2.0], r"token 1 is float: token ids are integers"),
        ([1, "2"], r"token 1 is str"),
        ([None], r"token 0 is NoneType"),
        (array("q", [3, -7]), r"token 1 is -7"),
        (array("Q", [3, 2**40]), r"token 1 is 1099511627776"),
        (np.array([1, 2, -3]), r"token 2 is -3"),
        (np.array([1, 2**33]), r"token 1 is 8589934592"),
        (np.array([1.0, 2.0]), r"integers, not items of format 'd'"),
        (array("f", [1.0]), r"integers, not items of format 'f'"),
        (np.zeros((2, 2), np.uint32), r"one dimension, not 2: pass one prompt at a time"),
        (np.zeros((2, 2), np.int64), r"one dimension, not 2"),
        ("a prompt", r"token ids, not text: tokenize it first"),
        (None, r"cannot be NoneType: pass a list"),
        (7, r"cannot be int: pass a list"),
        ({1, 2}, r"cannot be set: pass a list"),
        (iter([1, 2]), r"cannot be list_iterator: pass a list"),
        (b"12345", r"4 bytes a token, not 5 in all"),
        (bytearray(3), r"4 bytes a token, not 3 in all"),
    ],
)
def test_what_is_no_prompt_is_refused(tokens: Any, message: str) -> None:
    """Whatever is no prompt raises and the message names the position or what to pass instead."""
    with pytest.raises(InvalidInputError, match=message):
        read_prompt(tokens, 2, 100)


def test_prompts_are_bounded_in_tokens() -> None:
    """Only full chunks within the bound count; the length is the whole prompt's."""
    assert read_prompt(list(range(20)), 4).chunks == read_prompt(list(range(20)), 4, 20).chunks == 5
    prompt = read_prompt(list(range(20)), 4, 14)
    assert (prompt.chunks, prompt.length, len(prompt.view)) == (3, 20, 48)
    chain = read_prompt(Chain([b"x" * 16] * 9), 4, 14)
    assert (chain.chunks, chain.length, len(chain.view), chain.is_chain) == (3, 36, 48, True)


def test_chains_take_the_first_16_bytes() -> None:
    """A chain keeps 16 bytes of each hash, and slices, indexes and compares like a sequence."""
    chain = Chain([b"a" * 32, bytearray(b"b" * 16), memoryview(b"c" * 20)])
    assert list(chain) == [b"a" * 16, b"b" * 16, b"c" * 16]
    assert (chain[1], chain[-1], len(chain)) == (b"b" * 16, b"c" * 16, 3)
    assert (chain[1:], list(chain[::2])) == (Chain([b"b" * 16, b"c" * 16]), [b"a" * 16, b"c" * 16])
    assert Chain.packed(chain.data) == chain
    assert hash(Chain.packed(chain.data)) == hash(chain)
    assert (chain != [b"a" * 16], repr(chain)) == (True, "<Chain of 3 chunks>")
    with pytest.raises(IndexError):
        chain[3]


def test_bad_chains_are_refused() -> None:
    """Short hashes, hashes that are no bytes, and a packed chain of an odd length are refused by position."""
    hashes: list[Any] = [b"a" * 16, b"b" * 15]
    with pytest.raises(InvalidInputError, match="chunk hash 1 has 15 bytes: at least 16"):
        Chain(hashes)
    hashes[1] = "text of many characters"
    with pytest.raises(InvalidInputError, match="chunk hash 1 is str"):
        Chain(hashes)
    with pytest.raises(InvalidInputError, match="16 bytes a chunk, not 17"):
        Chain.packed(b"a" * 17)


def test_block_ids() -> None:
    """One block id a chunk, one more for a partial chunk is ignored; None means none."""
    assert pack_block_ids(None, 3) == b""
    assert pack_block_ids([1, 2, 70_000], 3) == array("I", [1, 2, 70_000]).tobytes()
    assert pack_block_ids(range(4), 3) == array("I", [0, 1, 2]).tobytes()
    assert pack_block_ids(np.array([1, 2, 3]), 3) == array("I", [1, 2, 3]).tobytes()


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([1, 2], "2 block ids do not fit 3 full chunks"),
        (range(5), "5 block ids do not fit 3 full chunks"),
        ([1, -2, 3], "block id 1 is -2"),
        ([1, 2, 2**32 - 1], "block id 2 is 4294967295"),
        ([1, 2, 3.0], r"block id 2 is 3.0"),
        ([1, 2, "3"], "block id 2 is '3'"),
        ([1, True, 3], "block id 1 is True"),
    ],
)
def test_block_ids_that_do_not_fit(ids: Any, message: str) -> None:
    """Too few, too many or impossible block ids are refused by count or position."""
    with pytest.raises(InvalidInputError, match=message):
        pack_block_ids(ids, 3)
