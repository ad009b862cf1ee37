"""What is no block id, token, payload or buffer is refused with what to pass instead, whichever call is given it."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from distprefix import PrefixCacheOptimizer
from distprefix.errors import InvalidInputError
from tests.contract.test_find import prompt
from tests.servers import Backend

Cache = PrefixCacheOptimizer


def broken() -> Iterator[int]:
    """A generator that raises."""
    yield 1
    raise RuntimeError("it broke")


BLOCKS: dict[str, tuple[Any, str]] = {
    "text": ("1234", "cannot be str: pass a list"),
    "bytes": (b"1234", "cannot be bytes: pass a list"),
    "number": (7, "cannot be int: pass a list"),
    "dictionary": ({1: 2, 3: 4, 5: 6, 7: 8}, "cannot be dict: pass a list"),
    "two dimensions": (np.zeros((4, 4), np.uint32), "one dimension, not 2: pass a list"),
    "no dimension": (np.array(4), "one dimension, not 0: pass a list"),
    "floats": (np.zeros(4), "block id 0 is 0.0: block ids are integers"),
    "array of floats": (array("f", [0, 1, 2, 3]), "block id 0 is 0.0"),
    "truths": ([0, 1, 2, True], "block id 3 is True"),
    "numpy truths": (np.array([True, False, True, False]), "block id 0 is True"),
    "numpy truth": ([0, 1, np.bool_(True), 3], "block id 2 is "),
    "negative": (np.array([0, 1, -5, 3]), "block id 2 is -5"),
    "too large": ([0, 1, 2, 2**32 - 1], "block id 3 is 4294967295"),
    "far too large": ([0, 1, 2, 2**80], "block id 3 is 1208"),
    "None inside": ([0, None, 2, 3], "block id 1 is None"),
    "generator": (broken(), "ended with RuntimeError.*: pass a list"),
}


def move(cache: Cache, blocks: Any) -> object:
    """Move a prefix that was published."""
    return cache.update_prefix_state(cache.cache_prefix(prompt(4), range(100, 104)), blocks)


TAKE_BLOCKS: dict[str, Callable[[Cache, Any], object]] = {
    "cache_prefix": lambda cache, blocks: cache.cache_prefix(prompt(4), blocks),
    "remove": lambda cache, blocks: cache.remove_skipped_blocks(blocks),
    "move": move,
}


@pytest.mark.parametrize("call", TAKE_BLOCKS)
@pytest.mark.parametrize("name", BLOCKS)
def test_block_ids(real_server: Backend, call: str, name: str) -> None:
    """Publishing, removing and moving refuse the same things alike."""
    given, message = BLOCKS[name]
    if name == "generator":
        given = broken()
    cache = real_server.open()
    with pytest.raises(InvalidInputError, match=message):
        TAKE_BLOCKS[call](cache, given)
    assert len(cache._state.own) == (4 if call == "move" else 0)


@pytest.mark.parametrize("call", ["remove", "move"])
def test_no_block_ids(real_server: Backend, call: str) -> None:
    """None is no list of blocks, but for a publish, which may name none."""
    cache = real_server.open()
    with pytest.raises(InvalidInputError, match="cannot be NoneType: pass a list of integers"):
        TAKE_BLOCKS[call](cache, None)
    with pytest.raises(InvalidInputError, match="cannot be NoneType"):
        cache.update_prefix_state("unknown", None)  # pyright: ignore[reportArgumentType]
    assert cache.cache_prefix(prompt(4), None)
    assert not cache.update_prefix_state(7, [1])  # pyright: ignore[reportArgumentType]


def test_forms_of_block_ids(real_server: Backend) -> None:
    """Lists, ranges, arrays, NumPy arrays, views and generators are read; a set only where order does not matter."""
    cache = real_server.open()
    for i in range(7):
        ids = range(4 * i, 4 * i + 4)
        form: Any = (
            list(ids),
            tuple(ids),
            ids,
            array("q", ids),
            np.array(ids),
            memoryview(array("I", ids)),
            iter(ids),
        )[i]
        cache.cache_prefix(prompt(4), form)
        assert cache.get_computed_blocks(prompt(4)) == list(ids)
    with pytest.raises(InvalidInputError, match="cannot be set"):
        cache.cache_prefix(prompt(4), {1, 2, 3, 4})
    assert cache.remove_skipped_blocks({26, 27}) == 2


TOKENS: dict[str, tuple[Any, str]] = {
    "None": (None, "cannot be NoneType"),
    "floats": ([1.0, 2.0], "token 0 is float"),
    "numpy floats": (np.zeros(4), "integers, not items of format"),
    "numpy truths": (np.array([True]), "integers, not items of format"),
    "two dimensions": (np.zeros((4, 4), np.uint32), "one dimension, not 2"),
    "text": ("text", "tokenize it first"),
    "negative": ([-1], "token 0 is -1"),
    "too large": ([2**40], "token 0 is 1099511627776"),
    "dates": (np.array(["2020-01-01"], "datetime64[s]"), "a prompt cannot be ndarray"),
    "lists": ([[1, 2]], "token 0 is list"),
    "generator": (broken(), "a prompt cannot be generator"),
}
TAKE_TOKENS: dict[str, Callable[[Cache, Any], object]] = {
    "find": lambda cache, tokens: cache.find_longest_cache_hit(tokens),
    "publish": lambda cache, tokens: cache.cache_prefix(tokens),
    "blocks": lambda cache, tokens: cache.get_computed_blocks(tokens),
    "store": lambda cache, tokens: cache.store(tokens, []),
    "load": lambda cache, tokens: cache.load(tokens),
    "lease": lambda cache, tokens: cache.lease(tokens),
    "pin": lambda cache, tokens: cache.pin(tokens),
    "find_stored": lambda cache, tokens: cache.find_stored(tokens),
    "promote": lambda cache, tokens: cache.promote(tokens),
}


@pytest.mark.parametrize("name", TOKENS)
def test_tokens(real_server: Backend, name: str) -> None:
    """Every call that takes a prompt refuses the same things alike."""
    given, message = TOKENS[name]
    cache = real_server.open()
    for call in TAKE_TOKENS.values():
        with pytest.raises(InvalidInputError, match=message):
            call(cache, given)


@pytest.mark.parametrize(
    ("payloads", "message"),
    [
        (None, "payloads cannot be NoneType: pass a list with a buffer or None"),
        (b"1234", "payloads cannot be bytes: pass a list"),
        (np.zeros((4, 4), np.uint8), "one dimension, not 2: pass a list"),
        ([b"a", "text"], "payload 1 is str: pass a buffer of bytes, or None"),
        ([b"a", 1.5], "payload 1 is float"),
        ([np.zeros((4, 4), np.uint8)[:, 1]], "payload 0 is not in one piece"),
        ([b""], "1 byte to 512 MiB"),
        ([b"a"] * 5, "5 payloads do not fit 4 full chunks"),
        ((broken()), "ended with RuntimeError"),
    ],
)
def test_payloads(real_server: Backend, payloads: Any, message: str) -> None:
    """What is no list of buffers is refused before anything is written."""
    cache = real_server.open()
    with pytest.raises(InvalidInputError, match=message):
        cache.store(prompt(4), payloads)
    assert cache.find_stored(prompt(4)) == 0


@pytest.mark.parametrize(
    ("into", "message"),
    [
        (7, "buffers to load into cannot be int"),
        (bytearray(8), "buffers to load into cannot be bytearray"),
        ([b"read-only"], "must be writable"),
        ([None], "cannot be NoneType: pass a writable one"),
        (["text"], "cannot be str"),
        (broken(), "cannot be int: pass a writable one|ended with RuntimeError"),
    ],
)
def test_buffers(real_server: Backend, into: Any, message: str) -> None:
    """What is no list of writable buffers is refused."""
    cache = real_server.open()
    cache.store(prompt(4), [b"a"] * 4)
    with pytest.raises(InvalidInputError, match=message):
        cache.load(prompt(4), into)


def test_batches(real_server: Backend) -> None:
    """Batches are lists of pairs, or of prompts."""
    cache = real_server.open()
    for call in (cache.store_batch, cache.load_batch):
        for given, message in (
            (None, "NoneType: pass a list of pairs"),
            ([prompt(4)], "prompt 0 is list: pass a pair"),
        ):
            with pytest.raises(InvalidInputError, match=message):
                call(given)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInputError, match="NoneType: pass a list of prompts"):
        cache.find_stored_batch(None)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInputError, match="metadata cannot be list"):
        cache.cache_prefix(prompt(4), None, ["a"])  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInputError, match="ttl_s is 'long'"):
        cache.lease(prompt(4), "long")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInputError, match=r"first is 1\.5"):
        cache.load(prompt(4), first=1.5)  # pyright: ignore[reportArgumentType]
