"""Moving the KV bytes of chunks between the tiers: copies first, then one script says where they are."""

from __future__ import annotations

import time

from distprefix import operations
from distprefix.chunking import HASH_BYTES
from distprefix.tiers.payloads import COLD, WARM, Payloads
from distprefix.tiers.store import PayloadStore, Want

__all__ = ["demote", "promote"]


def promote(payloads: Payloads, hashes: bytes, deadline: float) -> int:
    """Make warm what of a chain is cold, from the top down. Returns the chunks moved. Raises UnavailableError."""
    places, moved = payloads.places(hashes, deadline), 0
    for start, stop in zip(places.starts, (*places.starts[1:], places.chunks), strict=True):
        sizes = places.cold[start:stop]
        if any(sizes) and payloads.cold is not None:
            run = hashes[start * HASH_BYTES : stop * HASH_BYTES]
            done = _move(payloads, run, sizes.tobytes(), payloads.cold, payloads.warm, deadline)
            moved += done
            if not done:
                break
    payloads.count("promoted_chunks", moved)
    return moved


def demote(payloads: Payloads, deadline: float, idle_s: float | None = None) -> int:
    """Make cold what nobody used for `cold_timeout_s`. Returns the chunks moved. Raises UnavailableError."""
    state, moved, rank = payloads.state, 0, 0
    if payloads.cold is None:
        return 0
    before = int(1000 * (time.time() - (state.config.cold_timeout_s if idle_s is None else idle_s)))
    while rank >= 0 and time.monotonic() < deadline:
        rank, found = state.link.publish(operations.idle(before, rank, 50), deadline)
        for each in found:
            key = state.link.keys.moving(each.head)
            if _is_mine(payloads, key, deadline):
                moved += _move(payloads, each.run, each.sizes, payloads.warm, payloads.cold, deadline)
                state.link.publishes.command("DEL", key, deadline=deadline)
    payloads.count("demoted_chunks", moved)
    return moved


def _is_mine(payloads: Payloads, key: str, deadline: float) -> bool:
    """Whether this process moves a node: nobody else does at the same time, which would be in vain."""
    link, ttl_ms = payloads.state.link, int(1000 * payloads.state.config.payload_timeout_s)
    return link.publishes.command("SET", key, "1", "NX", "PX", ttl_ms, deadline=deadline) is not None


def _move(
    payloads: Payloads, run: bytes, sizes: bytes, source: PayloadStore, target: PayloadStore, deadline: float
) -> int:
    """Copy the payloads of a node's chunks, and tell the tree. Returns the chunks moved, 0 if it changed."""
    from_tier = COLD if source.cold else WARM
    count = len(sizes) // 4
    copies = bytearray(4 * count)
    view = memoryview(sizes).cast("I")
    wants = [(at, Want(run[at * HASH_BYTES : (at + 1) * HASH_BYTES], view[at])) for at in range(count) if view[at]]
    for at, want in wants:
        (read,) = source.read([want], deadline)
        if isinstance(read, str):
            payloads.count(f"payloads_{read}", 1)
            return 0
        size = target.copy(want.chunk, read, deadline)
        if not size:
            return 0
        copies[4 * at : 4 * at + 4] = size.to_bytes(4, "little")
    moved = payloads.state.link.publish(
        operations.move(run[:HASH_BYTES].hex(), from_tier, sizes, bytes(copies)), deadline
    )
    return len(wants) if moved else 0
