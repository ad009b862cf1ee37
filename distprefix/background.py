"""One thread that does what nobody waits for. It ends with its owner, closed or forgotten."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["Background"]


class Background:
    """Calls a method of `owner` every `interval_s`, until it is stopped or the owner is gone."""

    def __init__(self, owner: Any, method: Callable[[Any], None], interval_s: float) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_work, args=(weakref.ref(owner, lambda _: self._stop.set()), method, interval_s, self._stop)
        )
        self._thread.name = "distprefix"
        self._thread.daemon = True
        self._thread.start()

    def stop(self) -> None:
        """Begin no other round, and wait a second for the one that runs."""
        self._stop.set()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=1)


def _work(reference: weakref.ref[Any], method: Callable[[Any], None], interval_s: float, stop: threading.Event) -> None:
    while not stop.wait(interval_s):
        owner = reference()
        if owner is None:
            return
        method(owner)
        del owner
