"""KV events of vLLM and SGLang, from the bytes of a message to what the index reads. Pure."""

from __future__ import annotations

import re
import sys
from array import array
from functools import lru_cache
from typing import Any, cast

from msgpack import packb

from distprefix.chunking import pack_extra
from distprefix.errors import EventFormatError, InvalidInputError
from distprefix.events.frames import Batch, Cleared, Event, Removed, Stored
from distprefix.events.sglang import first_hash
from distprefix.events.unpack import unpack_batch

__all__ = ["decode"]

_MASK = (1 << 64) - 1
_KEY_BYTES, _NAME_BYTES = 8, 16
_INT, _BYTES = {int}, {bytes}
_ZERO, _ONE = (number.to_bytes(4, "little") for number in (0, 1))
_LATEST = 2**40  # seconds since 1970: what is later is no time
_WORD = 64  # characters in a medium or kind
_BASE = "block_hashes parent_block_hash token_ids block_size lora_id medium"
_FIELDS = {
    ("vllm", "BlockStored"): f"{_BASE} lora_name extra_keys group_idx kv_cache_spec_kind".split(),
    ("vllm", "BlockRemoved"): ["block_hashes", "medium", "group_idx"],
    ("sglang", "BlockStored"): f"{_BASE} cache_salt session_id lora_name".split(),
    ("sglang", "BlockRemoved"): ["block_hashes", "medium"],
}
_SGLANG_TAIL = ("cache_salt", "lora_name")
_VLLM_ONLY = ("lora_name", "extra_keys", "group_idx")


class _MalformedError(Exception):
    """An event that makes no sense."""


def decode(payload: bytes, *, engine: str = "auto") -> Batch:
    """Read one message of `engine` ("vllm", "sglang", or "auto": told by its looks).

    Events that make no sense are left out and counted. Raises EventFormatError when there is no batch at all.
    """
    if engine not in ("auto", "vllm", "sglang"):
        raise InvalidInputError(f"no engine is called {engine!r}: pass 'auto', 'vllm' or 'sglang'")
    at, raw, rank = unpack_batch(payload)
    events: list[Event] = []
    unknown = malformed = 0
    for item in raw:
        try:
            event = _event(item, engine)
        except (_MalformedError, KeyError):
            malformed += 1
            continue
        if event is None:
            unknown += 1
        else:
            events.append(event)
    return Batch(_time(at), _rank(rank), tuple(events), unknown, malformed)


def _time(at: Any) -> float:
    if at is None or type(at) is float or type(at) is int:
        return float(at) if at is not None and 0 <= at < _LATEST else 0.0
    raise EventFormatError("the time of a batch is a number")


def _rank(rank: Any) -> int | None:
    if rank is None or (type(rank) is int and rank >= 0):
        return rank
    raise EventFormatError("the rank of a batch is a number or nil")


# Events


def _event(item: Any, engine: str) -> Event | None:
    """One event; None for a kind that means nothing here."""
    if type(item) is dict:
        fields: dict[Any, Any] = item
        if "type" not in fields or "block_hashes" not in fields:
            fields = {_text(key) if type(key) is bytes else key: value for key, value in fields.items()}
        kind, tagged = fields["type"], True
        kind = kind if type(kind) is str else _text(kind)
    elif type(item) is list and item:
        kind, tagged = _text(item[0]), False
        fields, engine = _named(kind, item, engine)
    else:
        raise _MalformedError
    if kind == "BlockStored":
        return _stored(fields, engine, tagged=tagged)
    if kind == "BlockRemoved":
        medium, group = _medium(fields.get("medium")), _number(fields.get("group_idx"))
        return Removed(_keys(fields["block_hashes"])[0], medium, group)
    if kind == "AllBlocksCleared":
        return Cleared()
    if not kind:
        raise _MalformedError
    return None


def _named(kind: str, item: list[Any], engine: str) -> tuple[dict[Any, Any], str]:
    """The fields of a positional event by name; SGLang tells the salt by a map at the end."""
    tail: dict[Any, Any] = {}
    if len(item) > 1 and type(item[-1]) is dict and kind == "BlockStored":
        tail = {name: item[-1][name] for name in _SGLANG_TAIL if name in item[-1]}
        item, engine = item[:-1], "sglang" if engine == "auto" else engine
    if engine == "auto" and kind == "BlockStored" and len(item) > 1 and _has_negative(item[1]):
        engine = "sglang"
    names = _FIELDS.get((engine if engine == "sglang" else "vllm", kind), ())
    return dict(zip(names, item[1:], strict=False)) | tail, engine


