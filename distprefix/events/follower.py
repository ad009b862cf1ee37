"""Following one engine's events: in order, without a gap, each exactly as often as it takes. No Redis, no ZMQ.

What cannot be known is not guessed: where messages are missing and the engine cannot replay them, or where it has
restarted, the worker takes a new epoch, so that nothing older counts, and begins with what the engine still has.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import xxhash

from distprefix.errors import EventFormatError, FencedError, ReplayError, StaleEpochError
from distprefix.events.changes import Change, blocks_of, changes, confirm, confirm_part, reject
from distprefix.events.decode import decode
from distprefix.events.frames import Cleared, Event, Frame, Removed, Stored
from distprefix.events.holdings import Holdings
from distprefix.events.journal import Fate, Journal, Outcome, Position
from distprefix.events.pace import Pace
from distprefix.events.reports import EngineReports

__all__ = ["Follower", "Replays"]

_WRITTEN = (Fate.DONE, Fate.REFUSED)
_IN_PART = (Fate.AGAIN, Fate.PART)
_REMEMBERED = 20_000
"""Messages whose digests are kept: more than an engine replays."""
_TOGETHER = 16_384
"""Changed blocks that are written together, in several calls: prompts that grow in between are told once."""
_RENEWALS = (32, 1.0)
"""New epochs at once, and per second: each makes every router read the roster."""
_REPLAYS = (100, 10.0)
"""Replays at once, and per second."""
_BEATS = (100, 10.0)
"""Heartbeats at once, and per second, where the stream begins anew and needs no new epoch."""
_POSITIONS = (100, 10.0)
"""Writes of nothing but the position at once, and per second."""


class Replays(Protocol):
    """An engine that may be asked for what it sent."""

    def replay(
        self, start: int, timeout_s: float, *, until: int | None = None, keep: Callable[[], object] | None = None
    ) -> Iterator[Frame]:
        """Messages from `start` on, as far as it still has them; none behind `until` is needed. Raises ReplayError.

        `keep` is called at least every second while the engine is waited for.
        """
        ...


class Follower:
    """One stream. Not thread-safe."""

    def __init__(
        self,
        name: str,
        holdings: Holdings,
        journal: Journal,
        engine: Replays,
        *,
        kind: str = "auto",
        is_plain: bool = False,
        rank: int = 0,
        replay_timeout_s: float = 30.0,
        beat_s: float = 3.0,
        clock: Callable[[], float],
        ticks: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts: Counter[str] = Counter()
        """What happened: messages, events, and whatever was lost, by reason."""
        self.holdings = holdings
        self.epoch = 0
        self.lag_s = 0.0
        """How long after the engine made it the last message was applied."""
        self.answered = False
        """Whether the engine replayed all that it had when it was asked last."""
        self.reports = EngineReports(name, ticks)
        """What the engine did wrong, at a limited rate."""
        self._journal = journal
        self._engine = engine
        self._kind = kind
        self._is_plain = is_plain
        self._rank = rank
        self._replay_timeout_s = replay_timeout_s
        self._clock = clock
        self._beats_of_replays = Pace(1, 1 / beat_s, ticks)
        self._last: Position | None = None
        """The last message applied."""
        self._written: Position | None = None
        self._may_be_published = True
        """Whether anything may count under this epoch: then only a new one voids it."""
        self._renewals = Pace(*_RENEWALS, ticks)
        self._replays = Pace(*_REPLAYS, ticks)
        self._positions = Pace(*_POSITIONS, ticks)
        self._beats = Pace(*_BEATS, ticks)
        self._digests: OrderedDict[int, str] = OrderedDict()

    @property
    def position(self) -> Position | None:
        """How far the stream is written."""
        return self._written

    @property
    def is_written(self) -> bool:
        """Whether Redis was told of all that was applied."""
        return self._last == self._written and not any(self.holdings.changed.values())

    def begin(self) -> bool:
        """Take over the stream where it was written to, and apply what the engine sent since. False: another leads.

        Raises UnavailableError and the like when Redis fails: try again.
        """
        lead = self._journal.lead()
        if lead is None:
            return False
        self.holdings.clear()
        self._digests.clear()
        self._last = self._written = lead.position
        self.epoch = lead.epoch
        self._may_be_published = True
        if lead.position is None or lead.epoch != lead.current_epoch or not lead.epoch:
            self._start_over("new" if lead.position is None else "voided")
            return True
        self._remember(lead.position)
        self.holdings.restore_state(lead.state)
        for medium, blocks in blocks_of(self._journal.covered(lead.epoch)):
            self.holdings.restore(medium, blocks)
            self._journal.keep()
        if self.holdings.has_tails:
            self._learn_tails(lead.position)
        self.resume()
        return True

    def resume(self) -> None:
        """The engine is there, for the first time or again: apply what it sent meanwhile, if it still is the same."""
        if self._last is None:
            self._start_over("new")
            return
        try:
            if self._continue():
                return
        except ReplayError as error:
            self.reports.warning("replays_failed", "%s", error)
            self.counts["replays_failed"] += 1
        self._start_over("restarted")

    def take(self, frames: Iterable[Frame]) -> None:
        """Apply live messages, and write what changed."""
        for frame in frames:
            self._take(frame)
            if self._is_much():
                self.write()
        self.write()

    def heartbeat(self) -> None:
        """The engine lives. When the worker was given up meanwhile, begin anew."""
        if not self._is_current():
            self._may_be_published = True  # under the epoch that counts instead
            self._start_over("voided")

    def suspend(self) -> None:
        """The engine does not answer: nothing of it counts until the next heartbeat."""
        try:
            self._journal.suspend(self.epoch)
        except StaleEpochError:
            return  # it does not count anyway

    def write(self) -> None:
        """Tell Redis what changed since it was told last, and with it up to which message that is.

        An engine that clears again and again has to wait here: under a new epoch nothing is published until there may
        be another new epoch, as the next clear would need. So what was cleared is void at once, always.
        """
        if not self._may_be_published and not self._renewals.is_open:
            return
        again = False
        while True:
            batch, complete = changes(self.holdings)
            if again:  # what is told anew would be taken away with what it replaces
                batch, complete = [change for change in batch if not change.publish] or batch, False
            position = self._last if complete and self._last != self._written else None
            if not batch and (position is None or not self._positions.take()):
                return
            self._may_be_published = self._may_be_published or bool(batch)
            outcomes = self._journal.commit(self.epoch, batch, position, self.holdings.state)
            again = any(outcome.fate is Fate.AGAIN for outcome in outcomes)
            for change, outcome in zip(batch, outcomes, strict=False):
                self._note(change, outcome, again=again)
            is_whole = len(outcomes) == len(batch) and all(outcome.fate in _WRITTEN for outcome in outcomes)
            if position is not None and is_whole:
                self._written = position

    def _is_current(self) -> bool:
        """Tell that the engine lives; whether the epoch is the one that counts."""
        load = {"chunks": float(sum(self.holdings.chunks.values())), "blocks": float(len(self.holdings))}
        try:
            self._journal.heartbeat(self.epoch, load | {"lag_s": self.lag_s})
        except StaleEpochError:
            return False
        return True

    def _note(self, change: Change, outcome: Outcome, *, again: bool) -> None:
        """Remember what became of a change; `again`: of any that was written with it, a part is still to be done."""
        self.counts["changes_refused"] += outcome.fate is Fate.REFUSED
        if outcome.fate is Fate.MOVED:
            reject(self.holdings, change)
        elif outcome.fate is Fate.PART and not again:
            if not confirm_part(self.holdings, change, outcome.chunks, outcome.heads):
                self.counts["changes_refused"] += 1
        elif outcome.fate not in _IN_PART and not (again and change.publish):
            confirm(self.holdings, change, outcome.heads)

    def _take(self, frame: Frame) -> None:
        last, digest = self._last, _digest(frame)
        if last is None or frame.seq == last.seq + 1:
            self._apply(frame, digest)
        elif frame.seq <= last.seq:
            known = self._digests.get(frame.seq)
            if known == digest or (known is None and self._is_same()):  # who took over knows no older digests
                self._digests.setdefault(frame.seq, digest)
                self.counts["duplicates"] += 1
            else:
                self._start_over("restarted", frame)
        else:
            self._fill(frame)

    def _fill(self, frame: Frame) -> None:
        """Messages are missing before this one."""
        self.counts["gaps"] += 1
        before = self._last
        try:
            same = self._continue(frame.seq)
        except ReplayError as error:
            self.reports.warning("replays_failed", "%s", error)
            self.counts["replays_failed"] += 1
            same = self._last != before  # what came is whole as far as it goes
        if same and self._last is not None and self._last.seq + 1 >= frame.seq:
            if self._last.seq + 1 == frame.seq:
                self._apply(frame, _digest(frame))
            return
        missing = frame.seq - (self._last.seq if self._last else -1) - 1
        self.counts["messages_lost"] += missing
        self.reports.warning("messages_lost", "%d messages are lost, and the engine cannot replay them", missing)
        self._start_over("lost messages", frame)

    def _is_same(self) -> bool:
        """Whether the engine still has the last message: then what comes late comes from it."""
        try:
            return self._continue()
        except ReplayError:
            return False

    def _continue(self, until: int | None = None) -> bool:
        """Apply what the engine has behind the last message, if it still has that one, and it is the same."""
        last = self._last
        if last is None:
            return False
        self.answered = False
        frames = self._ask(last.seq, until)
        first = next(frames, None)
        if first is None or first.seq != last.seq or _digest(first) != last.digest:
            return False
        for frame in frames:
            if self._last is None or frame.seq != self._last.seq + 1:
                return until is not None and self._last is not None and self._last.seq + 1 >= until
            self._catch_up(frame)
        self.answered = True
        self.write()
        return True

    def _catch_up(self, frame: Frame) -> None:
        """Apply a message that the engine sent again, and say meanwhile that both still live."""
        self._apply(frame, _digest(frame))
        self.counts["replayed"] += 1
        if self._is_much():
            self.write()
        self._journal.keep()
        if self._beats_of_replays.take():
            self._is_current()  # a worker that was given up meanwhile is seen at the next heartbeat

    def _learn_tails(self, until: Position) -> None:
        """Hear again what was written: Redis knows nothing of blocks behind the last full chunk, nor their tokens.

        What is restored already is not changed by it: the last that the engine said of each block is what was written.
        Nothing happens where the engine does not have these messages any more.
        """
        try:
            frames = [frame for frame in self._ask(0) if frame.seq <= until.seq]
        except ReplayError as error:
            self.reports.info("replay", "%s", error)
            return
        if not frames or frames[-1].seq != until.seq or _digest(frames[-1]) != until.digest:
            return
        counts = self.holdings.counts.copy()
        for frame in frames[_start_of_knowledge(frames, self._events_of) :]:
            self._apply_events(self._events_of(frame) or ())
        self.holdings.counts.clear()
        self.holdings.counts.update(counts)

    def _events_of(self, frame: Frame) -> Sequence[Event] | None:
        """What a message tells of this rank; None when it cannot be read."""
        try:
            batch = decode(frame.payload, engine=self._kind, is_plain=self._is_plain)
        except EventFormatError:
            return None
        return batch.events if batch.rank is None or batch.rank == self._rank else ()

    def _start_over(self, reason: str, frame: Frame | None = None) -> None:
        """Nothing that was published counts any more; begin with what the engine still has, or with this message."""
        if self.counts["messages"] or reason != "new":
            self.reports.warning(f"renewed, {reason}", "the stream begins anew: %s", reason)
        self.counts[f"renewed, {reason}"] += 1
        if not self._may_be_published and self._beats.take():
            self._may_be_published = not self._is_current()
        self._void()
        self._last = None
        self._digests.clear()
        self._replay_all()
        if frame is not None and self.answered and self._last is not None:
            if self._digests.get(frame.seq) != _digest(frame):  # all that the engine had sent is in its answer
                self.counts["messages_of_others"] += 1
        elif frame is not None:
            self._take_after_start(frame)
        self.write()

    def _replay_all(self) -> None:
        """Apply what the engine still has, if it answers."""
        self.answered = False
        try:
            for each in self._ask(0):
                last = self._last
                if last is not None and each.seq != last.seq + 1:
                    self.counts["messages_lost"] += each.seq - last.seq - 1
                    self._void()  # what went before may have been dropped in between
                elif last is None and each.seq:
                    self.counts["joined_late"] += 1
                self._catch_up(each)
            self.answered = True
        except ReplayError as error:
            self.reports.info("replay", "%s", error)
            if self._last is not None:  # it ended in the middle: what came is whole as far as it goes
                self.counts["replays_failed"] += 1

    def _take_after_start(self, frame: Frame) -> None:
        """The message that showed that all is different, unless the engine replayed it."""
        last = self._last
        if last is not None and frame.seq <= last.seq and self._digests.get(frame.seq) == _digest(frame):
            return
        if last is not None and frame.seq != last.seq + 1:
            self.counts["messages_lost"] += max(0, frame.seq - last.seq - 1)
            self._void()
        self._apply(frame, _digest(frame))

    def _ask(self, start: int, until: int | None = None) -> Iterator[Frame]:
        """The engine's replay. Raises ReplayError when it was asked too often lately."""
        if not self._replays.take():
            raise ReplayError("The engine was asked for replays too often: it is not asked again for a moment")
        return self._engine.replay(start, self._replay_timeout_s, until=until, keep=self._journal.keep)

    def _clear(self) -> None:
        """The engine holds nothing, or nobody knows what it holds."""
        if len(self.holdings) or self.holdings.parked:
            self._void()

    def _void(self) -> None:
        """Nothing that was told so far counts any more: under a new epoch, unless nothing of it was published."""
        if not self._may_be_published:
            self.holdings.clear()
            return
        if self._journal.lead() is None:  # it was taken over: what counts now is another's
            raise FencedError
        self.holdings.clear()
        self._written = None
        self.epoch = self._journal.renew()
        self._may_be_published = False
        self._renewals.spend()

    def _apply(self, frame: Frame, digest: str) -> None:
        at = self._last.at if self._last else 0.0
        try:
            batch = decode(frame.payload, engine=self._kind, is_plain=self._is_plain)
        except EventFormatError as error:
            self.counts["messages_unreadable"] += 1
            self.reports.warning("messages_unreadable", "message %d: %s", frame.seq, error)
            self._clear()  # it may have told of blocks that are gone
        else:
            at = batch.at
            self.counts["events"] += len(batch.events)
            self.counts["events_unknown"] += batch.unknown
            self.counts["events_malformed"] += batch.malformed
            self.counts["events_unclear"] += batch.unclear
            if batch.rank is not None and batch.rank != self._rank:
                self.counts["events_of_other_ranks"] += len(batch.events)
            else:
                self._apply_events(batch.events)
        self.counts["messages"] += 1
        if at:  # else the engine did not say
            self.lag_s = max(0.0, self._clock() - at)
        self._last = Position(frame.seq, digest, at)
        self._remember(self._last)

    def _apply_events(self, events: Iterable[Stored | Removed | Cleared]) -> None:
        for event in events:
            if isinstance(event, Stored):
                self.holdings.store(event)
            elif isinstance(event, Removed):
                self.holdings.remove(event)
            elif event.medium is None:
                self._clear()
            else:
                self.holdings.void(event.medium)

    def _remember(self, position: Position) -> None:
        self._digests[position.seq] = position.digest
        if len(self._digests) > _REMEMBERED:
            self._digests.popitem(last=False)

    def _is_much(self) -> bool:
        return sum(map(len, self.holdings.changed.values())) > _TOGETHER


def _start_of_knowledge(frames: Sequence[Frame], events_of: Callable[[Frame], Sequence[Event] | None]) -> int:
    """The first message behind which nothing is missing, unreadable or cleared as a whole."""
    start = 0
    for i, frame in enumerate(frames):
        events = events_of(frame)
        if events is None or any(isinstance(event, Cleared) and event.medium is None for event in events):
            start = i + 1
        elif i and frame.seq != frames[i - 1].seq + 1:
            start = i
    return start


def _digest(frame: Frame) -> str:
    return xxhash.xxh3_64_hexdigest(frame.payload)
