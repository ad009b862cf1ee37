"""Prompts in every form that callers have them in, and what belongs to their chunks. Pure: no Redis, no clock."""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, KeysView, Mapping, Sequence
from collections.abc import Set as AbstractSet
from operator import index
from typing import Any, NamedTuple, cast

import msgpack

from distprefix.errors import DistPrefixError, InvalidInputError
from distprefix.hashing import HASH_BYTES

__all__ = [
    "HASH_BYTES",
    "Chain",
    "Prompt",
    "pack_block_ids",
    "pack_extra",
    "prompt_extras",
    "read_items",
    "read_pairs",
    "read_prompt",
]

_TOKEN_BYTES = 4
_TOKEN_LIMIT = 1 << 32
_UINT32 = "I" if sys.byteorder == "little" and array("I").itemsize == _TOKEN_BYTES else None
_NO_BLOCK = _TOKEN_LIMIT - 1
_BOOLS = ("bool", "bool_")
_SEQUENCES, _BUFFERS = (list, tuple), (bytes, bytearray, memoryview)


class Chain(Sequence[bytes]):
    """The chunk hashes of a prompt, root first, as opaque bytes; at least 16 bytes each, of which 16 are used.

    ``Chain.packed(data)`` takes them as one buffer of 16 bytes each without looking at every one.
    """

    __slots__ = ("data",)

    def __init__(self, hashes: Iterable[Any]) -> None:
        parts: list[bytes] = []
        if isinstance(hashes, str) or not hasattr(hashes, "__iter__"):
            raise InvalidInputError(f"a chain cannot be made of {type(hashes).__name__}: pass its hashes in order")
        for i, item in enumerate(hashes):
            if not isinstance(item, bytes | bytearray | memoryview):
                raise InvalidInputError(f"chunk hash {i} is {type(item).__name__}: pass bytes, at least 16 of them")
            part = bytes(item[:HASH_BYTES])
            if len(part) < HASH_BYTES:
                raise InvalidInputError(f"chunk hash {i} has {len(part)} bytes: at least {HASH_BYTES} are needed")
            parts.append(part)
        self.data = b"".join(parts)

    @classmethod
    def packed(cls, data: bytes) -> Chain:
        """The chain whose hashes are `data`, 16 bytes each."""
        if len(data) % HASH_BYTES:
            raise InvalidInputError(f"a packed chain has {HASH_BYTES} bytes a chunk, not {len(data)} bytes in all")
        chain = cls.__new__(cls)
        chain.data = bytes(data)
        return chain

    def __len__(self) -> int:
        return len(self.data) // HASH_BYTES

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            picked = range(len(self))[index]
            if picked.step == 1:
                return Chain.packed(self.data[picked.start * HASH_BYTES : picked.stop * HASH_BYTES])
            return Chain(self[i] for i in picked)
        i = range(len(self))[index]
        return self.data[i * HASH_BYTES : (i + 1) * HASH_BYTES]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Chain) and other.data == self.data

    def __hash__(self) -> int:
        return hash(self.data)

    def __repr__(self) -> str:
        return f"<Chain of {len(self)} chunks>"


