"""A stored and a removed block as engines send them, and what becomes of events."""

from __future__ import annotations

import struct
from typing import Any, cast

import msgpack

from distprefix.events.decode import decode
from distprefix.events.frames import Batch, Stored

__all__ = ["ENGINES", "REMOVED", "STORED", "TOP", "bare", "pack", "read", "stored", "words"]

ENGINES = ("auto", "vllm", "sglang")
TOP = 2**64

STORED: dict[str, Any] = {
    "type": "BlockStored",
    "block_hashes": [1, 2],
    "parent_block_hash": None,
    "token_ids": [10, 11, 12, 13],
    "block_size": 2,
    "lora_id": None,
    "medium": "GPU",
    "lora_name": None,
    "extra_keys": [None, None],
    "group_idx": 0,
    "kv_cache_spec_kind": "full_attention",
}
REMOVED = {"type": "BlockRemoved", "block_hashes": [1], "medium": "GPU", "group_idx": 0}


def pack(value: Any) -> bytes:
    """Msgpack, as engines write it."""
    return cast("bytes", msgpack.packb(value))


def read(*events: Any, engine: str = "auto") -> Batch:
    """The batch that has these events."""
    return decode(pack([1.5, list(events), 0]), engine=engine)


def stored(engine: str = "auto", **fields: Any) -> Stored:
    """What a BlockStored with these fields becomes."""
    (event,) = read(STORED | fields, engine=engine).events
    assert isinstance(event, Stored)
    return event


def bare(**fields: Any) -> dict[str, Any]:
    """A BlockStored without what only vLLM sends, as SGLang has it."""
    return {k: v for k, v in STORED.items() if k not in ("lora_name", "extra_keys", "group_idx")} | fields


def words(*ids: int) -> bytes:
    """Token ids as the index has them."""
    return struct.pack(f"<{len(ids)}I", *ids)
