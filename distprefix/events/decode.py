"""KV events of vLLM and SGLang, from the bytes of a message to what the index reads. Pure."""

from __future__ import annotations

import re
import sys
from array import array
from functools import lru_cache
from itertools import pairwise
from typing import Any, cast

from msgpack import packb

from distprefix.chunking import pack_extra
from distprefix.errors import EventFormatError, InvalidInputError
from distprefix.events.frames import Batch, Cleared, Event, Removed, Stored
from distprefix.events.sglang import first_hash
from distprefix.events.shapes import MalformedError, has_negative, may_remove, named, text_of
from distprefix.events.unpack import unpack_batch

__all__ = ["decode"]

_MASK = (1 << 64) - 1
_KEY_BYTES, _NAME_BYTES = 8, 16
_INT, _BYTES = {int}, {bytes}
_ZERO, _ONE = (number.to_bytes(4, "little") for number in (0, 1))
_LATEST = 2**40  # seconds since 1970: what is later is no time
_WORD = 64  # characters in a medium or kind
_PAIR = 2
_VLLM_ONLY = ("lora_name", "extra_keys", "group_idx")


def decode(payload: bytes, *, engine: str = "auto", is_plain: bool = False) -> Batch:
    """Read one message of `engine` ("vllm", "sglang", or "auto": told by its looks).

    `is_plain`: blocks of which the engine does not say what they depend on besides tokens depend on nothing else.
    Events that make no sense are left out and counted; what they may have taken away is cleared.
    Raises EventFormatError when there is no batch at all.
    """
    if engine not in ("auto", "vllm", "sglang"):
        raise InvalidInputError(f"no engine is called {engine!r}: pass 'auto', 'vllm' or 'sglang'")
    at, raw, rank = unpack_batch(payload)
    events: list[Event] = []
    unknown = malformed = unclear = 0
    for item in raw:
        try:
            event = _event(item, engine, is_plain=is_plain)
            unknown += event is None
        except (MalformedError, KeyError):
            malformed += 1
            event = None
        if event is None:
            event = _cleared_by(item)
            unclear += event is not None
        if event is not None:
            events.append(event)
    return Batch(_time(at), _rank(rank), tuple(events), unknown, malformed, unclear)


def _time(at: Any) -> float:
    if at is None or type(at) is float or type(at) is int:
        return float(at) if at is not None and 0 <= at < _LATEST else 0.0
    raise EventFormatError("the time of a batch is a number")


def _rank(rank: Any) -> int | None:
    if rank is None or (type(rank) is int and rank >= 0):
        return rank
    raise EventFormatError("the rank of a batch is a number or nil")


# Events


def _event(item: Any, engine: str, *, is_plain: bool) -> Event | None:
    """One event; None for a kind that means nothing here."""
    kind, fields, engine, is_map = named(item, engine)
    if kind == "BlockStored":
        return _stored(fields, engine, is_map=is_map, is_plain=is_plain)
    if kind == "BlockRemoved":
        medium, group = _medium(fields.get("medium")), _number(fields.get("group_idx"))
        return Removed(_keys(fields["block_hashes"])[0], medium, group)
    if kind == "AllBlocksCleared":
        return Cleared(_medium_if_told(fields.get("medium")))
    if not kind:
        raise MalformedError
    return None


def _cleared_by(item: Any) -> Cleared | None:
    """What an event that cannot be read may have taken away; None when nothing."""
    removes, medium = may_remove(item)
    return Cleared(_medium_if_told(medium)) if removes else None


def _medium_if_told(value: Any) -> str | None:
    return _medium(value) if type(value) in (str, bytes) and value else None


def _stored(fields: dict[Any, Any], engine: str, *, is_map: bool, is_plain: bool) -> Stored:
    keys, names = _keys(fields["block_hashes"])
    parent = fields["parent_block_hash"]
    is_root = parent is None or parent == 0
    if parent is not None:
        parent = parent & _MASK if type(parent) is int else _keys([parent])[0][0]
    tokens, hashed = _tokens(fields["token_ids"])
    block_size = _number(fields["block_size"])
    if tokens and not block_size:
        raise MalformedError
    lora, salt = text_of(fields.get("lora_name")), text_of(fields.get("cache_salt"))
    lora_id, rows = _number(fields.get("lora_id")), fields.get("extra_keys")
    if not is_root and (rows is None or (type(rows) is list and not any(rows))):
        extras = []  # most events
    else:
        extras = [b""] * len(keys)
        if rows is not None:
            salt = _read_rows(rows, extras, lora, salt, root=is_root)
    is_told = is_plain or rows is not None or not tokens or (engine == "envelope" and "cache_salt" in fields)
    if is_root and keys:
        whole = pack_extra("lora", lora or str(lora_id)) if lora or lora_id else b""
        whole += pack_extra("salt", salt) if salt else b""
        extras[0] = whole + extras[0]
        if not is_told:
            size = block_size * len(hashed) // len(tokens)
            is_told = bool(whole and _is_sglang(fields, engine, is_map=is_map)) or first_hash(hashed, size) == keys[0]
    return Stored(
        keys,
        parent,
        tokens,
        block_size if tokens else 0,
        _medium(fields.get("medium")),
        _number(fields.get("group_idx")),
        (text_of(fields.get("kv_cache_spec_kind")) or "full_attention")[:_WORD],
        tuple(extras) if any(extras) else (),
        names,
        is_told or (not is_root and _is_sglang(fields, engine, is_map=is_map)),
    )