class Prompt(NamedTuple):
    """A prompt as the tree compares it: bytes, `stride` of them a chunk."""

    view: memoryview
    """Full chunks only."""
    stride: int
    chunks: int
    tokens: Any
    """What the caller gave, so that what remains is a slice of it."""
    unit: int
    """Elements of `tokens` in a chunk."""
    is_chain: bool
    length: int
    """Tokens in the prompt, the trailing partial chunk included."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled, it is what the caller gave, read again."""
        size = self.stride // _TOKEN_BYTES
        if self.is_chain:
            size = self.length // max(1, len(self.tokens)) or 1
        return read_prompt, (_without_view(self.tokens), size, self.chunks * size)

    def check_chain(self) -> None:
        """Raise InvalidInputError for a chain that has a chunk hash twice: what follows from all before it cannot.

        What is only looked up is not checked, which would take longer than the look-up: it is in no tree.
        """
        if not self.is_chain or len(set(self.view.cast("Q").tolist()[::2])) == self.chunks:
            return
        places: dict[bytes, int] = {}
        for i in range(self.chunks):
            chunk = bytes(self.view[i * HASH_BYTES : (i + 1) * HASH_BYTES])
            first = places.setdefault(chunk, i)
            if first != i:
                raise InvalidInputError(
                    f"chunk hash {i} of the chain is that of chunk {first}: chained hashes cover all that precedes "
                    "and do not repeat; pass the hashes of one prompt in order"
                )

    def leading(self, chunks: int) -> Prompt:
        """The prompt as if only so many of its chunks were full; `tokens` and `length` stay whole."""
        return self if chunks >= self.chunks else self._replace(view=self.view[: chunks * self.stride], chunks=chunks)

    def within(self, max_tokens: int | None, chunk_size: int) -> Prompt:
        """As `leading`, for the full chunks within so many tokens; None for all. Raises InvalidInputError."""
        if max_tokens is None:
            return self
        number = _number(max_tokens)
        if number is None or number < 0:
            raise InvalidInputError(f"max_cache_hit_length is {max_tokens!r}: it is a number of tokens, 0 or more")
        return self.leading(number // chunk_size)


def read_prompt(token_ids: Any, chunk_size: int, max_tokens: int | None = None) -> Prompt:
    """Read a prompt in any accepted form; buffers of unsigned 32-bit integers are not copied.

    At most the first `max_tokens` tokens count. Raises InvalidInputError and names the offending position.
    """
    max_chunks = sys.maxsize if max_tokens is None else max_tokens // chunk_size
    if isinstance(token_ids, Chain):
        chunks = min(len(token_ids), max_chunks)
        view = memoryview(token_ids.data)[: chunks * HASH_BYTES]
        return Prompt(view, HASH_BYTES, chunks, token_ids, 1, True, len(token_ids) * chunk_size)
    view = _token_bytes(token_ids)
    length, stride = len(view) // _TOKEN_BYTES, chunk_size * _TOKEN_BYTES
    chunks = min(length // chunk_size, max_chunks)
    unit = chunk_size
    if isinstance(token_ids, _BUFFERS) and memoryview(token_ids).itemsize == 1:
        unit = stride
    return Prompt(view[: chunks * stride], stride, chunks, token_ids, unit, False, length)


def _without_view(tokens: Any) -> Any:
    """A prompt that can be pickled and that slices alike: bytes for a view of bytes, an array of uint32 for others."""
    if not isinstance(tokens, memoryview):
        return tokens
    data = _token_bytes(tokens)
    if tokens.itemsize == 1:
        return data.tobytes()
    copied = array("I", data.tobytes())
    if sys.byteorder == "big":
        copied.byteswap()
    return copied


def _token_bytes(tokens: Any) -> memoryview:
    if isinstance(tokens, _SEQUENCES):
        return _narrow(cast("Sequence[Any]", tokens))
    try:
        view = memoryview(tokens)
    except (TypeError, ValueError, BufferError):
        if isinstance(tokens, str):
            raise InvalidInputError("a prompt is token ids, not text: tokenize it first") from None
        raise InvalidInputError(
            f"a prompt cannot be {type(tokens).__name__}: pass a list, tuple, array, NumPy array, "
            "a buffer of little-endian uint32, or a Chain"
        ) from None
    if view.format == _UINT32 and view.ndim == 1 and view.c_contiguous:
        return view.cast("B")
    return _convert(tokens, view)


def _convert(tokens: Any, view: memoryview) -> memoryview:
    """Buffers of any other kind than native uint32."""
    if view.ndim != 1:
        raise InvalidInputError(f"a prompt has one dimension, not {view.ndim}: pass one prompt at a time")
    code = view.format.lstrip("@=<")
    if code in ("B", "b", "c") and not hasattr(tokens, "typecode") and not hasattr(tokens, "dtype"):
        if len(view) % _TOKEN_BYTES:
            raise InvalidInputError(f"a buffer of little-endian uint32 has 4 bytes a token, not {len(view)} in all")
        return view.cast("B") if view.c_contiguous else memoryview(view.tobytes())
    if code in ("I", "L") and view.itemsize == _TOKEN_BYTES and view.c_contiguous and sys.byteorder == "little":
        return view.cast("B") if view.format in ("I", "L", "@I", "@L") else memoryview(view.tobytes())
    if code not in tuple("bBhHiIlLqQ"):
        raise InvalidInputError(f"token ids are integers, not items of format {view.format!r}")
    if hasattr(tokens, "astype"):  # NumPy checks and narrows 50 times faster than a loop
        if len(view) and not (tokens.min() >= 0 and tokens.max() < _TOKEN_LIMIT):
            _find_bad_token(view)
        return memoryview(tokens.astype("<u4").tobytes())
    return _narrow(view)


def _narrow(tokens: Sequence[Any]) -> memoryview:
    try:
        packed = array("I", tokens)
    except (OverflowError, TypeError, ValueError) as error:
        _find_bad_token(tokens)
        raise InvalidInputError(f"token ids cannot be read, {error}: pass integers in [0, 2^32)") from error
    if sys.byteorder == "big":
        packed.byteswap()
    return memoryview(packed).cast("B")


def _find_bad_token(tokens: Iterable[Any]) -> None:
    for i, token in enumerate(tokens):
        try:
            number = index(token)
        except TypeError:
            raise InvalidInputError(f"token {i} is {type(token).__name__}: token ids are integers") from None
        if not 0 <= number < _TOKEN_LIMIT:
            raise InvalidInputError(f"token {i} is {token}: token ids lie in [0, 2^32)")


def pack_block_ids(block_ids: Iterable[int] | None, chunks: int | None) -> bytes:
    """Pack one block id a full chunk as uint32; one more, for a trailing partial chunk, is accepted and ignored.

    With `chunks` None any number is accepted, but not None. Raises InvalidInputError and names the offending position.
    """
    if block_ids is None and chunks is not None:
        return b""
    is_unordered = isinstance(block_ids, AbstractSet) and chunks is not None and not isinstance(block_ids, KeysView)
    if isinstance(block_ids, Mapping) or is_unordered:
        raise InvalidInputError(f"block ids cannot be {type(block_ids).__name__}: pass a list of integers")
    ids = read_items(block_ids, "block ids", "a list of integers")
    if chunks is not None and len(ids) not in (chunks, chunks + 1):
        raise InvalidInputError(
            f"{len(ids)} block ids do not fit {chunks} full chunks: pass one a full chunk "
            "(one more, for a trailing partial chunk, is ignored)"
        )
    try:
        packed = array("I", ids)
    except (OverflowError, TypeError, ValueError):
        packed = None
    kinds = {int} if isinstance(block_ids, range | array) else set(map(type, ids))
    if packed is None or bool in kinds or any(kind.__name__ in _BOOLS for kind in kinds) or _NO_BLOCK in packed:
        _find_bad_block(ids)
    if packed is None:
        raise InvalidInputError("block ids cannot be read: pass a list of integers")
    return packed.tobytes() if chunks is None else packed[:chunks].tobytes()


def _find_bad_block(ids: Sequence[Any]) -> None:
    for i, block in enumerate(ids):
        if _number(block) is None or not 0 <= block < _NO_BLOCK:
            raise InvalidInputError(f"block id {i} is {block!r}: block ids are integers in [0, 2^32 - 1)")


def _number(value: Any) -> int | None:
    """What counts as an integer here; a truth value does not."""
    if type(value).__name__ in _BOOLS:
        return None
    try:
        return index(value)
    except TypeError:
        return None


def read_items(values: Any, what: str, wanted: str) -> Sequence[Any]:
    """What a caller gave several of, in order; bytes and text are not several. Raises InvalidInputError."""
    is_bytes = isinstance(values, str | bytes | bytearray) or (isinstance(values, memoryview) and values.itemsize == 1)
    if is_bytes or not hasattr(values, "__iter__"):
        raise InvalidInputError(f"{what} cannot be {type(values).__name__}: pass {wanted}")
    dimensions = getattr(values, "ndim", 1)
    if dimensions != 1:
        raise InvalidInputError(f"{what} have one dimension, not {dimensions}: pass {wanted}")
    if isinstance(values, list | tuple | range | array):
        return cast("Sequence[Any]", values)
    try:
        as_list = getattr(values, "tolist", None)  # of arrays, in one step
        return list(values) if as_list is None else as_list()
    except DistPrefixError:
        raise
    except Exception as error:
        raise InvalidInputError(f"{what} ended with {error!r}: pass {wanted}") from error


def read_pairs(prompts: Any, what: str) -> Sequence[tuple[Any, Any]]:
    """Prompts, each with something; a generator is read. Raises InvalidInputError."""
    pairs: Sequence[Any] = read_items(prompts, "prompts", f"a list of pairs, (prompt, {what})")
    for i, pair in enumerate(pairs):
        if not isinstance(pair, tuple | list) or len(cast("Sequence[Any]", pair)) != 2:
            raise InvalidInputError(f"prompt {i} is {type(pair).__name__}: pass a pair, (prompt, {what})")
    return pairs


def pack_extra(kind: str, *values: str | int | bytes) -> bytes:
    """Pack one thing besides tokens that a block's content depends on; what depends on several has them in a row.

    The same bytes come from an engine's events and from a query: ``("lora", name)`` and then ``("salt", salt)`` in the
    first block of a prompt, ``("mm", identifier, offset)`` in each block that an image or the like reaches into,
    ``("key", value)`` for what an engine does not explain, ``("unknown", hash)`` for what it does not tell at all.
    """
    return cast("bytes", msgpack.packb([kind, *values], unicode_errors="surrogateescape"))


def prompt_extras(
    lora_name: str | None, cache_salt: str | None, others: Mapping[int, bytes] | None = None
) -> dict[int, bytes]:
    """What chunks depend on besides tokens, by their place: LoRA and salt concern the first, others any."""
    extras = dict(others or {})
    first = pack_extra("lora", lora_name) if lora_name else b""
    first += pack_extra("salt", cache_salt) if cache_salt else b""
    if first:
        extras[0] = first + extras.get(0, b"")
    return extras
