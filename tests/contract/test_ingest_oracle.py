"""Random histories of engines, losses, crashes and take-overs; after every step the answers are an oracle's."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgpack
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from distprefix import PrefixCacheOptimizer
from distprefix.errors import FencedError, LostHistoryError
from distprefix.events.changes import blocks_of
from distprefix.events.follower import Follower
from distprefix.events.frames import Frame
from distprefix.events.ingester import Engine, follower_of
from distprefix.redis.client import Client
from distprefix.redis.journal import RedisJournal
from tests.followers import Kept, follow, holders
from tests.lengths import short_or_long
from tests.servers import Backend

Path = tuple[int, ...]
"""A block by what it holds: one letter for each block from the prompt's beginning to its end."""
MEMBERS = (("w1", 0), ("w1", 1), ("w2", 0))
MEDIA = ("gpu", "cpu")
CHUNK = 16
WHO = st.integers(0, len(MEMBERS) - 1)
MEDIUM = st.sampled_from(MEDIA)
LETTERS = st.lists(st.integers(1, 2), min_size=1, max_size=6).map(tuple)
PROMPTS: tuple[Path, ...] = ((1,) * 6, (1, 1, 2, 1, 1, 2), (1, 2, 1, 2, 1, 2), (2,) * 6, (2, 1, 1, 1, 2, 2))
_LONG_PAST_MS = 1_000_000
_names = itertools.count()
_stamps = itertools.count(1)


class Store(NamedTuple):
    """Blocks in a row, stored in a medium."""

    medium: str
    blocks: tuple[Path, ...]


class Remove(NamedTuple):
    """Blocks that are gone from a medium."""

    medium: str
    blocks: tuple[Path, ...]


class Clear(NamedTuple):
    """Everything is gone."""


class Void(NamedTuple):
    """Something nobody can read is gone from a medium."""

    medium: str


Said = Store | Remove | Clear | Void


class Message(NamedTuple):
    """What an engine says at once."""

    seq: int
    said: tuple[Said, ...]
    frame: Frame


class Lost(Exception):  # noqa: N818 - not an error of anybody
    """The follower died here."""


@dataclass
class Known:
    """What somebody who heard these events knows: the oracle. Blocks are what they hold; nothing has a hash."""

    halves: bool
    """Whether two blocks make a chunk."""
    held: dict[str, set[Path]] = field(default_factory=lambda: {medium: set() for medium in MEDIA})
    waiting: dict[Path, list[Store | Remove]] = field(default_factory=dict[Path, list[Store | Remove]])
    """What names a block that nobody told of, by that block."""
    blurred: set[Path] = field(default_factory=set[Path])
    """Blocks that end inside a chunk and whose tokens are not known any more."""

    @property
    def blocks(self) -> set[Path]:
        """All blocks that are known: those held, and what lies before them."""
        return {path[:i] for held in self.held.values() for path in held for i in range(1, len(path) + 1)}

    def forget(self) -> None:
        """Nothing is known."""
        for held in self.held.values():
            held.clear()
        self.waiting.clear()
        self.blurred.clear()

    def hear(self, said: Said) -> None:
        """One event."""
        match said:
            case Clear():
                self.forget()
            case Store(medium, blocks):
                self._store(medium, blocks)
            case Remove(medium, blocks):
                for block in blocks:
                    self._remove(medium, block)
            case Void(medium):
                self.held[medium].clear()
                waiting = {
                    path: [each for each in events if each.medium != medium] for path, events in self.waiting.items()
                }
                self.waiting = {path: events for path, events in waiting.items() if events}
        self.blurred &= self.blocks

    def _store(self, medium: str, blocks: tuple[Path, ...]) -> None:
        before = blocks[0][:-1]
        if before and before not in self.blocks:
            self.waiting.setdefault(before, []).append(Store(medium, blocks))
            return
        for block in blocks:
            if block not in self.blocks and block[:-1] in self.blurred:
                return
            if block[:-1] not in self.blurred:
                self.blurred.discard(block)
            self.held[medium].add(block)
        for block in blocks:
            for event in self.waiting.pop(block, []):
                self.hear(event)

    def _remove(self, medium: str, block: Path) -> None:
        if block in self.blocks:
            self.held[medium].discard(block)
            return
        for events in self.waiting.values():
            if any(isinstance(event, Store) and block in event.blocks for event in events):
                events.append(Remove(medium, (block,)))
                return

    def counted(self, medium: str) -> set[Path]:
        """Blocks held with all before them."""
        held = self.held[medium]
        return {path for path in held if all(path[:i] in held for i in range(1, len(path)))}

    def written(self, medium: str) -> set[Path]:
        """Those of them that make whole chunks, which is what the tree can say."""
        counted = self.counted(medium)
        if not self.halves:
            return counted
        return counted & {path[:i] for path in counted if len(path) % 2 == 0 for i in range(1, len(path) + 1)}

    def reread(self) -> None:
        """What is left when only the tree is left."""
        for medium in MEDIA:
            self.held[medium] = self.written(medium)
        self.waiting.clear()
        self.blurred = {path for path in self.blocks if self.halves and len(path) % 2}

    @property
    def is_whole(self) -> bool:
        """Whether the tree tells all of it."""
        return not self.waiting and all(self.held[medium] == self.written(medium) for medium in MEDIA)


