"""The shapes in which engines send an event: from a map or an array to its kind and its fields by name. Pure."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["MalformedError", "has_negative", "may_remove", "named", "text_of"]

_BASE = "block_hashes parent_block_hash token_ids block_size lora_id medium"
_FIELDS = {
    ("vllm", "BlockStored"): f"{_BASE} lora_name extra_keys group_idx kv_cache_spec_kind".split(),
    ("vllm", "BlockRemoved"): ["block_hashes", "medium", "group_idx"],
    ("sglang", "BlockStored"): f"{_BASE} cache_salt session_id lora_name".split(),
    ("sglang", "BlockRemoved"): ["block_hashes", "medium"],
}
_SGLANG_TAIL = ("cache_salt", "lora_name")
_ENVELOPE_KINDS = {"stored": "BlockStored", "removed": "BlockRemoved", "cleared": "AllBlocksCleared"}
_ENVELOPE_FIELDS = {
    "seq_hashes": "block_hashes",
    "parent_hash": "parent_block_hash",
    "additional_salt": "cache_salt",
}
"""The envelope of Mooncake's RFC #1527, whose events carry a salt in a field of its own, or nil."""
_TAKES_AWAY = re.compile(
    "remov|evict|clear|reset|drop|flush|delete|deletion|invalid|free|expir|purge|discard", re.IGNORECASE
)


class MalformedError(Exception):
    """An event that makes no sense."""


def named(item: Any, engine: str) -> tuple[str, dict[Any, Any], str, bool]:
    """Kind, fields by name, engine, and whether the event came as a map.

    The engine is vllm, sglang, envelope, or auto where the shape leaves it open. Raises MalformedError for what is no
    event, and KeyError for one without a kind.
    """
    if type(item) is dict:
        fields: dict[Any, Any] = item
        if "type" not in fields or "block_hashes" not in fields:
            fields = {text_of(key) if type(key) is bytes else key: value for key, value in fields.items()}
        if "type" not in fields and "event_type" in fields:
            return _of_envelope(fields)
        kind = fields["type"]
        return kind if type(kind) is str else text_of(kind), fields, engine, True
    if type(item) is not list or not item:
        raise MalformedError
    return _of_array(text_of(item[0]), item, engine)


def _of_envelope(fields: dict[Any, Any]) -> tuple[str, dict[Any, Any], str, bool]:
    kind = text_of(fields["event_type"])
    fields = {_ENVELOPE_FIELDS.get(name, name): value for name, value in fields.items()}
    if fields.get("token_ids", ()) is None:  # blocks that are only named
        fields |= {"token_ids": [], "block_size": 0}
    return _ENVELOPE_KINDS.get(kind, kind), fields, "envelope", True


def _of_array(kind: str, item: list[Any], engine: str) -> tuple[str, dict[Any, Any], str, bool]:
    """SGLang tells the salt by a map at the end."""
    tail: dict[Any, Any] = {}
    if len(item) > 1 and type(item[-1]) is dict and kind == "BlockStored":
        tail = {name: item[-1][name] for name in _SGLANG_TAIL if name in item[-1]}
        item = item[:-1]
        engine = "sglang" if engine == "auto" else engine
    if engine == "auto" and kind == "BlockStored" and len(item) > 1 and has_negative(item[1]):
        engine = "sglang"
    names = _FIELDS.get((engine if engine == "sglang" else "vllm", kind), ())
    return kind, dict(zip(names, item[1:], strict=False)) | tail, engine, False


def may_remove(item: Any) -> tuple[bool, Any]:
    """Whether an event that cannot be read may have told of a removal, and the medium that it concerns, if it says."""
    try:
        kind, fields, _, _ = named(item, "auto")
    except KeyError:
        return False, None  # a map without a kind is no event
    except MalformedError:
        return type(item) in (dict, list) and bool(item), None
    return bool(_TAKES_AWAY.search(kind)), fields.get("medium")


def has_negative(hashes: Any) -> bool:
    """Whether some of the hashes are negative: SGLang's are signed."""
    return type(hashes) is list and any(type(value) is int and value < 0 for value in hashes)


def text_of(value: Any) -> str:
    """A string, be it sent as bytes; nil and what is not there are empty. Raises MalformedError for what is none."""
    if value is None:
        return ""
    if type(value) is bytes:
        return value.decode(errors="surrogateescape")
    if type(value) is not str:
        raise MalformedError
    return value
