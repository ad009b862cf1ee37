"""From a path in L1 to what the caller gets."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

import msgpack

from distprefix.chunking import HASH_BYTES
from distprefix.errors import InvalidInputError
from distprefix.l1 import Node
from distprefix.model import CacheTier, PrefixEntry
from distprefix.nodes import Snapshot
from distprefix.touches import Touches

__all__ = ["entry_of", "pack_metadata", "unpack_metadata"]

_MAX_METADATA_BYTES = 4096


def entry_of(
    path: Sequence[Node],
    depth: int,
    chunk_size: int,
    tier: CacheTier,
    touches: Touches,
    *,
    used_now: bool = True,
) -> Callable[[tuple[int, ...]], PrefixEntry]:
    """What makes the entry, given its block ids, for the `depth` chunks that end with `path` as it is now."""
    node = path[-1]
    end = (depth - node.start) * HASH_BYTES
    name = node.hashes[end - HASH_BYTES : end]
    ends_here = node.value is not None and node.value.stop == depth
    tokens = depth * chunk_size
    return partial(_make_entry, node.value, name, tokens, node.recent, tier, touches, path, used_now, ends_here)


def _make_entry(
    snapshot: Snapshot | None,
    prefix_hash: bytes,
    num_tokens: int,
    hits: int,
    tier: CacheTier,
    touches: Touches,
    path: Sequence[Node],
    used_now: bool,
    ends_here: bool,
    blocks: tuple[int, ...],
) -> PrefixEntry:
    return PrefixEntry(
        prefix_hash=prefix_hash.hex(),
        num_tokens=num_tokens,
        block_ids=blocks,
        tier=tier,
        access_count=(snapshot.hits if snapshot else 0) + hits,
        created_at=snapshot.created / 1000 if snapshot else 0.0,
        last_access=time.time() if used_now or not snapshot else snapshot.accessed / 1000,
        metadata=unpack_metadata(snapshot.metadata) if snapshot and ends_here else None,
        _on_touch=partial(touches.add, path) if snapshot else None,
    )


def unpack_metadata(packed: bytes) -> Mapping[str, Any] | None:
    """Metadata as a publish packed it; None for nothing, and for what no publish can have packed."""
    try:
        metadata = msgpack.unpackb(packed) if packed else None
    except ValueError:  # another hand wrote it
        return None
    return metadata if isinstance(metadata, dict) else None


def pack_metadata(metadata: Mapping[str, Any] | None) -> bytes:
    """Metadata as msgpack, at most 4 KiB; empty for none. Raises InvalidInputError."""
    if metadata is None:
        return b""
    if not isinstance(metadata, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidInputError(f"metadata cannot be {type(metadata).__name__}: pass a dictionary")
    if not metadata:
        return b""
    try:
        packed = cast("bytes", msgpack.packb(dict(metadata)))
        msgpack.unpackb(packed)  # readers must be able to
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidInputError(f"metadata cannot be packed: {error}; use text, numbers, bytes, lists") from error
    if len(packed) > _MAX_METADATA_BYTES:
        raise InvalidInputError(f"metadata has {len(packed)} bytes packed: at most {_MAX_METADATA_BYTES} are kept")
    return packed
