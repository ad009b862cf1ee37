"""Names of keys. The tag in braces keeps a shard in one cluster slot; nothing else builds keys."""

from __future__ import annotations

__all__ = ["NAMESPACES", "REGISTRY", "RELIEVING", "Keys"]

NAMESPACES = "dp:ns:*"
REGISTRY = "dp:namespaces"
"""All namespaces of the server, by when each was used last, ms by the server's clock."""
RELIEVING = "dp:relieving"
"""A process is making room on the whole server now."""


class Keys:
    """The keys of one namespace."""

    def __init__(self, namespace: str, shard: int = 0) -> None:
        self.descriptor = f"dp:ns:{namespace}"
        self.secret = f"dp-secret:{namespace}"
        """What the keys of chunk hashes are derived from, unless it is configured. Its prefix is its own, so that a
        user of the server who may read `dp:*` does not read it."""
        self.epochs = f"dp:{{{namespace}}}:epochs"
        """Members, ``worker/rank``, to epochs. The scripts that look after the workers declare it."""
        self.workers = f"dp:{{{namespace}}}:workers"
        """Members that hold a lease, by its end."""
        self.version = f"dp:{{{namespace}}}:version"
        self.changes = f"dp:{{{namespace}}}:changes"
        """Members by the version of their last change."""
        self.swept = f"dp:{{{namespace}}}:swept"
        """Members to the epoch below which none of their coverage is left."""
        self.sweeping = f"dp:{{{namespace}}}:sweeping"
        """Somebody is sweeping now."""
        self.forgetting = f"dp:{{{namespace}}}:forgetting"
        """Somebody has forgotten dead members lately."""
        self.metrics = f"dp:{{{namespace}}}:metrics"
        """What workers tell of themselves, by holder; for people and dashboards, nothing depends on it."""
        self.voided = f"dp:{{{namespace}}}:voided"
        """Members that were made void and that nobody has registered since, to the epoch that nobody has."""
        self.own = (
            *(self.descriptor, self.secret, self.epochs, self.workers, self.version, self.voided, self.swept),
            *(self.sweeping, self.metrics, self.changes, self.forgetting),
        )
        """The namespace's keys that lie in no shard, but for those of the members."""
        self.base = f"dp:{{{namespace}:{shard}}}:"
        self.meta = f"{self.base}meta"
        """The one key that every script declares; the others of the shard are derived from it."""
        self.leaves = f"{self.base}leaves"
        self.log = f"{self.base}log"
        self.holders = f"{self.base}holders"
        """Holders, to how many roots they cover. Who covers anything covers a root."""
        self.hot = f"{self.base}hot"
        """Candidates for pre-warming by hits."""
        self.writers = f"{self.base}writers"
        """Members to the name under which meta has how many of their writes the shard has taken."""
        self.trash = f"{self.base}trash"
        """Chunks whose cold payloads on another server have to be deleted."""
        self.kept = f"{self.base}kept"
        """Chunks whose cold payloads on another server the tree names."""
        self.unsettled = f"{self.base}unsettled"
        """Heads of nodes that became cold, to the chunks that the other server has to be told to keep."""

    def moving(self, head: str) -> str:
        """Somebody moves the payloads of the node with this head."""
        return f"{self.base}moving:{head}"

    def stream(self, member: str) -> str:
        """How far the KV events of this rank are written, and who writes them."""
        return f"{self.base}s:{member}"

    def node(self, head: str) -> str:
        """The radix node whose first chunk has the hash `head` (hex)."""
        return f"{self.base}n:{head}"

    def payload(self, chunk: str, *, cold: bool = False) -> str:
        """The bytes of a chunk (hex), or the first part of them."""
        return f"{self.base}{'cold' if cold else 'kv'}:{chunk}"

    def part(self, chunk: str, upload: str, number: int, *, cold: bool = False) -> str:
        """Part `number`, 1 and more, of a long payload as one upload (hex) wrote it."""
        return f"{self.payload(chunk, cold=cold)}:{upload}:{number}"

    def junction(self, last: str) -> str:
        """Where the children of the node hang whose last chunk is `last` (hex); "" for the roots."""
        return f"{self.base}j:{last or 'root'}"

    def member(self, name: str) -> str:
        """What the rank of a worker says of itself."""
        return f"{self.epochs.removesuffix('epochs')}w:{name}"
