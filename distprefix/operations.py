"""The protocol without I/O: an operation is a generator that yields calls and is sent their replies.

A driver runs it over a client (`redis.client.run` does over a blocking one), so that other drivers share every line.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from distprefix.chunking import HASH_BYTES
from distprefix.damage import Progress
from distprefix.errors import DamagedNodeError, UnavailableError
from distprefix.node_replies import HotNode, parse_hot, parse_nodes, read_count
from distprefix.nodes import NodeView

__all__ = [
    "SCHEMA",
    "WINDOW",
    "Bounds",
    "Call",
    "Candidate",
    "Claimed",
    "Damaged",
    "Evicted",
    "FeedPage",
    "Published",
    "Swept",
    "Usage",
    "claim",
    "drop",
    "evict",
    "feed",
    "guess",
    "hot",
    "lease",
    "prewarm",
    "publish",
    "sweep",
    "touch",
    "trim",
    "walk",
]

SCHEMA = b"5"
"""Version of the data model. Another one is refused at attach and by every script."""
WINDOW = 4096
"""Chunks a call goes further by. A call carries up to one run more, to begin at a node's head."""
_MIN_WINDOW = 64
MAX_CALLS = 1_000_000
"""Of one sweep or census: of far more nodes than a server holds."""
TOUCHES_A_CALL = 100
EVICTS_A_CALL = 25
"""Leaves: look-ups wait for no longer than a millisecond or two."""
HOT_A_CALL = 200
WORK_A_CALL = 150
"""Units of about 10 microseconds that a trim, drop, sweep or census does in a call; the next one resumes."""
ITEMS_A_CALL = 64
"""Of the stack of a sweep or census, so many are passed to the script."""


class Call(NamedTuple):
    """One script call on one shard."""

    script: str
    args: tuple[Any, ...]


class Damaged(Call):
    """No call: so many places cannot be as they are and were passed over. Whoever drives an operation sends None."""


Operation = Generator[Call, Any, Any]


class Usage(NamedTuple):
    """What a shard holds."""

    nodes: int
    chunks: int
    bytes: int
    """An estimate of what Redis takes for them."""
    leaves: int


class Bounds(NamedTuple):
    """How much a shard may hold; None for any number."""

    chunks: int | None
    bytes: int | None
    """Of the tree and its warm payloads."""
    leaves: int | None
    cold: int | None = None
    """Bytes of its cold payloads."""

    def exceeded_by(self, usage: Usage) -> bool:
        """Whether the shard holds more than it may, cold payloads aside."""
        held = (usage.chunks, usage.bytes, usage.leaves)
        return any(bound is not None and has > bound for has, bound in zip(held, self[:3], strict=True))


class Published(NamedTuple):
    """What a publish did, and what the shard holds now."""

    views: list[NodeView]
    nodes_made: int
    chunks_made: int
    usage: Usage


class Evicted(NamedTuple):
    """What an eviction took."""

    nodes: int
    chunks: int
    leased: int
    """Leased leaves that it passed over."""
    more: bool
    """Whether the shard still is over its bounds, and more can go."""
    rank: int = 0
    """Where the next call goes on in the order of eviction, behind the leased leaves that were passed over; -1 when the
    last leaf was seen."""

    def then(self, later: Evicted) -> Evicted:
        """What both took."""
        return Evicted(
            self.nodes + later.nodes,
            self.chunks + later.chunks,
            self.leased + later.leased,
            more=later.more,
            rank=later.rank,
        )


class Swept(NamedTuple):
    """What a sweep took away."""

    coverage: int
    """Chunks of coverage that counted for nothing."""
    nodes: int
    chunks: int

    def then(self, later: Swept) -> Swept:
        """What both took away."""
        return Swept(self.coverage + later.coverage, self.nodes + later.nodes, self.chunks + later.chunks)


class Claimed(NamedTuple):
    """Who computes a missing chunk."""

    worker: str
    """Empty when nobody does."""
    since_ms: int
    """By the server's clock."""
    left_ms: int
    """How long the claim counts yet."""


