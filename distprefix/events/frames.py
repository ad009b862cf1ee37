"""What the parts of the ingest hand to each other. Pure."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Batch", "Cleared", "Event", "Frame", "Removed", "Stored"]


class Frame(NamedTuple):
    """One message of an engine, as it came."""

    seq: int
    payload: bytes


class Stored(NamedTuple):
    """Blocks that the engine now has in one medium, in the order of their tokens."""

    keys: tuple[int, ...]
    """The engine's hashes, each as the low 64 bits of what came: opaque, one for a block wherever it is named."""
    parent: int | None
    """Key of the block before the first one; None at the beginning of a prompt."""
    tokens: bytes
    """Token ids, little-endian uint32; empty when the engine only names blocks that it told of before."""
    block_size: int
    """Tokens in a block; 0 when the engine only names blocks."""
    medium: str
    group: int
    kind: str
    """What the group's attention needs: ``full_attention`` where the engine does not say."""
    extras: tuple[bytes, ...]
    """What else each block's content depends on, packed; empty when nothing does for any block."""
    names: tuple[bytes, ...]
    """The engine's hashes whole, where it sends at least 16 bytes; else empty."""
    is_told: bool = True
    """Whether the event says what its blocks' content depends on besides tokens: salts, images, LoRAs."""


class Removed(NamedTuple):
    """Blocks that the engine no longer has in one medium."""

    keys: tuple[int, ...]
    medium: str
    group: int


class Cleared(NamedTuple):
    """The engine has dropped everything, or nobody knows what of it."""

    medium: str | None = None
    """What is concerned; None for all media."""


Event = Stored | Removed | Cleared


class Batch(NamedTuple):
    """The events of one message."""

    at: float
    """When the engine made it, seconds since the epoch."""
    rank: int | None
    """Data-parallel rank, where the engine says."""
    events: tuple[Event, ...]
    unknown: int
    """Events of kinds that mean nothing here."""
    malformed: int
    """Events that make no sense, and were left out."""
    unclear: int = 0
    """Of these two, events that may have told of a removal: a Cleared of what they could concern stands for each."""
