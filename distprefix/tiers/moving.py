"""Moving the KV bytes of chunks between the tiers: copies first, then one script says where they are."""

from __future__ import annotations

import time
from array import array

from distprefix.chunking import HASH_BYTES
from distprefix.damage import Progress
from distprefix.errors import NotAttachedError
from distprefix.tiers import operations
from distprefix.tiers.payloads import COLD, WARM, Payloads
from distprefix.tiers.store import Flaw, PayloadStore, Want, groups

__all__ = ["demote", "promote"]

_GROUP_BYTES = 8 * 1024 * 1024
"""As many are copied at once: they lie in memory meanwhile, packed and unpacked."""


def promote(payloads: Payloads, hashes: bytes, deadline: float) -> int:
    """Make warm what of a chain is cold, from the top down. Returns the chunks moved. Raises UnavailableError."""
    (places,), moved = payloads.places([hashes], deadline), 0
    for start, stop in zip(places.starts, (*places.starts, places.chunks)[1:], strict=True):
        sizes = places.cold[start:stop]
        if any(sizes) and payloads.cold is not None:
            run = hashes[start * HASH_BYTES : stop * HASH_BYTES]
            done = _move(payloads, run, sizes.tobytes(), payloads.cold, payloads.warm, deadline)
            moved += done
            if not done:
                break
    return moved


def demote(payloads: Payloads, deadline: float, idle_s: float | None = None) -> int:
    """Make cold what nobody used for `cold_timeout_s`. Returns the chunks moved. Raises UnavailableError."""
    state, moved, rank, above = payloads.state, 0, 0, ""
    if payloads.cold is None:
        return 0
    idle_ms = int(1000 * (state.config.cold_timeout_s if idle_s is None else idle_s))
    progress = Progress()
    while rank >= 0 and time.monotonic() < deadline and progress.goes_on((rank, above)):
        try:
            rank, above, found = state.link.publish(operations.idle(idle_ms, rank, 50, above), deadline)
        except NotAttachedError:  # flushed: there is nothing to move
            break
        for each in found:
            key = state.link.keys.moving(each.head)
            if _is_mine(payloads, key, deadline):
                moved += _move(payloads, each.run, each.sizes, payloads.warm, payloads.cold, deadline)
                state.link.publishes.command("DEL", key, deadline=deadline)
    return moved


def _is_mine(payloads: Payloads, key: str, deadline: float) -> bool:
    """Whether this process moves a node: nobody else does at the same time, which would be in vain."""
    link, ttl_ms = payloads.state.link, int(1000 * payloads.state.config.payload_timeout_s)
    return link.publishes.command("SET", key, "1", "NX", "PX", ttl_ms, deadline=deadline) is not None


def _move(
    payloads: Payloads, run: bytes, sizes: bytes, source: PayloadStore, target: PayloadStore, deadline: float
) -> int:
    """Copy the payloads of a node's chunks, and tell the tree. Returns the chunks moved, 0 if it changed."""
    from_tier, name = (COLD, "promote") if source.cold else (WARM, "demote")
    began, count, total = time.perf_counter(), len(sizes) // 4, 0
    copies, view = array("I", bytes(4 * count)), memoryview(sizes).cast("I")
    wants = [(at, Want(run[at * HASH_BYTES : (at + 1) * HASH_BYTES], view[at])) for at in range(count) if view[at]]
    for group in groups(wants, lambda each: each[1].size, _GROUP_BYTES):
        found: list[tuple[bytes, memoryview]] = []
        for (_, want), read in zip(group, source.read([want for _, want in group], deadline), strict=True):
            if isinstance(read, Flaw):
                payloads.count(f"payloads_{read.reason}", 1)
                return 0
            found.append((want.chunk, read))
        packed = target.copy(found, deadline)
        if packed is None:
            return 0
        for (at, _), size in zip(group, packed, strict=True):
            copies[at] = size
        total += sum(len(read) for _, read in found)
    head = run[:HASH_BYTES].hex()
    if not payloads.state.link.publish(operations.move(head, from_tier, sizes, copies.tobytes()), deadline):
        return 0
    payloads.count(f"{name}_us", int(1e6 * (time.perf_counter() - began)))
    payloads.count(f"{name}d_chunks", len(wants))
    payloads.count(f"{name}d_bytes", total)
    if name == "demote":
        payloads.count("demoted_bytes_packed", sum(copies))
    return len(wants)