class FeedPage(NamedTuple):
    """A part of a shard's log."""

    created: str
    """Tells this shard from another one of the same name."""
    newest: int
    """Number of the newest entry."""
    entries: list[tuple[str, dict[str, str]]]
    """Id and fields."""


class Candidate(NamedTuple):
    """A node that is worth pre-warming."""

    last: str
    """Hash of its last chunk, in hex."""
    stop: int
    """Depth behind that."""
    hits: int
    accessed: int
    created: int
    head: bytes


def report_damage(places: int) -> Generator[Call, Any, None]:
    """Have the driver count places that were passed over; nothing where there are none."""
    if places:
        yield Damaged("", (places,))


def _made(
    start: int, stop: int, max_run: int, holder: str, epoch: int, now_ms: int, metadata: bytes
) -> Iterator[NodeView]:
    """The nodes that `insert` has just made for chunks [start, stop): it does not tell what it was told."""
    for at in range(start, stop, max_run):
        end = min(at + max_run, stop)
        size, ending = end - at, metadata if end == stop else b""
        yield NodeView(at, size, size, now_ms, 0, now_ms, ending, b"", {holder: (epoch, end)})


def _next_window(window: int, taken: int, *, stopped: bool) -> int:
    """How many chunks the next call carries.

    Twice what a call took that stopped for its budget, so that little is sent in vain where nodes are short, and more
    again once a call takes all that it carries.
    """
    return min(WINDOW, max(_MIN_WINDOW, 2 * taken if stopped else 2 * window))


def walk(
    chain: bytes, start: int, blocks_of: str = "", *, in_part: bool = False
) -> Generator[Call, Any, list[NodeView]]:
    """The nodes that a chain passes; its first chunk lies at depth `start` and is a node's head (or in no tree).

    One call for every 4,096 chunks that are there, and for about 120 nodes, fewer where many hold them. `in_part`:
    when a later call fails, the nodes of those before count.
    """
    views: list[NodeView] = []
    total, pos, limit, size = len(chain) // HASH_BYTES, 0, WINDOW, WINDOW
    while True:
        window = chain[pos * HASH_BYTES : limit * HASH_BYTES]
        try:
            reply = yield Call("walk", (SCHEMA, blocks_of, window))
        except UnavailableError:
            if in_part and views:
                return views
            raise
        stopped = bool(reply) and reply[-1] == b"more"
        told, damaged = parse_nodes(reply[:-1] if stopped else reply, start + pos)
        yield from report_damage(damaged)
        views += told
        reached = views[-1].start + views[-1].matched - start if views else 0
        if not stopped and (reached < min(limit, total) or reached >= total):
            return views
        size = _next_window(size, reached - pos, stopped=stopped)
        pos = reached
        limit = reached + size
        if views[-1].matched < views[-1].size:  # the window ended inside this node: ask again from its head
            pos = views.pop().start - start


def publish(
    chain: bytes,
    start: int,
    holder: str,
    epoch: int,
    *,
    max_run: int,
    blocks: bytes = b"",
    metadata: bytes = b"",
    in_part: bool = False,
) -> Generator[Call, Any, Published]:
    """Put a chain into the tree and say that `holder` has it. `start` as in `walk`; blocks begin there as well.

    One call for every 4,096 chunks, and for about 70 nodes, fewer where many hold them. Running it twice does the same
    as once. `in_part`: when a later call fails, what those before published counts, and the last view tells how far
    that is.
    """
    views: list[NodeView] = []
    total, pos, limit, size = len(chain) // HASH_BYTES, 0, WINDOW, WINDOW
    nodes = chunks = 0
    done: Published | None = None
    while True:
        stop = min(limit, total)
        call = Call(
            "insert",
            (
                SCHEMA,
                max_run,
                holder,
                epoch,
                start + pos,
                chain[pos * HASH_BYTES : stop * HASH_BYTES],
                blocks[pos * 4 : stop * 4],
                metadata if stop == total else b"",
            ),
        )
        try:
            reply = yield call
        except UnavailableError:
            if in_part and done is not None:
                return done
            raise
        nodes, chunks = nodes + reply[0], chunks + reply[1]
        now_ms = int(reply[6])
        taken = pos + reply[7]
        told, damaged = parse_nodes(reply, start + pos, 8)
        yield from report_damage(damaged)
        reached = told[-1].start + told[-1].matched if told else start + pos
        views += told
        views += _made(reached, start + taken, max_run, holder, epoch, now_ms, metadata if taken == total else b"")
        done = Published(views[:], nodes, chunks, Usage(*reply[2:6]))
        if taken == total:
            return done
        size = _next_window(size, taken - pos, stopped=taken < stop)
        pos, limit = views.pop().start - start, taken + size


