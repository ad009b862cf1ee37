"""Names of keys. The tag in braces keeps a shard in one cluster slot; nothing else builds keys."""

from __future__ import annotations

__all__ = ["NAMESPACES", "Keys"]

NAMESPACES = "dp:ns:*"


class Keys:
    """The keys of one namespace."""

    def __init__(self, namespace: str, shard: int = 0) -> None:
        self.descriptor = f"dp:ns:{namespace}"
        self.epochs = f"dp:{{{namespace}}}:epochs"
        self.metrics = f"dp:{{{namespace}}}:metrics"
        """What workers tell of themselves, by holder; for people and dashboards, nothing depends on it."""
        self.base = f"dp:{{{namespace}:{shard}}}:"
        self.meta = f"{self.base}meta"
        """The one key that every script declares; the others of the shard are derived from it."""
        self.leaves = f"{self.base}leaves"
        self.log = f"{self.base}log"
        self.hot = f"{self.base}hot"
        """Candidates for pre-warming by hits."""

    def node(self, head: str) -> str:
        """The radix node whose first chunk has the hash `head` (hex)."""
        return f"{self.base}n:{head}"

    def junction(self, last: str) -> str:
        """Where the children of the node hang whose last chunk is `last` (hex); "" for the roots."""
        return f"{self.base}j:{last or 'root'}"