class Telephone:
    """A client whose line may break: before or after a call is made."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.left: int | None = None
        """Calls until it breaks."""
        self.loses_reply = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def call(self, *args: Any) -> Any:
        """A script call."""
        if self.left is not None:
            self.left -= 1
            if self.left < 0:
                if self.loses_reply and self.left == -1:
                    self._client.call(*args)
                raise Lost
        return self._client.call(*args)


@dataclass
class Side:
    """An engine, what follows it, and what is known of both."""

    worker: str
    rank: int
    truth: Known
    known: Known
    kept: Kept = field(default_factory=lambda: Kept([]))
    messages: dict[int, Message] = field(default_factory=dict[int, Message])
    """What the engine can replay."""
    waiting: list[Message] = field(default_factory=list[Message])
    """What it sent and nobody got yet."""
    old: list[Frame] = field(default_factory=list[Frame])
    """What engines before this one sent."""
    following: int = 0
    """Number of the next message."""
    last: int | None = None
    """Of the message heard last."""
    heard: int = 0
    """Messages, since the engine started."""
    mute: bool = False
    void: bool = False
    """Whether another took the epoch away."""
    dead: bool = False
    """Whether the lease ended."""

    @property
    def member(self) -> str:
        """The rank."""
        return f"{self.worker}/{self.rank}"


class Histories(RuleBasedStateMachine):
    """The steps. After each of them all answers are what the oracle says."""

    server: Backend
    block: int

    def __init__(self) -> None:
        super().__init__()
        name = f"{self.server.namespace}-{next(_names)}"
        self.backend = Backend("", self.server.admin, name, url=self.server.url)
        self.admin: Any = self.server.admin
        self.sides: list[Side] = []
        self.reader: PrefixCacheOptimizer | None = None
        self.lines: dict[str, Telephone] = {}
        self.followers: dict[str, tuple[Follower, RedisJournal]] = {}

    @initialize()
    def begin(self) -> None:
        """Start all engines and their followers."""
        self.reader = self.backend.open("reader", chunk_size=CHUNK, max_run=4, l1_ttl_s=0)
        for worker, rank in MEMBERS:
            side = Side(worker, rank, Known(self.halves), Known(self.halves))
            self.sides.append(side)
            self.open(side)
            assert self.followers[side.member][0].begin()

    @property
    def halves(self) -> bool:
        """Whether two blocks make a chunk."""
        return self.block < CHUNK

    def teardown(self) -> None:
        """Close everything and remove the keys."""
        self.backend.close()
        self.remove(f"dp:*{self.backend.namespace}*")

    def remove(self, pattern: str) -> None:
        """Remove keys."""
        if keys := list(self.admin.scan_iter(match=pattern, count=1000)):
            self.admin.delete(*keys)

    def open(self, side: Side) -> tuple[Follower, RedisJournal]:
        """A new follower in place of the one that was."""
        assert self.reader is not None
        line = self.lines[side.member] = Telephone(self.reader._state.link.admin)
        engine = Engine(worker=side.worker, rank=side.rank, endpoint="tcp://nowhere:1", kind="vllm")
        made = follower_of(
            engine,
            self.reader.config,
            self.reader._state.link.hasher,
            line,  # pyright: ignore[reportArgumentType]
            side.kept,
            lease_s=600.0,
            engine_chains=False,
        )
        self.followers[side.member] = made
        return made

    # The engine

    def say(self, side: Side, *said: Said) -> Message:
        """The engine sends a message, and nobody has got it yet."""
        events: list[dict[str, Any]] = []
        for each in said:
            side.truth.hear(each)
            events.append(self.as_sent(each))
        payload = msgpack.packb([float(next(_stamps)), events, side.rank]) or b""
        message = Message(side.following, said, Frame(side.following, payload))
        side.following += 1
        side.messages[message.seq] = message
        side.waiting.append(message)
        self.keep(side)
        return message

    def keep(self, side: Side) -> None:
        """What the engine can replay is what it says."""
        side.kept.frames = None if side.mute else [side.messages[seq].frame for seq in sorted(side.messages)]

    def as_sent(self, said: Said) -> dict[str, Any]:
        """The event."""
        match said:
            case Clear():
                return {"type": "AllBlocksCleared"}
            case Void(medium):
                return {"type": "BlockRemoved", "block_hashes": ["what?"], "medium": medium}
            case Remove(medium, blocks):
                return {"type": "BlockRemoved", "block_hashes": list(map(key, blocks)), "medium": medium}
            case Store(medium, blocks):
                parent, letters = blocks[0][:-1], [block[-1] for block in blocks]
                return {
                    "type": "BlockStored",
                    "block_hashes": list(map(key, blocks)),
                    "parent_block_hash": key(parent) if parent else None,
                    "token_ids": [letter for letter in letters for _ in range(self.block)],
                    "block_size": self.block,
                    "lora_id": None,
                    "medium": medium,
                    "lora_name": None,
                    "extra_keys": [None] * len(blocks),
                }

    # The follower, and what the oracle makes of what it gets

    def deliver(self, side: Side) -> None:
        """The follower gets all that waits, at once."""
        frames, side.waiting = side.waiting, []
        for message in frames:
            self.hear(side, message)
        self.give(side, [message.frame for message in frames])

    def give(self, side: Side, frames: Sequence[Frame]) -> None:
        """The follower gets these."""
        self.followers[side.member][0].take(frames)

    def hear(self, side: Side, message: Message) -> None:
        """The oracle gets a message that came."""
        if side.last is None or message.seq == side.last + 1:
            self.apply(side, message)
        elif message.seq > side.last:
            wanted = range(side.last, message.seq + 1)
            if not side.mute and all(seq in side.messages for seq in wanted):
                for seq in sorted(side.messages):
                    if seq > side.last:
                        self.apply(side, side.messages[seq])
            else:
                self.anew(side, message)

    def apply(self, side: Side, message: Message) -> None:
        """One message after the other."""
        for said in message.said:
            if isinstance(said, Clear) and (side.known.blocks or side.known.waiting):
                side.void = side.dead = False
            side.known.hear(said)
        side.last = message.seq

    def anew(self, side: Side, message: Message | None = None) -> None:
        """All that was known is worth nothing; what the engine can replay is heard."""
        side.known.forget()
        side.void = side.dead = False
        side.last = None
        if not side.mute:
            for seq in sorted(side.messages):
                if side.last is not None and seq != side.last + 1:
                    side.known.forget()
                self.apply(side, side.messages[seq])
        if message is not None and (side.last is None or side.last < message.seq):
            self.apply(side, message)

    def taken_over(self, side: Side) -> None:
        """Another follower began, from what is written."""
        if side.last is None or side.void:
            self.anew(side)
            return
        side.known.reread()
        if not side.mute and side.last in side.messages:
            if self.halves:
                self.learn(side, side.last)
            rest = [seq for seq in sorted(side.messages) if seq > side.last]
            if rest == list(range(side.last + 1, side.last + 1 + len(rest))):
                for seq in rest:
                    self.apply(side, side.messages[seq])
                return
        self.anew(side)

    def learn(self, side: Side, until: int) -> None:
        """What the engine still has up to there, without a gap, is heard again from after the last clear on."""
        seqs = [until]
        while seqs[0] - 1 in side.messages:
            seqs.insert(0, seqs[0] - 1)
        said = [each for seq in seqs for each in side.messages[seq].said]
        clears = [i for i, each in enumerate(said) if isinstance(each, Clear)]
        for each in said[clears[-1] + 1 if clears else 0 :]:
            side.known.hear(each)

    # What engines do

    @rule(who=WHO, medium=MEDIUM, prompt=LETTERS, cut=st.integers(1, 6), came=st.booleans())
    def prefill(self, who: int, medium: str, prompt: Path, cut: int, came: bool) -> None:
        """An engine stores what it lacks of a prompt, in events of a few blocks."""
        side, said = self.sides[who], list[Said]()
        paths = [prompt[:i] for i in range(1, len(prompt) + 1)]
        missing = [path for path in paths if path not in side.truth.held[medium]]
        row: list[Path] = []
        for path in missing:
            if row and (len(row) == cut or row[-1] != path[:-1]):
                said.append(Store(medium, tuple(row)))
                row = []
            row.append(path)
        if row:
            self.say(side, *said, Store(medium, tuple(row)))
            if came:
                self.deliver(side)

    @rule(who=WHO, letters=st.lists(st.integers(1, 2), min_size=1, max_size=3))
    def decode(self, who: int, letters: list[int]) -> None:
        """An engine grows its longest prompt block by block, a message each."""
        side = self.sides[who]
        counted = side.truth.counted("gpu")
        path = max(counted, key=lambda each: (len(each), each), default=())
        for letter in letters[: 8 - len(path)]:
            path = (*path, letter)
            if path not in side.truth.held["gpu"]:
                self.say(side, Store("gpu", (path,)))
        self.deliver(side)

    @rule(
        who=WHO, medium=MEDIUM, which=st.integers(0, 50), leaf=st.booleans(), many=st.integers(1, 3), came=st.booleans()
    )
    def evict(self, who: int, medium: str, which: int, leaf: bool, many: int, came: bool) -> None:
        """An engine drops blocks: leaves, or any."""
        side = self.sides[who]
        gone: list[Path] = []
        for _ in range(many):
            held = side.truth.held[medium] - set(gone)
            found = sorted(path for path in held if not leaf or not any(other[:-1] == path for other in held))
            if found:
                gone.append(found[which % len(found)])
        if gone:
            self.say(side, Remove(medium, tuple(gone)))
            if came:
                self.deliver(side)

    @rule(who=WHO, medium=MEDIUM, which=st.integers(0, 50), letters=LETTERS)
    def evict_and_refill(self, who: int, medium: str, which: int, letters: Path) -> None:
        """An engine drops a prompt from its end and stores it again, in one message."""
        side = self.sides[who]
        held = sorted(side.truth.counted(medium))
        if held:
            path = held[which % len(held)]
            gone = sorted((each for each in held if each[: len(path)] == path), reverse=True)
            self.say(side, Remove(medium, tuple(gone)), *(Store(medium, (each,)) for each in reversed(gone)))
            self.deliver(side)

    @rule(who=WHO, medium=MEDIUM, path=LETTERS)
    def drop_unknown(self, who: int, medium: str, path: Path) -> None:
        """An engine drops what it does not have."""
        side = self.sides[who]
        if path not in side.truth.held[medium]:
            self.say(side, Remove(medium, (path,)))
            self.deliver(side)

    @rule(who=WHO)
    def clear(self, who: int) -> None:
        """An engine drops everything."""
        side = self.sides[who]
        self.say(side, Clear())
        self.deliver(side)

    @rule(who=WHO, medium=MEDIUM, came=st.booleans())
    def drop_unreadably(self, who: int, medium: str, came: bool) -> None:
        """An engine drops something of a medium, and nobody can read what."""
        side = self.sides[who]
        self.say(side, Void(medium))
        if came:
            self.deliver(side)

    # What happens to messages

    @rule(who=WHO)
    def arrive(self, who: int) -> None:
        """What waited comes."""
        self.deliver(self.sides[who])

    @rule(who=WHO, data=st.data())
    def arrive_in_disorder(self, who: int, data: st.DataObject) -> None:
        """What waited comes in any order, some of it twice."""
        side = self.sides[who]
        frames, side.waiting = side.waiting, []
        order = data.draw(st.permutations([*frames, *frames[:2]]))
        for message in order:
            self.hear(side, message)
        self.give(side, [message.frame for message in order])

    @rule(who=WHO, back=st.integers(0, 20))
    def repeat(self, who: int, back: int) -> None:
        """A message comes that came before: nothing changes, unless the engine has to be asked and tells of more."""
        side = self.sides[who]
        found = [seq for seq in sorted(side.messages) if side.last is not None and seq <= side.last]
        if found and not side.mute and side.last in side.messages:
            follower, _ = self.followers[side.member]
            before = follower.counts["renewed, restarted"]
            self.give(side, [side.messages[found[back % len(found)]].frame])
            assert follower._last is not None
            if follower.counts["renewed, restarted"] > before:
                rest = [seq for seq in sorted(side.messages) if seq > side.last]
                assert rest != list(range(side.last + 1, side.last + 1 + len(rest)))
                self.renewed(side)
            for seq in range((side.last or 0) + 1, follower._last.seq + 1):
                self.apply(side, side.messages[seq])
            side.waiting = [message for message in side.waiting if message.seq > follower._last.seq]

    @rule(who=WHO, count=st.integers(1, 3))
    def lose(self, who: int, count: int) -> None:
        """What waits never comes; the engine still has it."""
        side = self.sides[who]
        del side.waiting[:count]

    @rule(who=WHO, keep=st.integers(1, 4))
    def trim(self, who: int, keep: int) -> None:
        """The engine keeps only its last messages."""
        side = self.sides[who]
        for seq in sorted(side.messages)[:-keep]:
            del side.messages[seq]
        self.keep(side)

    @rule(who=WHO)
    def lose_for_good(self, who: int) -> None:
        """What waits never comes, and the engine has forgotten it, but not what came before."""
        side = self.sides[who]
        for message in side.waiting:
            side.messages.pop(message.seq, None)
        side.waiting.clear()
        self.keep(side)

    @rule(who=WHO)
    def turn(self, who: int) -> None:
        """The engine stops answering, or answers again."""
        side = self.sides[who]
        side.mute = not side.mute
        self.keep(side)

    @rule(who=WHO, above=st.integers(0, 3), again=st.booleans(), told=st.booleans())
    def restart_engine(self, who: int, above: int, again: bool, told: bool) -> None:
        """Another engine is there, and counts from zero or from above the last message."""
        side = self.sides[who]
        side.truth.forget()
        side.old = [*side.old, *(message.frame for message in side.messages.values())][-8:]
        side.messages.clear()
        side.waiting.clear()
        side.following = 0 if again else side.following + above
        self.keep(side)
        self.followers[side.member][0].resume()
        self.anew(side)
        if told:
            self.say(side, Store("gpu", ((1,),)))
            self.deliver(side)

    @precondition(lambda self: any(side.old for side in self.sides))
    @rule(who=WHO, which=st.integers(0, 7))
    def straggle(self, who: int, which: int) -> None:
        """A message of an engine that is no more comes late, when its successor can be asked: nothing of it counts.

        One that has just the next number cannot be told from the successor's own.
        """
        side = self.sides[who]
        late = [frame for frame in side.old if frame.seq != (-1 if side.last is None else side.last) + 1]
        if late and not side.mute and side.messages and side.last is not None:
            self.give(side, [late[which % len(late)]])
            self.renewed(side)

    # What happens to followers

    @rule(who=WHO)
    def crash(self, who: int) -> None:
        """The follower dies; another begins once the right has run out."""
        side = self.sides[who]
        self.let_run_out(side)
        follower, _ = self.open(side)
        assert follower.begin()
        self.taken_over(side)

    def let_run_out(self, side: Side) -> None:
        """The right to write ends."""
        self.admin.hset(self.backend.keys.stream(side.member), "u", 0)

    @rule(who=WHO, calls=st.integers(0, 3), loses_reply=st.booleans(), path=LETTERS, medium=MEDIUM)
    def crash_in_the_middle(self, who: int, calls: int, loses_reply: bool, path: Path, medium: str) -> None:
        """The follower dies while it writes, or before it hears that it has written."""
        side = self.sides[who]
        new = [path[:i] for i in range(1, len(path) + 1) if path[:i] not in side.truth.held[medium]]
        if new and not side.waiting:
            self.say(side, *(Store(medium, (each,)) for each in new))
        line = self.lines[side.member]
        line.left, line.loses_reply = calls, loses_reply
        messages, side.waiting = side.waiting, []
        with suppress(Lost):
            self.give(side, [message.frame for message in messages])
        position = self.admin.hget(self.backend.keys.stream(side.member), "q")
        written = messages and position is not None and int(position) == messages[-1].seq
        self.let_run_out(side)
        follower, _ = self.open(side)
        before = side.known.is_whole
        epochs = (
            self.admin.hget(self.backend.keys.stream(side.member), "p"),
            self.admin.hget(self.backend.keys.epochs, side.member),
        )
        assert follower.begin()
        if epochs[0] != epochs[1] or (side.last is None and not written):
            self.anew(side)
        elif written:
            for message in messages:
                self.hear(side, message)
            self.taken_over(side)
        else:
            self.taken_over(side)
            if not before:
                self.take_over_knowledge(side, follower)
        assert side.last == (None if follower._last is None else follower._last.seq)

    def take_over_knowledge(self, side: Side, follower: Follower) -> None:
        """What was remembered behind holes may or may not have been lost: never more than what was heard."""
        names = {key(path): path for path in all_paths()}
        for medium in MEDIA:
            index = follower.holdings._media.get(medium)
            mask = 0 if index is None else 0xFF << (8 * index)
            found = {names[block.key] for block in follower.holdings._blocks.values() if block.held & mask}
            assert side.known.held[medium] <= found <= side.truth.held[medium]
            side.known.held[medium] = found
        side.known.blurred = {names[block.key] for block in follower.holdings._blocks.values() if block.rest is None}

    @rule(who=WHO, resigns=st.booleans())
    def take_over(self, who: int, resigns: bool) -> None:
        """Another follower stands by until the first one resigns or sleeps; the first one then writes nothing."""
        side = self.sides[who]
        first, journal = self.followers[side.member]
        self.lead(side)
        second, _ = self.open(side)
        assert not second.begin()
        if resigns:
            journal.resign()
        else:
            self.let_run_out(side)
        assert second.begin()
        self.taken_over(side)
        before, epochs = self.backend.dump(), self.admin.hgetall(self.backend.keys.epochs)
        with suppress(FencedError):
            first.take([Frame(10_000, msgpack.packb([0.0, [{"type": "AllBlocksCleared"}], side.rank]) or b"")])
        assert self.backend.dump() == before
        assert self.admin.hgetall(self.backend.keys.epochs) == epochs

    def lead(self, side: Side) -> None:
        """Keep the right to write."""
        assert self.followers[side.member][1].lead() is not None

    # What happens to workers

    @rule(who=WHO)
    def die(self, who: int) -> None:
        """No heartbeat comes, and the lease ends."""
        side = self.sides[who]
        if not side.void:
            now = time.time() * 1000
            self.admin.zadd(self.backend.keys.workers, {side.member: now - 1000})
            side.dead = True

    @rule(who=WHO, others=st.booleans())
    def beat(self, who: int, others: bool) -> None:
        """A follower tells that its engine lives; on the way those who are long dead are made void."""
        side = self.sides[who]
        for other in self.sides:
            if others and other is not side and other.dead:
                self.admin.zadd(self.backend.keys.workers, {other.member: time.time() * 1000 - _LONG_PAST_MS})
        self.followers[side.member][0].heartbeat()
        if side.void:
            self.renewed(side)
            return
        side.dead = False
        for other in self.sides:
            if others and other is not side and other.dead:
                other.dead, other.void = False, True

    @rule(worker=st.sampled_from(["w1", "w2"]))
    def drop(self, worker: str) -> None:
        """Somebody says that the worker is gone."""
        assert self.reader is not None
        self.reader.drop_worker(worker)
        for side in self.sides:
            if side.worker == worker:
                side.dead, side.void = False, True

    @rule()
    def sweep(self) -> None:
        """A reader takes away what counts for nothing."""
        assert self.reader is not None
        self.reader.sweep()

    @rule(dies=st.booleans())
    def flush(self, dies: bool) -> None:
        """Redis loses everything; followers begin anew, or others do."""
        self.remove(f"dp:*{self.backend.namespace}*")
        self.look_again()
        for side in self.sides:
            follower = self.open(side)[0] if dies else self.followers[side.member][0]
            if not dies:
                with suppress(LostHistoryError):  # said once
                    follower.begin()
            assert follower.begin()
            self.renewed(side)

    @precondition(lambda self: all(journal._epoch for _, journal in self.followers.values()))  # else: see below
    @rule()
    def flush_workers(self) -> None:
        """Redis loses what lies in the workers' slot, and keeps the tree."""
        self.remove(f"dp:{{{self.backend.namespace}}}:*")
        self.look_again()
        for side in self.sides:
            self.followers[side.member][0].heartbeat()
            self.renewed(side)

    def look_again(self) -> None:
        """The reader attaches to a namespace that is empty."""
        assert self.reader is not None
        self.reader._state.link.attached = False
        self.reader._state.link.refresh()

    def renewed(self, side: Side) -> None:
        """The follower has asked the engine for all there is: what still waits of it comes a second time."""
        self.anew(side)
        side.waiting = [message for message in side.waiting if side.last is None or message.seq > side.last]

    # What has to be so

    @invariant()
    def answers(self) -> None:
        """The reader is told what the oracle says; the tree is whole, and tells a new follower the same."""
        if self.reader is None or len(self.sides) < len(MEMBERS):
            return
        self.reader.catch_up()
        self.reader._state.link.roster.version = ""
        self.reader._state.link.refresh()
        for prompt in PROMPTS:
            wanted = {
                f"{side.member}@{medium}": chunks
                for side in self.sides
                if not side.void and not side.dead
                for medium in MEDIA
                if (chunks := self.chunks(side.known, medium, prompt))
            }
            tokens = [letter for letter in prompt for _ in range(self.block)]
            found = dict(self.reader.find_longest_cache_hit(tokens).holders)
            assert found == wanted, f"{prompt}: {found}, not {wanted}"
        for side in self.sides:
            if side.last is None or side.last == side.following - 1:
                assert all(side.known.counted(medium) <= side.truth.held[medium] for medium in MEDIA)
            if not side.void:
                follower, journal = self.followers[side.member]
                told: dict[str, set[int]] = {medium: set() for medium in MEDIA}
                for medium, blocks in blocks_of(journal.covered(follower.epoch)):
                    told[medium] |= {each[0] for each in blocks}
                assert told == {medium: set(map(key, side.known.written(medium))) for medium in MEDIA}
        assert self.reader.check_integrity().problems == []

    def chunks(self, known: Known, medium: str, prompt: Path) -> int:
        """Leading chunks of a prompt that are held."""
        counted = known.counted(medium)
        blocks = next((i for i in range(len(prompt), 0, -1) if prompt[:i] in counted), 0)
        return blocks * self.block // CHUNK