def _is_sglang(fields: dict[Any, Any], engine: str, *, is_map: bool) -> bool:
    """Whether SGLang sent this: vLLM always tells a name of a LoRA in its maps, and has no negative hashes."""
    if engine != "auto":
        return engine == "sglang"
    return (is_map and not any(name in fields for name in _VLLM_ONLY)) or has_negative(fields["block_hashes"])


def _keys(hashes: Any) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    """Low 64 bits of each hash, and the hashes whole if they are long enough to stand for themselves."""
    if type(hashes) is not list:
        raise MalformedError
    if len(hashes) == 1 and type(hashes[0]) is int:  # most of them
        return (hashes[0] & _MASK,), ()
    kinds = set(map(type, hashes))
    if kinds <= _INT:
        return tuple([value & _MASK for value in hashes]), ()
    if kinds - _INT - _BYTES or b"" in hashes:
        raise MalformedError
    keys = tuple(v & _MASK if type(v) is int else int.from_bytes(v[-_KEY_BYTES:], "big") for v in hashes)
    whole = kinds == _BYTES and min(map(len, hashes)) >= _NAME_BYTES
    return keys, tuple(hashes) if whole else ()


def _tokens(ids: Any) -> tuple[bytes, bytes]:
    """Token ids, and what SGLang hashes of them: with EAGLE it tells each token and the one that follows it."""
    if type(ids) is not list:
        raise MalformedError
    listed = cast("list[Any]", ids)
    if listed and type(listed[0]) is list:
        hashed = _packed(_flat(listed))
        return _packed([pair[0] for pair in listed]), hashed
    tokens = _packed(listed)
    return tokens, tokens


def _flat(pairs: list[Any]) -> list[Any]:
    """Raises MalformedError unless each pair begins with what the one before it ends with."""
    if any(type(pair) is not list or len(pair) != _PAIR for pair in pairs):
        raise MalformedError
    if any(one[1] != other[0] for one, other in pairwise(pairs)):
        raise MalformedError
    return [token for pair in pairs for token in pair]


def _packed(ids: list[Any]) -> bytes:
    try:
        packed = array("I", ids)
    except (OverflowError, TypeError):
        raise MalformedError from None
    if sys.byteorder == "big":
        packed.byteswap()
    tokens = packed.tobytes()
    if (_ZERO in tokens or _ONE in tokens) and bool in set(map(type, ids)):
        raise MalformedError  # True is no 1; the array takes nothing else that is no number
    return tokens


def _read_rows(rows: Any, extras: list[bytes], lora: str, salt: str, *, root: bool) -> str:
    """Put into `extras` what vLLM tells of each block besides LoRA and salt; the salt, if it is there, comes back."""
    if type(rows) is not list:
        raise MalformedError
    if not any(rows):
        return salt
    if len(rows) != len(extras):
        raise MalformedError
    for i, row in enumerate(rows):
        if row is None:
            continue
        if type(row) is not list:
            raise MalformedError
        items = row[1:] if lora and row and row[0] == lora else row
        if root and i == 0:
            first = next((n for n, item in enumerate(items) if type(item) is str and (not salt or item == salt)), None)
            if first is not None:
                salt, items = items[first], items[:first] + items[first + 1 :]
        extras[i] = b"".join(map(_item, items))
    return salt


def _item(item: Any) -> bytes:
    if type(item) is str or type(item) is bytes:
        return pack_extra("key", item)
    if type(item) is list and len(item) == 2 and type(item[0]) is str and type(item[1]) is int:
        return pack_extra("mm", item[0], item[1])
    try:
        return pack_extra("key", cast("bytes", packb(item, unicode_errors="surrogateescape")))
    except (ValueError, TypeError, RecursionError):
        raise MalformedError from None


def _number(value: Any) -> int:
    """A natural number; nil and what is not there are 0."""
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise MalformedError
    return value


def _medium(value: Any) -> str:
    if type(value) is str and value:
        return _word(value[:_WORD])
    return _word((text_of(value) or "gpu")[:_WORD])


@lru_cache(256)
def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]", "-", text.lower())[:_WORD]
