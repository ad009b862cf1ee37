"""From a path in L1 to what the caller gets."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import msgpack

from distprefix.chunking import HASH_BYTES, Prompt
from distprefix.errors import InvalidInputError
from distprefix.l1 import L1, Node
from distprefix.model import CacheHitResult, CacheTier, Holder, PrefixEntry
from distprefix.nodes import Snapshot
from distprefix.touches import Touches

__all__ = ["entry_of", "pack_metadata", "result_of"]

_MAX_METADATA_BYTES = 4096


def entry_of(
    node: Node,
    depth: int,
    chunk_size: int,
    tier: CacheTier,
    touches: Touches,
    blocks: tuple[int, ...] = (),
    *,
    used_now: bool = True,
) -> Callable[[], PrefixEntry]:
    """What makes the entry for the prefix of `depth` chunks that ends in `node`, as the node is now."""
    end = (depth - node.start) * HASH_BYTES
    name = node.hashes[end - HASH_BYTES : end]
    return partial(_make_entry, node.value, name, depth * chunk_size, node.recent, tier, blocks, touches, used_now)


def _make_entry(
    snapshot: Snapshot | None,
    prefix_hash: bytes,
    num_tokens: int,
    hits: int,
    tier: CacheTier,
    blocks: tuple[int, ...],
    touches: Touches,
    used_now: bool,
) -> PrefixEntry:
    metadata = msgpack.unpackb(snapshot.metadata) if snapshot and snapshot.metadata else None
    return PrefixEntry(
        prefix_hash=prefix_hash.hex(),
        num_tokens=num_tokens,
        block_ids=blocks,
        tier=tier,
        access_count=(snapshot.hits if snapshot else 0) + hits,
        created_at=snapshot.created / 1000 if snapshot else 0.0,
        last_access=time.time() if used_now or not snapshot else snapshot.accessed / 1000,
        metadata=metadata if isinstance(metadata, dict) else None,
        _on_touch=partial(touches.add, snapshot.head) if snapshot else None,
    )


def result_of(
    prompt: Prompt,
    path: list[Node],
    matched: int,
    coverage: dict[str, int],
    l1_chunks: int,
    calls: int,
    blocks: bytes | None,
    began: int,
    chunk_size: int,
    l1: L1,
    touches: Touches,
) -> CacheHitResult:
    """The result of a look-up that matched so many chunks; `path` ends with the node that the last of them is in."""
    make_entry, tier, ids = None, None, ()
    if matched:
        ids = l1.own_blocks(path, matched) if blocks is None else tuple(array("I", blocks[: 4 * matched]))
        tier = CacheTier.HOT if l1_chunks == matched else CacheTier.WARM
        make_entry = entry_of(path[-1], matched, chunk_size, tier, touches, ids)
    holders = sorted(coverage.items(), key=lambda item: -item[1]) if len(coverage) > 1 else coverage.items()
    return CacheHitResult(
        hit=matched > 0,
        matched_tokens=matched * chunk_size,
        matched_chunks=matched,
        block_ids=ids,
        tier=tier,
        holders=tuple(map(Holder._make, holders)),
        lookup_time_us=(time.perf_counter_ns() - began) / 1000,
        l1_chunks=l1_chunks,
        redis_calls=calls,
        _make_entry=make_entry,
        _tokens=prompt.tokens,
        _matched_units=matched * prompt.unit,
    )


def pack_metadata(metadata: Mapping[str, Any] | None) -> bytes:
    """Metadata as msgpack, at most 4 KiB; empty for none. Raises InvalidInputError."""
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
