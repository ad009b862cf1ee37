"""The protocol of payloads without I/O, as `distprefix.operations` is that of the tree."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from distprefix.chunking import HASH_BYTES
from distprefix.operations import SCHEMA, WINDOW, WORK_A_CALL, Call, Usage, walk

__all__ = [
    "Disproved",
    "Evidence",
    "Idle",
    "Places",
    "disprove",
    "dropped",
    "idle",
    "move",
    "settled",
    "store",
    "where",
]

CHAINS_A_CALL = 500


def store(chain: bytes, start: int, *, max_run: int) -> Generator[Call, Any, tuple[int, Usage]]:
    """Say that the chain's payloads, written before, are there. `start` as in `walk`. One call for 4,096 chunks.

    Returns how many leading chunks of the chain have payloads now, and what the shard holds.
    """
    total, pos = len(chain) // HASH_BYTES, 0
    while True:
        window = chain[pos * HASH_BYTES : (pos + WINDOW) * HASH_BYTES]
        reply = yield Call("store", (SCHEMA, max_run, start + pos, window))
        stored, usage = reply[0], Usage(*reply[1:5])
        if stored < len(window) // HASH_BYTES or pos + stored == total:
            return pos + stored, usage
        views = yield from walk(chain[pos * HASH_BYTES : (pos + stored) * HASH_BYTES], start + pos)
        if not views:
            return pos, usage
        pos = views[-1].start - start  # the next call has to begin at a node's head


class Places(NamedTuple):
    """In which tier the payloads of a chain's leading chunks lie."""

    warm: array[int]
    """Stored sizes by chunk; 0 for those that are cold."""
    cold: array[int]
    starts: tuple[int, ...]
    """Chunks that nodes begin with."""

    @property
    def chunks(self) -> int:
        """How many leading chunks have a payload."""
        return len(self.warm)

    def then(self, begin: int, warm: bytes, cold: bytes, starts: bytes) -> Places:
        """What is known up to a node's head, and what a script tells from there on."""
        firsts = [begin + int(start) for start in starts.split(b",") if start]
        before = (start for start in self.starts if start < begin)
        return Places(self.warm[:begin] + array("I", warm), self.cold[:begin] + array("I", cold), (*before, *firsts))


def where(chains: Sequence[bytes]) -> Generator[Call, Any, list[Places]]:
    """Where the payloads of chains lie, given from the root, of each up to the first chunk that has none.

    A call for every 4,096 chunks of them, and for every 500 chains.
    """
    found = [Places(array("I"), array("I"), ()) for _ in chains]
    todo = deque((i, 0, min(WINDOW, len(chain) // HASH_BYTES)) for i, chain in enumerate(chains))
    while todo:
        asked, room = [todo.popleft()], CHAINS_A_CALL - 1
        left = WINDOW - (asked[0][2] - asked[0][1])
        while todo and room and todo[0][2] - todo[0][1] <= left:
            asked.append(todo.popleft())
            left, room = left - (asked[-1][2] - asked[-1][1]), room - 1
        windows = [chains[i][begin * HASH_BYTES : end * HASH_BYTES] for i, begin, end in asked]
        reply = yield Call("where", (SCHEMA, *windows))
        for at, (i, begin, end) in enumerate(asked):
            places = found[i] = found[i].then(begin, *reply[3 * at : 3 * at + 3])
            if places.chunks == end and end * HASH_BYTES < len(chains[i]):  # on from the head of the last node
                todo.appendleft((i, places.starts[-1], min(end + WINDOW, len(chains[i]) // HASH_BYTES)))
    return found


class Evidence(NamedTuple):
    """What a reader saw of a payload that it could not use."""

    tier: str
    size: int
    """As the tree names it."""
    header: bytes = b""
    """Of a value that failed its check; empty for one that is missing, or has another length."""
    digest: str = ""
    """SHA-1 of that value in hex; empty where it is too long to be read by a script."""


class Disproved(NamedTuple):
    """What became of the evidence."""

    agreed: bool
    """Whether the tree's server saw the same."""
    trimmed: int
    """Chunks of coverage that the shared tiers lost by it."""


def disprove(run: bytes, evidence: Evidence) -> Generator[Call, Any, Disproved]:
    """Remove the payload of the last chunk of `run`, and all that follows it, if the tree's server sees the same.

    `run`: chunks of one node from its head on. One call; more where many branches follow.
    """
    seen = (evidence.size.to_bytes(4, "little"), evidence.header, evidence.digest)
    agreed = False
    trimmed = 0
    resume = b""
    while True:
        holds, taken, resume = yield Call("disprove", (SCHEMA, evidence.tier, run, *seen, resume, WORK_A_CALL))
        agreed = agreed or bool(holds)
        trimmed += taken
        if not resume:
            return Disproved(agreed, trimmed)


class Idle(NamedTuple):
    """A node whose warm payloads nobody has used for long."""

    head: str
    run: bytes
    """Its chunks that are warm."""
    sizes: bytes
    """Of their payloads, 4 bytes each."""


def idle(idle_ms: int, rank: int, leaves: int) -> Generator[Call, Any, tuple[int, list[Idle]]]:
    """Nodes last used so long ago or longer, among the ancestors of so many leaves from a rank on. One call.

    Returns the rank to go on with, -1 when there are no more, and the nodes.
    """
    reply = yield Call("idle", (SCHEMA, idle_ms, rank, leaves))
    found = zip(reply[1::3], reply[2::3], reply[3::3], strict=True)
    return reply[0], [Idle(head.decode(), run, sizes) for head, run, sizes in found]


def move(head: str, tier: str, seen: bytes, copies: bytes) -> Generator[Call, Any, bool]:
    """A node's payloads are in the other tier than `tier` now, if it still is what was seen. One call."""
    return bool((yield Call("move", (SCHEMA, head, tier, seen, copies))))


def settled(head: bytes, chunks: bytes) -> Generator[Call, Any, bool]:
    """The other server was told to keep these chunks of a node. One call. False when more became cold meanwhile."""
    return bool((yield Call("settled", (SCHEMA, head, chunks))))


def dropped(chunk: bytes) -> Generator[Call, Any, bool]:
    """The other server was told to drop a chunk. One call. True when it is cold all the same, and has to be settled."""
    return bool((yield Call("dropped", (SCHEMA, chunk))))
