"""One thread that does what nobody waits for. It ends with its owner, closed or forgotten."""

from __future__ import annotations

import queue
import sys
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["Background", "Schedule"]


class Schedule:
    """When something was done last, by name. Not thread-safe."""

    def __init__(self) -> None:
        self._due: dict[str, float] = {}

    def is_due(self, task: str, interval_s: float) -> bool:
        """Whether a task that is done so often is to be done now; it counts as done then. Never with 0."""
        now = time.monotonic()
        if not interval_s or now < self._due.get(task, 0.0):
            return False
        self._due[task] = now + interval_s
        return True

    def postpone(self, task: str, delay_s: float) -> None:
        """The task is due in so long, not at once."""
        self._due[task] = time.monotonic() + delay_s

    def hasten(self, task: str) -> None:
        """The task is due now."""
        self._due.pop(task, None)


class _Signals:
    """What the thread waits for. A signal handler or a finalizer may wake it in the middle of another wake."""

    def __init__(self, interval_s: float) -> None:
        self.interval_s = interval_s
        self.ended = False
        self._woken: queue.SimpleQueue[None] = queue.SimpleQueue()  # its put is reentrant, unlike an Event's set

    def wake(self) -> None:
        if self._woken.empty():
            self._woken.put(None)

    def wait(self) -> None:
        try:
            self._woken.get(timeout=self.interval_s)
        except queue.Empty:
            return

    def end(self, _: object = None) -> None:
        self.ended = True
        self.wake()


class Background:
    """Calls a method of `owner` every `interval_s` and whenever it is woken, until stopped or the owner is gone."""

    def __init__(self, owner: Any, method: Callable[[Any], None], interval_s: float) -> None:
        self._signals = _Signals(interval_s)
        arguments = (weakref.ref(owner, self._signals.end), method, self._signals)
        self._thread = threading.Thread(target=_work, args=arguments, name="distprefix", daemon=True)
        self._thread.start()

    def go_on_every(self, interval_s: float) -> None:
        """Call it every so often from now on."""
        self._signals.interval_s = interval_s
        self._signals.wake()

    def wake(self) -> None:
        """Begin a round now."""
        self._signals.wake()

    def stop(self) -> None:
        """Begin no other round, and wait a second for the one that runs; an ending interpreter has no other threads."""
        self._signals.end()
        if threading.current_thread() is not self._thread and not sys.is_finalizing():
            self._thread.join(timeout=1)


def _work(reference: weakref.ref[Any], method: Callable[[Any], None], signals: _Signals) -> None:
    while True:
        signals.wait()
        owner = reference()
        if signals.ended or owner is None:
            return
        method(owner)
        del owner