def _stored(fields: dict[Any, Any], engine: str, *, tagged: bool) -> Stored:
    keys, names = _keys(fields["block_hashes"])
    parent = fields["parent_block_hash"]
    if parent is not None:
        parent = parent & _MASK if type(parent) is int else _keys([parent])[0][0]
    tokens, block_size = _tokens(fields["token_ids"]), _number(fields["block_size"])
    if tokens and not block_size:
        raise _MalformedError
    lora, salt, lora_id = (
        _text(fields.get("lora_name")),
        _text(fields.get("cache_salt")),
        _number(fields.get("lora_id")),
    )
    rows = fields.get("extra_keys")
    if parent is not None and (rows is None or (type(rows) is list and not any(rows))):
        extras = []  # most events
    else:
        extras = [b""] * len(keys)
        if rows is not None:
            salt = _read_rows(rows, extras, lora, salt, root=parent is None)
    if parent is None and keys:
        whole = pack_extra("lora", lora or str(lora_id)) if lora or lora_id else b""
        whole += pack_extra("salt", salt) if salt else b""
        extras[0] = whole + extras[0]
        if (
            not whole
            and tokens
            and _is_sglang(fields, engine, tagged=tagged)
            and first_hash(tokens, block_size) != keys[0]
        ):
            extras[0] += pack_extra("unknown", keys[0])
    return Stored(
        keys,
        parent,
        tokens,
        block_size if tokens else 0,
        _medium(fields.get("medium")),
        _number(fields.get("group_idx")),
        (_text(fields.get("kv_cache_spec_kind")) or "full_attention")[:_WORD],
        tuple(extras) if any(extras) else (),
        names,
    )


def _is_sglang(fields: dict[Any, Any], engine: str, *, tagged: bool) -> bool:
    """Whether SGLang sent this: vLLM always tells a name of a LoRA in its maps, and has no negative hashes."""
    if engine != "auto":
        return engine == "sglang"
    return (tagged and not any(name in fields for name in _VLLM_ONLY)) or _has_negative(fields["block_hashes"])


def _has_negative(hashes: Any) -> bool:
    return type(hashes) is list and any(type(value) is int and value < 0 for value in hashes)


def _keys(hashes: Any) -> tuple[tuple[int, ...], tuple[bytes, ...]]:
    """Low 64 bits of each hash, and the hashes whole if they are long enough to stand for themselves."""
    if type(hashes) is not list:
        raise _MalformedError
    if len(hashes) == 1 and type(hashes[0]) is int:  # most of them
        return (hashes[0] & _MASK,), ()
    kinds = set(map(type, hashes))
    if kinds <= _INT:
        return tuple([value & _MASK for value in hashes]), ()
    if kinds - _INT - _BYTES or b"" in hashes:
        raise _MalformedError
    keys = tuple(v & _MASK if type(v) is int else int.from_bytes(v[-_KEY_BYTES:], "big") for v in hashes)
    whole = kinds == _BYTES and min(map(len, hashes)) >= _NAME_BYTES
    return keys, tuple(hashes) if whole else ()


def _tokens(ids: Any) -> bytes:
    if type(ids) is not list:
        raise _MalformedError
    try:
        packed = array("I", cast("list[int]", ids))
    except (OverflowError, TypeError):
        raise _MalformedError from None
    if sys.byteorder == "big":
        packed.byteswap()
    tokens = packed.tobytes()
    if (_ZERO in tokens or _ONE in tokens) and bool in set(map(type, cast("list[Any]", ids))):
        raise _MalformedError  # True is no 1; the array takes nothing else that is no number
    return tokens


def _read_rows(rows: Any, extras: list[bytes], lora: str, salt: str, *, root: bool) -> str:
    """Put into `extras` what vLLM tells of each block besides LoRA and salt; the salt, if it is there, comes back."""
    if type(rows) is not list:
        raise _MalformedError
    if not any(rows):
        return salt
    if len(rows) != len(extras):
        raise _MalformedError
    for i, row in enumerate(rows):
        if row is None:
            continue
        if type(row) is not list:
            raise _MalformedError
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
        raise _MalformedError from None


def _number(value: Any) -> int:
    """A natural number; nil and what is not there are 0."""
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise _MalformedError
    return value


def _text(value: Any) -> str:
    """A string, be it sent as bytes; nil and what is not there are empty."""
    if value is None:
        return ""
    if type(value) is bytes:
        return value.decode(errors="surrogateescape")
    if type(value) is not str:
        raise _MalformedError
    return value


def _medium(value: Any) -> str:
    if type(value) is str and value:
        return _word(value[:_WORD])
    return _word((_text(value) or "gpu")[:_WORD])


@lru_cache(256)
def _word(text: str) -> str:
    return re.sub(r"[^a-z0-9._-]", "-", text.lower())[:_WORD]
