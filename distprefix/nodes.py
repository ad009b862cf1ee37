"""L2 nodes as this process sees them: fresh from a script, and as L1 remembers them."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["NodeView", "Snapshot"]


class NodeView(NamedTuple):
    """One L2 node on a chain's path, as a script tells it."""

    start: int
    """Depth of its head, in chunks."""
    size: int
    matched: int
    accessed: int
    hits: int
    created: int
    metadata: bytes
    blocks: bytes
    holders: dict[str, tuple[int, int]]
    """Holder to (epoch, depth that it covers up to)."""


class Snapshot(NamedTuple):
    """What L1 remembers of an L2 node. Shared by the L1 nodes that are parts of it."""

    head: bytes
    start: int
    stop: int
    """Depth behind its last chunk."""
    holders: dict[str, tuple[int, int]]
    """Holder to (epoch, depth that it covers up to)."""
    hits: int
    accessed: int
    created: int
    metadata: bytes
    at: float
    """When it was taken, on the caller's monotonic clock; -inf when it was not confirmed by Redis."""
