"""The protocol of payloads without I/O, as `distprefix.operations` is that of the tree."""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

from distprefix.chunking import HASH_BYTES
from distprefix.damage import Progress
from distprefix.operations import SCHEMA, WINDOW, WORK_A_CALL, Call, Usage, report_damage

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
STORES_A_CALL = 512
"""Chunks: each is looked for, and kept, in each of its parts."""
_MIN_STORES = 16


def store(chain: bytes, start: int, *, max_run: int) -> Generator[Call, Any, tuple[int, Usage]]:
    """Say that the chain's payloads, written before, are there. `start` as in `walk`.

    One call for every 512 chunks, more where payloads have several parts or nodes are short. Returns how many leading
    chunks of the chain have payloads now, and what the shard holds.
    """
    total, pos, known, size = len(chain) // HASH_BYTES, 0, 0, STORES_A_CALL
    while True:
        window = chain[pos * HASH_BYTES : (pos + known + size) * HASH_BYTES]
        stored, last, stopped, *usage = yield Call("store", (SCHEMA, max_run, start + pos, window, known))
        if pos + stored == total or (stored < len(window) // HASH_BYTES and not stopped):
            return pos + stored, Usage(*usage)
        size = min(STORES_A_CALL, max(_MIN_STORES, 2 * (stored - known if stopped else size)))
        pos, known = pos + last, stored - last  # the next call has to begin at a node's head


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

    A call for every 4,096 chunks of them, for every 500 chains, and for about 400 nodes.
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
        looked = len(reply) // 3
        todo.extendleft(reversed(asked[looked:]))
        for at, (i, begin, end) in enumerate(asked[:looked]):
            places = found[i] = found[i].then(begin, *reply[3 * at : 3 * at + 3])
            if at == looked - 1 and reply[-1] == b"more":
                taken = places.chunks - begin
                todo.appendleft((i, places.starts[-1], min(places.chunks + 2 * taken, len(chains[i]) // HASH_BYTES)))
            elif places.chunks == end and end * HASH_BYTES < len(chains[i]):  # on from the head of the last node
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
    progress = Progress()
    while True:
        holds, taken, resume = yield Call("disprove", (SCHEMA, evidence.tier, run, *seen, resume, WORK_A_CALL))
        agreed = agreed or bool(holds)
        trimmed += taken
        if not resume:
            return Disproved(agreed, trimmed)
        if not progress.goes_on(resume, has_changed=taken > 0):
            yield from report_damage(1)
            return Disproved(agreed, trimmed)


class Idle(NamedTuple):
    """A node whose warm payloads nobody has used for long."""

    head: str
    run: bytes
    """Its chunks that are warm."""
    sizes: bytes
    """Of their payloads, 4 bytes each."""


def idle(idle_ms: int, rank: int, leaves: int, above: str = "") -> Generator[Call, Any, tuple[int, str, list[Idle]]]:
    """Nodes last used so long ago or longer, among the ancestors of so many leaves from a rank on. One call.

    Returns the rank to go on with, -1 when there are no more; the head to go on with as `above` when the way up was too
    long for the call, else ""; and the nodes.
    """
    reply = yield Call("idle", (SCHEMA, idle_ms, rank, leaves, above))
    found = zip(reply[2::3], reply[3::3], reply[4::3], strict=True)
    return reply[0], reply[1].decode(), [Idle(head.decode(), run, sizes) for head, run, sizes in found]


def move(head: str, tier: str, seen: bytes, copies: bytes) -> Generator[Call, Any, bool]:
    """A node's payloads are in the other tier than `tier` now, if it still is what was seen. One call."""
    return bool((yield Call("move", (SCHEMA, head, tier, seen, copies))))


def settled(head: bytes, chunks: bytes) -> Generator[Call, Any, bool]:
    """The other server was told to keep these chunks of a node. One call. False when more became cold meanwhile."""
    return bool((yield Call("settled", (SCHEMA, head, chunks))))


def dropped(member: bytes, chunk: bytes) -> Generator[Call, Any, bool]:
    """The other server was told to drop a chunk, which is named by `member` of the trash; no chunk: it names none.

    One call. True when the chunk is cold all the same, and has to be settled.
    """
    return bool((yield Call("dropped", (SCHEMA, member, chunk))))
