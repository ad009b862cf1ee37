"""The log of what one engine does wrong. A hostile engine writes neither endless lines nor control characters."""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable
from typing import Any

from distprefix.printable import printable

__all__ = ["EngineReports"]

_log = logging.getLogger("distprefix")
_EVERY_S = 30.0
_MAX_CHARACTERS = 300
_MAX_LINES = 40


class EngineReports:
    """Writes the first line of each cause, and then at most one every 30 seconds, with how many were left out.

    Texts among the arguments are escaped and cut. Not thread-safe.
    """

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._name = name
        self._clock = clock
        self._next: dict[str, float] = {}
        """By cause: when a line may be written again."""
        self._left_out: dict[str, int] = {}

    def warning(self, cause: str, message: str, *args: Any) -> None:
        """Log a warning, unless one of this cause was logged within 30 seconds."""
        self._write(logging.WARNING, cause, message, args)

    def info(self, cause: str, message: str, *args: Any) -> None:
        """Log at level INFO, unless one of this cause was logged within 30 seconds."""
        self._write(logging.INFO, cause, message, args)

    def exception(self, cause: str, message: str, *args: Any) -> None:
        """Log an error with its traceback, unless one of this cause was logged within 30 seconds."""
        self._write(logging.ERROR, cause, message, args, with_traceback=True)

    def flush(self) -> None:
        """Say how many lines were left out, for each cause of which a line may be written again."""
        now = self._clock()
        for cause in [cause for cause, due in self._next.items() if now >= due]:
            count = self._left_out.pop(cause, 0)
            del self._next[cause]
            if count:
                self._next[cause] = now + _EVERY_S
                _log.warning("%s: %s: %d more times within %.0f s", self._name, cause, count, _EVERY_S)

    def _write(
        self, level: int, cause: str, message: str, args: tuple[Any, ...], *, with_traceback: bool = False
    ) -> None:
        if self._clock() >= self._next.get(cause, 0.0):
            self.flush()
        if self._clock() < self._next.get(cause, 0.0):
            self._left_out[cause] = self._left_out.get(cause, 0) + 1
            return
        self._next[cause] = self._clock() + _EVERY_S
        safe = [each if isinstance(each, int | float) else printable(str(each), _MAX_CHARACTERS) for each in args]
        _log.log(level, f"%s: {message}{_traceback() if with_traceback else ''}", self._name, *safe)


def _traceback() -> str:
    """The end of the current traceback, escaped line by line: an exception may quote what an engine sent."""
    lines = traceback.format_exc().split("\n")[-_MAX_LINES:]
    return "".join(f"\n  {printable(line, _MAX_CHARACTERS)}" for line in lines).replace("%", "%%")