def key(path: Path) -> int:
    """The engine's hash of a block."""
    value = 1
    for letter in path:
        value = value * 3 + letter
    return value


def all_paths() -> Iterator[Path]:
    """Every block that there can be."""
    for length in range(1, 9):
        yield from itertools.product((1, 2), repeat=length)


@pytest.mark.parametrize("size", [8, 16, 32])
@short_or_long("examples", 5, 25)
def test_answers_are_the_oracles(real_server: Backend, size: int, examples: int) -> None:
    """Whatever engines, messages, followers and Redis go through, readers are told what an oracle says."""

    class OnThisServer(Histories):
        server = real_server
        block = size

    run_state_machine_as_test(OnThisServer, settings=settings(max_examples=examples, stateful_step_count=25))


def hears(kept: Kept, follower: Follower, *said: list[dict[str, Any]]) -> None:
    """The engine says more, and the follower hears it all."""
    assert kept.frames is not None
    for events in said:
        payload = msgpack.packb([float(next(_stamps)), events, 0]) or b""
        kept.frames.append(Frame(len(kept.frames), payload))
        follower.take(kept.frames[-1:])


def stores(blocks: Sequence[int], letters: Sequence[int]) -> dict[str, Any]:
    """A prompt of one block for each letter."""
    tokens = [letter for letter in letters for _ in range(CHUNK)]
    event = {"type": "BlockStored", "block_hashes": list(blocks), "parent_block_hash": None, "token_ids": tokens}
    more = {"block_size": CHUNK, "lora_id": None, "medium": "gpu", "lora_name": None}
    return event | more | {"extra_keys": [None] * len(blocks)}


