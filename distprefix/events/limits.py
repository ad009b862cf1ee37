"""How much one engine may make an ingester keep. Pure."""

from __future__ import annotations

from dataclasses import dataclass, fields

from distprefix.errors import ConfigError
from distprefix.events.unpack import PAYLOAD_LIMIT

__all__ = ["EngineLimits"]

_MIB = 1 << 20
_MIN_BYTES = 1024
_MAX_BYTES = 1 << 40
_MAX_MEDIA = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Bounds for one rank of an engine, far above what engines need. What a bound drops is counted, by cause.

    Raises ConfigError for a bound that cannot be.
    """

    message_bytes: int = 32 * _MIB
    """One message. A longer one costs the connection; the engine is connected to again and asked for a replay."""
    queue_bytes: int = 256 * _MIB
    """Messages that came and are not applied yet. Later ones are dropped; the engine is asked for a replay."""
    replay_bytes: int = 512 * _MIB
    """One replay. What comes within it is applied, and the replay counts as failed."""
    parked_bytes: int = 128 * _MIB
    """Events that wait for the block before theirs. The one that waits longest is dropped first."""
    held_bytes: int = 256 * _MIB
    """Hashes, and tokens of chunks that are not full yet, of the blocks that it holds; beyond that the prompt that grew
    longest ago is forgotten from its end. A block takes some 300 bytes besides."""
    media: int = 8
    """Media that it may name: each is a holder in Redis."""

    def __post_init__(self) -> None:
        for each in fields(self):
            low, high = (1, _MAX_MEDIA) if each.name == "media" else (_MIN_BYTES, _MAX_BYTES)
            if each.name == "message_bytes":
                high = PAYLOAD_LIMIT
            value = getattr(self, each.name)
            if type(value) is not int or not low <= value <= high:
                raise ConfigError(f"{each.name} is {value!r}: it must lie between {low} and {high}")
