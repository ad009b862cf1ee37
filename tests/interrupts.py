"""Interrupts at chosen places: the exception of a signal handler, raised wherever the interpreter runs such handlers.

CPython looks for signals when a function begins or a generator goes on, when a C function has returned, when a loop
jumps back, and in C functions that wait. Those places are counted, in the package and in all that it calls, and the
exception is raised at one of them: the same places in every run, so that all of them can be tried.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

__all__ = ["Interrupt", "interrupt", "is_interrupted"]

_WAITS = frozenset(
    ("acquire", "connect", "poll", "recv", "recv_into", "recvmsg_into", "send", "sendall", "sendmsg", "sleep")
)
"""C functions that run signal handlers while they wait, and then have done nothing."""


class Interrupt(KeyboardInterrupt):
    """What the handler raises."""


class _Place:
    """Counts places, and raises at one of them."""

    def __init__(self, at: int, kind: type[BaseException]) -> None:
        self.left = at
        self.was_reached = False
        self._kind = kind

    def profile(self, _frame: FrameType, event: str, function: Any) -> None:
        """Functions that begin, C functions that return or wait."""
        name = getattr(function, "__name__", "")
        if event in ("call", "c_return") or (event == "c_call" and name in _WAITS):
            self._pass()

    def trace(self, frame: FrameType, event: str, _: object) -> Any:
        """Loops that jump back, in the package."""
        if event == "call" and "distprefix" in frame.f_code.co_filename and _jumps_back(frame.f_code):
            frame.f_trace_lines = False
            frame.f_trace_opcodes = True
            return self._opcode
        return None

    def _opcode(self, frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode" and frame.f_lasti in _jumps_back(frame.f_code):
            self._pass()
        return self._opcode

    def _pass(self) -> None:
        self.left -= 1
        if self.left == 0:
            self.was_reached = True
            raise self._kind


@lru_cache(None)
def _jumps_back(code: CodeType) -> frozenset[int]:
    return frozenset(each.offset for each in dis.get_instructions(code) if "JUMP_BACKWARD" in each.opname)


def interrupt(call: Callable[[], object], at: int, kind: type[BaseException] = Interrupt) -> bool:
    """Make a call and interrupt it at place number `at`, from 1 on. False when the call ended before."""
    place = _Place(at, kind)
    before = sys.gettrace(), sys.getprofile(), sys.unraisablehook
    trace = place.trace  # kept here: CPython calls them without a reference of its own
    profile = place.profile
    sys.unraisablehook = lambda _: None  # a finalizer swallows what is raised in it
    try:
        sys.settrace(trace)
        sys.setprofile(profile)
        call()
    except kind:
        if not place.was_reached:
            raise
    finally:
        sys.setprofile(before[1])
        sys.settrace(before[0])
        sys.unraisablehook = before[2]
    return place.was_reached


def is_interrupted(lock: Any) -> bool:
    """Whether this thread still holds a lock that no call of it holds any more."""
    owned = getattr(lock, "_is_owned", None)
    return bool(owned()) if owned is not None else bool(lock.locked())
