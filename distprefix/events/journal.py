"""What the ingest asks of whatever keeps its place and its data: `distprefix.redis.journal` does it. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

from distprefix.events.changes import Change, Covered

__all__ = ["Fate", "Journal", "Lead", "Outcome", "Position"]


class Position(NamedTuple):
    """How far the events of a stream are written."""

    seq: int
    digest: str
    """Of the message with that number, so that another one with the same number is told apart."""
    at: float
    """When the engine made it, seconds since 1970."""


class Lead(NamedTuple):
    """The right to write what one stream says, and how far it is written."""

    position: Position | None
    """None when nothing was written yet."""
    epoch: int
    """The epoch that it was written under."""
    current_epoch: int
    """The epoch that counts; 0 when the worker is unknown."""
    state: bytes
    """`Holdings.state` when it was written."""


class Fate(Enum):
    """What became of a change."""

    DONE = "done"
    AGAIN = "again"
    """Part of it is done: tell it once more."""
    PART = "part"
    """Its leading chunks are published: tell the rest."""
    MOVED = "moved"
    """The chain does not begin with a head, or what lies before it is not covered: tell it from the root."""
    REFUSED = "refused"
    """A damaged node is in the way."""


class Outcome(NamedTuple):
    """What became of a change, and the chunks of its chain that radix nodes begin with."""

    fate: Fate
    heads: tuple[int, ...] = ()
    chunks: int = 0
    """How many leading chunks were published, of a part."""


class Journal(Protocol):
    """One stream's place in the shared tree. Every method raises DistPrefixError when it cannot be done now."""

    def lead(self) -> Lead | None:
        """Take the right to write, or keep it; None while another ingester has it.

        Raises UnavailableError, and LostHistoryError when what was written is no longer there.
        """
        ...

    def keep(self) -> None:
        """Keep the right to write, when a third of its time has passed: for whoever works long between two writes.

        Raises FencedError when another ingester has it now, and as `lead` does.
        """
        ...

    def resign(self) -> None:
        """Let another ingester go on at once."""
        ...

    def renew(self) -> int:
        """A new epoch: all that was published so far counts no more. Returns it."""
        ...

    def heartbeat(self, epoch: int, load: Mapping[str, float]) -> None:
        """The engine lives. Raises StaleEpochError when the epoch counts no more."""
        ...

    def suspend(self, epoch: int) -> None:
        """The engine does not answer: nothing of it counts until the next heartbeat. Raises as `heartbeat` does."""
        ...

    def covered(self, epoch: int) -> list[Covered]:
        """What the tree says that the engine holds under this epoch."""
        ...

    def commit(self, epoch: int, changes: Sequence[Change], position: Position | None, state: bytes) -> list[Outcome]:
        """Write changes, and the position with them once all of them are written. Outcomes of those looked at.

        Raises FencedError when another ingester has taken over, and LostHistoryError as `lead` does.
        """
        ...
