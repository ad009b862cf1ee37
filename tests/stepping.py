"""Workers whose commands to servers are run one at a time, in an order that a test picks, each cut short anywhere."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

from distprefix.errors import UnavailableError
from distprefix.redis.client import Client
from distprefix.redis.data import DataPool, WriteError

__all__ = ["KINDS", "WHOLE", "Cut", "every_order", "in_steps", "interleave"]

KINDS = ("killed", "refused", "unanswered", "off")
_WAIT_S = 60


class Cut(NamedTuple):
    """Where a worker is cut short, and how."""

    at: int
    """The command, from 0; below 0 for none."""
    kind: str = "killed"
    """``killed``: the process ends before the command. ``refused``: the command fails and has no effect, as when memory
    is full. ``unanswered``: it has its effect, and fails all the same. ``off``: it and all that follow are refused."""


WHOLE = Cut(-1)


class _KilledError(BaseException):
    """Nothing of the process runs any more."""


class _Worker:
    """One thread that waits before each of its commands."""

    def __init__(self, work: Callable[[], object], cut: Cut) -> None:
        self.result: Any = None
        self.names: list[str] = []
        """Its commands."""
        self._cut = cut
        self._go = threading.Semaphore(0)
        self._back = threading.Semaphore(0)
        self.is_done = False
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self.wait()

    def advance(self) -> None:
        """Let it run its next command, and go on to the one after."""
        self._go.release()
        self.wait()

    def wait(self) -> None:
        """Until it is about to send a command, or is done."""
        assert self._back.acquire(timeout=_WAIT_S)

    def take(self, name: str, act: Callable[[], Any], error: Exception) -> Any:
        """Run a command when its turn comes."""
        self._back.release()
        assert self._go.acquire(timeout=_WAIT_S)
        at = len(self.names)
        self.names.append(name)
        kind = self._cut.kind if at == self._cut.at or (self._cut.kind == "off" and 0 <= self._cut.at < at) else ""
        if kind == "killed":
            raise _KilledError
        if kind in ("refused", "off"):
            raise error
        result = act()
        if kind == "unanswered":
            raise error
        return result

    def _run(self, work: Callable[[], object]) -> None:
        _here.worker = self
        try:
            self.result = work()
        except _KilledError:
            pass
        except UnavailableError as error:
            self.result = error
        finally:
            self.is_done = True
            self._back.release()


_here = threading.local()


def _stepped(real: Any, name: Callable[..., str]) -> Any:
    def call(*args: Any, **options: Any) -> Any:
        worker: _Worker | None = getattr(_here, "worker", None)
        if worker is None:
            return real(*args, **options)
        return worker.take(name(*args), lambda: real(*args, **options), UnavailableError("the test cuts this short"))

    return call


@contextmanager
def in_steps() -> Generator[None]:
    """Have the workers' threads wait before each command, and before each value that they write."""
    write = DataPool.set

    def each(self: DataPool, values: Sequence[Any], deadline: float, **options: Any) -> list[bool]:
        worker: _Worker | None = getattr(_here, "worker", None)
        if worker is None:
            return write(self, values, deadline, **options)
        written: list[bool] = []
        for value in values:

            def act(value: Any = value) -> list[bool]:
                return write(self, [value], deadline, **options)

            error = WriteError("the test cuts this short", [*written, *[False] * (len(values) - len(written))])
            written += worker.take("SET", act, error)
        return written

    with (
        patch.object(Client, "command", _stepped(Client.command, lambda *args: str(args[1]))),
        patch.object(DataPool, "get", _stepped(DataPool.get, lambda *_: "GET")),
        patch.object(DataPool, "delete", _stepped(DataPool.delete, lambda *_: "UNLINK")),
        patch.object(DataPool, "set", each),
    ):
        yield


def interleave(
    works: Sequence[tuple[Callable[[], object], Cut]], order: Sequence[int]
) -> tuple[list[_Worker], list[tuple[int, int]]]:
    """Run workers one command at a time, each next one as `order` picks it among those that are left, then the first.

    Returns them, and at each step which was picked among how many.
    """
    workers = [_Worker(work, cut) for work, cut in works]
    picked: list[tuple[int, int]] = []
    while True:
        left = [worker for worker in workers if not worker.is_done]
        if not left:
            return workers, picked
        which = order[len(picked)] % len(left) if len(picked) < len(order) else 0
        picked.append((which, len(left)))
        left[which].advance()


def every_order(run: Callable[[Sequence[int]], list[tuple[int, int]]]) -> int:
    """Call `run` with every order there is of its steps; it returns what `interleave` picked. Returns how many."""
    todo: list[list[int]] = [[]]
    count = 0
    while todo:
        order = todo.pop()
        picked = run(order)
        count += 1
        for at in range(len(order), len(picked)):
            which, among = picked[at]
            todo += [[*(each for each, _ in picked[:at]), other] for other in range(which + 1, among)]
    return count