def trim(chain: bytes, holder: str, epoch: int) -> Generator[Call, Any, int]:
    """`holder` no longer has the last chunk of a chain, given from the root. Returns the coverage taken away.

    One call while few nodes that the holder covers follow it, else one for some 50 of them; chains over 4,096 chunks
    are walked first, to find the node to begin at.
    """
    begin = 0
    if len(chain) > WINDOW * HASH_BYTES:
        views = yield from walk(chain, 0)
        begin = views[-1].start if views else 0
    taken = 0
    resume = b""
    progress = Progress()
    while True:
        reply = yield Call("trim", (SCHEMA, holder, epoch, chain[begin * HASH_BYTES :], resume, WORK_A_CALL))
        taken += reply[0]
        resume = reply[3]
        if not resume:
            return taken
        if not progress.goes_on(resume, has_changed=any(reply[:3])):
            yield from report_damage(1)
            return taken


def touch(touches: Sequence[tuple[bytes, int, int]], candidate_hits: int = 0) -> Generator[Call, Any, int]:
    """Record uses of nodes (head, hits, ms since the last use). One call for every 100 of them.

    Returns how many were there. With `candidate_hits` hits, unless that is 0, a node becomes a candidate for
    pre-warming.
    """
    touched = 0
    for i in range(0, len(touches), TOUCHES_A_CALL):
        args: list[Any] = [SCHEMA, candidate_hits]
        for head, hits, age_ms in touches[i : i + TOUCHES_A_CALL]:
            args += (head.hex(), hits, age_ms)
        touched += yield Call("touch", tuple(args))
    return touched


def drop(head: str = "root") -> Generator[Call, Any, tuple[int, int]]:
    """Take out a subtree, or everything. One call for some 50 nodes. Returns nodes and chunks removed."""
    nodes = chunks = 0
    resume = b""
    progress = Progress()
    while True:
        reply = yield Call("drop", (SCHEMA, head, resume, WORK_A_CALL))
        nodes, chunks = nodes + reply[0], chunks + reply[1]
        resume = reply[2]
        if not resume:
            return nodes, chunks
        if not progress.goes_on(resume, has_changed=reply[0] > 0):
            yield from report_damage(1)
            return nodes, chunks


def evict(bounds: Bounds, batch: int, rank: int = 0, *, takes_leased: bool = False) -> Generator[Call, Any, Evicted]:
    """Take at most `batch` leaves while a shard is over its bounds, beginning at a rank in the order of eviction.

    One call for every 25, fewer where payloads have many parts, and for about 150 leased leaves that are passed over.
    `takes_leased`: leases and pins hold nothing, as where their owner is over its share of the server.
    """
    limits = tuple("" if bound is None else bound for bound in bounds)
    total = Evicted(0, 0, 0, more=True, rank=rank)
    while total.more and batch > 0:
        args = (SCHEMA, min(batch, EVICTS_A_CALL), *limits, total.rank, "1" if takes_leased else "")
        nodes, chunks, leased, more, next_rank = yield Call("evict", args)
        total = total.then(Evicted(nodes, chunks, leased, bool(more), next_rank))
        batch -= EVICTS_A_CALL
    return total


