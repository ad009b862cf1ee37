"""The shard's log as it comes: what L1 must forget. Resumed exactly; when an entry is missing, L1 forgets all."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from distprefix import operations
from distprefix.errors import DamagedNodeError, DistPrefixError, NotAttachedError
from distprefix.l1 import L1
from distprefix.operations import FeedPage
from distprefix.redis.link import Link

__all__ = ["Feed"]

_PAGE = 1000
_CURRENT_S = 1.0
_MAX_PAGES = 64
_HEAD = re.compile(r"[0-9a-f]{32}")


class Feed:
    """Applies the log to L1. Thread-safe: one thread reads at a time, the others wait for it."""

    def __init__(self, link: Link, l1: L1, lock: AbstractContextManager[object], interval_s: float) -> None:
        self.generation = 0
        """Counts what was applied: a reply that was asked for under an older one may be outdated."""
        self.entries = 0
        self.gaps = 0
        """How often entries were missing, and L1 forgot everything."""
        self.failures = 0
        self.read_at = float("-inf")
        """When all there was had been read (time.monotonic)."""
        self._link = link
        self._l1 = l1
        self._current_s = max(_CURRENT_S, 2 * interval_s)
        self._lock = lock
        self._polling = threading.Lock()
        self._created = ""
        self._last = ""
        self._last_entry: dict[str, str] = {}
        self._number = 0
        self._apply: dict[str, Callable[[dict[str, str]], None]] = {
            "removed": lambda entry: l1.forget(_head(entry, "removed")),
            "split": lambda entry: l1.split(_head(entry, "split"), _head(entry, "lower")),
            "trimmed": lambda entry: l1.trim(_head(entry, "trimmed"), max(1, int(entry["size"]))),
            "changed": lambda entry: l1.doubt(_head(entry, "changed")),
        }

    def is_current(self, now: float) -> bool:
        """Whether the log was read lately: within a second, or two intervals of polling when these are longer."""
        return now - self.read_at < self._current_s

    def poll(self) -> bool:
        """Read and apply what is new. One call for every 1,000 entries. Whether Redis answered; never raises."""
        try:
            with self._polling:
                pages = 0
                while self._read():
                    pages += 1
                    if pages == _MAX_PAGES:  # longer than any log is kept
                        self._lost()
        except (NotAttachedError, DamagedNodeError):
            self._lost()
        except DistPrefixError:
            self.failures += 1
            return False
        except (ValueError, KeyError):  # another hand wrote it: what else is missing cannot be known
            self._lost()
        return True

    def look(self) -> None:
        """Learn whether the shard still has what it acknowledged, where no feed is read. One call; never raises."""
        try:
            self._link.publish(operations.feed("", 1))
        except DistPrefixError:
            self.failures += 1

    def distrust_all(self) -> None:
        """L1 forgets everything: what it was told may not have come to pass."""
        with self._lock:
            self.generation += 1
            self._l1.clear()

    def _read(self) -> bool:
        """One page. Returns whether there may be another one."""
        began = time.monotonic()
        page = self._link.publish(operations.feed(self._last, _PAGE))
        if self._created and (page.created != self._created or not self._continues(page)):
            self._lost()
            return True
        if not self._created:
            self._begin(page)
            self.read_at = began
            return False
        new = page.entries if self._last == "0-0" else page.entries[1:]
        with self._lock:
            self.generation += bool(new)  # before: what an interrupt cuts short is applied again
            for _, entry in new:
                apply = next((self._apply[name] for name in entry if name in self._apply), None)
                if apply is not None:
                    apply(entry)
        self.entries += len(new)
        if new:
            (self._last, self._last_entry), self._number = new[-1], self._number + len(new)
        if len(page.entries) < _PAGE:
            self.read_at = began
        return len(page.entries) >= _PAGE

    def _continues(self, page: FeedPage) -> bool:
        """Whether nothing is missing between what was read and what came."""
        entries = page.entries
        if self._last != "0-0":
            if not entries or entries[0] != (self._last, self._last_entry):
                return False
            entries = entries[1:]
        numbers = [int(entry.get("n", "-1")) for _, entry in entries]
        wanted = list(range(self._number + 1, self._number + 1 + len(numbers)))
        complete = len(page.entries) >= _PAGE or page.newest == self._number + len(numbers)
        return numbers == wanted and complete

    def _begin(self, page: FeedPage) -> None:
        """Go on behind what is there. What was learned before may be outdated, and so may replies on their way."""
        self.distrust_all()
        self._number = page.newest
        self._last, self._last_entry = page.entries[-1] if page.entries else ("0-0", {})
        self._created = page.created  # last: an interrupt before it has the log begun again

    def _lost(self) -> None:
        """Entries are missing: L1 forgets everything, now and again when the log is found."""
        self.distrust_all()
        self.gaps += bool(self._created)
        self._created, self._last, self._last_entry, self._number = "", "", {}, 0


def _head(entry: dict[str, str], name: str) -> str:
    """The node that a field of an entry names. Raises ValueError for what names none."""
    head = entry[name]
    if not _HEAD.fullmatch(head):
        raise ValueError(f"{name} names no node")
    return head