def test_what_is_stored_again_while_its_removal_goes_on_stays(real_server: Backend) -> None:
    """A removal that takes more than one call does not take away what was stored in its place meanwhile."""
    kept = Kept([])
    follower, _ = follow(real_server, kept, chunk_size=CHUNK, max_run=1)
    assert follower.begin()
    blocks, letters = range(1, 701), [i % 7 for i in range(700)]
    event = stores(blocks, letters)
    gone = {"type": "BlockRemoved", "block_hashes": list(reversed(blocks)), "medium": "gpu"}
    hears(kept, follower, [event], [gone, event])
    reader = real_server.open("reader", chunk_size=CHUNK, max_run=1, l1_ttl_s=0)
    assert holders(reader, event["token_ids"]) == {"w/0@gpu": 700}


def test_epochs_that_were_lost_are_not_taken_again(real_server: Backend) -> None:
    """After a take-over the new epoch is above the one in the tree, also when Redis has forgotten all epochs."""
    kept = Kept([])
    first, journal = follow(real_server, kept, chunk_size=CHUNK)
    assert first.begin()
    first.resume()
    hears(kept, first, [stores([1], [1])])
    journal.resign()
    second, _ = follow(real_server, kept, chunk_size=CHUNK)
    assert second.begin()
    keys = real_server.keys
    real_server.admin.delete(keys.epochs, keys.workers, keys.version)
    kept.frames = [Frame(5, msgpack.packb([0.0, [stores([9], [9])], 0]) or b"")]
    second.heartbeat()
    reader = real_server.open("reader", chunk_size=CHUNK, l1_ttl_s=0)
    assert [holders(reader, [letter] * CHUNK) for letter in (1, 9)] == [{}, {"w/0@gpu": 1}]


def test_a_take_over_misses_nothing_beside_other_workers(real_server: Backend) -> None:
    """What is read at a take-over is all that was told, although another worker splits nodes meanwhile."""
    kept = Kept([])
    follower, journal = follow(real_server, kept, chunk_size=CHUNK)
    assert follower.begin()
    count = 400
    prompts = [[1000 + i, i, i, i] for i in range(count)]
    hears(kept, follower, [stores(range(4 * i + 1, 4 * i + 5), prompt) for i, prompt in enumerate(prompts)])
    other = real_server.open("other", chunk_size=CHUNK)
    client: Any = journal._client
    calls = itertools.count(1)

    def call(script: str, *args: Any) -> Any:
        reply = Client.call(client, script, *args)
        if script == "census" and (turn := next(calls)) < 4:
            for prompt in prompts[turn::3]:
                other.cache_prefix([letter for letter in (*prompt[:2], 7) for _ in range(CHUNK)])
        return reply

    client.call = call
    try:
        found = {each[0] for _, blocks in blocks_of(journal.covered(follower.epoch)) for each in blocks}
    finally:
        del client.call
    assert found == set(range(1, 4 * count + 1))