def sweep(newest: Mapping[str, int]) -> Generator[Call, Any, Swept]:
    """Take away all coverage of these holders, at most 100, under older epochs than these. One call for some 50 nodes.

    Children come before their parents, so that a sweep that is interrupted leaves no coverage that the next one does
    not find. Only nodes that these holders cover are looked at.
    """
    holders = [part for holder, epoch in newest.items() for part in (holder, epoch)]
    stack = [b"root"]
    total = Swept(0, 0, 0)
    for _ in range(MAX_CALLS):
        if not stack:
            return total
        items = b" ".join(stack[-ITEMS_A_CALL:])
        coverage, nodes, chunks, *left = yield Call("sweep", (SCHEMA, WORK_A_CALL, items, *holders))
        stack[-ITEMS_A_CALL:] = left
        total = total.then(Swept(coverage, nodes, chunks))
    raise DamagedNodeError("a sweep of the tree does not end: run `distprefix maintain --repair`")


def lease(chain: bytes, name: str, ttl_ms: int) -> Generator[Call, Any, tuple[int, int]]:
    """Keep a chain, beginning at a node's head, from eviction; 0 ms ends that. One call, and one for about 400 nodes.

    Returns how many leading chunks are there, and when the lease ends in ms of the server's clock.
    """
    pos = 0
    size = WINDOW
    while True:
        window = chain[pos * HASH_BYTES : (pos + size) * HASH_BYTES]
        there, ends, go_on = yield Call("lease", (SCHEMA, name, ttl_ms, window))
        if go_on < 0:
            return pos + there, ends
        size = _next_window(size, there, stopped=True)
        pos += go_on


def claim(chunk: bytes, worker: str, ttl_ms: int) -> Generator[Call, Any, Claimed]:
    """Say that `worker` computes a chunk, unless another one said so before; 0 ms takes it back. One call."""
    worker_now, since, left = yield Call("claim", (SCHEMA, chunk.hex(), worker, ttl_ms))
    return Claimed(worker_now.decode(), since, left)


def feed(last: str, most: int) -> Generator[Call, Any, FeedPage]:
    """The log from entry `last` on, that one included; "" for the newest entry only. One call.

    Raises DamagedNodeError for what is no log.
    """
    created, newest, *rest = yield Call("feed", (SCHEMA, last, most))
    entries: list[tuple[str, dict[str, str]]] = []
    try:
        for entry, flat in zip(rest[::2], rest[1::2], strict=True):
            words = [word.decode() for word in flat]
            entries.append((entry.decode(), dict(zip(words[::2], words[1::2], strict=True))))
        return FeedPage(created.decode(errors="replace"), read_count(newest), entries)
    except ValueError as error:
        raise DamagedNodeError(f"the log makes no sense: {error}") from error


def prewarm(heads: Sequence[str], chunks: int) -> Generator[Call, Any, tuple[int, str, list[HotNode]]]:
    """Nodes with what precedes them, parents first. One call, for about so many chunks, or 50 nodes.

    Returns how many of the heads are done; a head to go on with when the path of the last of these was too long for the
    call, else "": what that brings precedes these nodes; and the nodes.
    """
    reply = yield Call("prewarm", (SCHEMA, chunks, *heads))
    nodes, damaged = parse_hot(reply, 2)
    yield from report_damage(damaged)
    return reply[0], reply[1].decode(), nodes


def guess(last: bytes, chunks: int) -> Generator[Call, Any, list[HotNode]]:
    """What most likely follows the node whose last chunk is `last`, for about so many chunks. One call."""
    reply = yield Call("guess", (SCHEMA, last.hex(), chunks))
    nodes, damaged = parse_hot(reply, 1)
    yield from report_damage(damaged)
    return nodes


def hot(limit: int, first: int = 0) -> Generator[Call, Any, list[Candidate]]:
    """The candidates for pre-warming with the most hits, from rank `first` on. One call for 200."""
    reply: list[Any] = []
    for rank in range(first, first + limit, HOT_A_CALL):
        size = min(HOT_A_CALL, first + limit - rank)
        page = yield Call("hot", (SCHEMA, rank, size))
        reply += page
        if not page:
            break
    told = zip(*(reply[i::6] for i in range(6)), strict=True)
    return [
        Candidate(last.decode(), int(stop), int(hits), int(accessed), int(created), bytes.fromhex(head.decode()))
        for last, stop, hits, accessed, created, head in told  # the script passes over what cannot be
    ]
