"""Ways in which a process ends without closing its cache, or closes it at an odd moment: silent, with its exit code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from distprefix import PrefixCacheOptimizer
from distprefix.background import Background
from distprefix.errors import DistPrefixError
from distprefix.redis import client, connections
from distprefix.redis.embedded import EmbeddedServer
from tests.servers import Backend, Server

_OPEN = """
import atexit, os, signal, sys, threading, time
from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import DistPrefixError
tokens = list(range(64))
cache = PrefixCacheOptimizer(PrefixCacheConfig(
    url=sys.argv[1] or None, namespace=sys.argv[2], worker_id="e", worker_lease_s=10,
    feed_interval_s=0.001, touch_interval_s=0.001, payload_timeout_s=5,
))
cache.cache_prefix(tokens)
assert cache.store(tokens, [bytes(200_000)] * 4) == 4
print(cache.url, flush=True)
def use():
    while True:
        cache.load(tokens)
        cache.cache_prefix(tokens)
        cache.find_longest_cache_hit([1] * 64)
def in_threads(work, daemon):
    threads = [threading.Thread(target=work, daemon=daemon) for _ in range(4)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    return threads
"""
_FINALIZER = """
class Holder:
    def __del__(self):
        cache.find_longest_cache_hit(tokens)
        cache.close()
holder = Holder()
"""
_HANDLER = """
signal.signal(signal.SIGTERM, lambda *_: (cache.close(), sys.exit(4)))
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(60)
"""
_HANDLER_IN_CALLS = """
signal.signal(signal.SIGALRM, lambda *_: (cache.close(), sys.exit(4)))
signal.setitimer(signal.ITIMER_REAL, 0.3)
use()
"""
_CLOSED_UNDER_OTHERS = """
def until_closed():
    try:
        use()
    except DistPrefixError as error:
        assert "closed" in str(error)
threads = in_threads(until_closed, daemon=False)
cache.close()
for thread in threads:
    thread.join()
"""
_FORKED = """
child = os.fork()
if not child:
    os.execv(sys.executable, [sys.executable, "-c", ""])
assert os.waitpid(child, 0)[1] == 0
"""
_ENDINGS = {
    "falls off the end": ("", 0),
    "sys.exit": ("sys.exit(3)", 3),
    "sys.exit in a thread": ("threading.Thread(target=lambda: sys.exit(3)).start()", 0),
    "daemon threads": ("in_threads(use, daemon=True)", 0),
    "exit handler": ("atexit.register(lambda: (cache.find_longest_cache_hit(tokens), cache.load(tokens)))", 0),
    "finalizer": (_FINALIZER, 0),
    "SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(60)", -signal.SIGTERM),
    "SIGTERM handler that closes": (_HANDLER, 4),
    "handler closes in the middle of calls": (_HANDLER_IN_CALLS, 4),
    "closed twice": ("cache.close(); cache.close()", 0),
    "closed by one thread while others use it": (_CLOSED_UNDER_OTHERS, 0),
    "closed by several threads": ("in_threads(cache.close, daemon=False)", 0),
    "forked child": (_FORKED, 0),
}


def _end(code: str, url: str, namespace: str) -> tuple[int, str, str]:
    """Exit code, standard error, and where the shared tree was."""
    done = subprocess.run(
        [sys.executable, "-c", _OPEN + code, url, namespace], capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stderr, done.stdout.strip()


def _comes_true(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 20
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


@pytest.mark.parametrize("ending", _ENDINGS)
def test_a_normal_end_is_silent(real_server: Backend, ending: str) -> None:
    """On a server of others the process ends with its own exit code and nothing on standard error."""
    code, expected = _ENDINGS[ending]
    assert _end(code, real_server.url or "", real_server.namespace)[:2] == (expected, "")


@pytest.mark.parametrize("ending", _ENDINGS)
def test_a_private_server_outlives_all_who_use_it(ending: str) -> None:
    """It answers until the process has ended, so nothing fails and nothing is logged; then it ends with its folder."""
    code, expected = _ENDINGS[ending]
    status, said, url = _end(code, "", "private")
    assert (status, said) == (expected, "")
    assert _comes_true(lambda: not Path(url.removeprefix("unix://")).parent.exists())


def test_a_lease_stays_when_its_worker_ends_without_close(real_server: Backend) -> None:
    """A process that ends without close leaves its lease; one that closes ends it."""
    _end("", real_server.url or "", real_server.namespace)
    admin: Any = real_server.admin
    assert admin.zscore(real_server.keys.workers, "e/0") is not None
    _end("cache.close()", real_server.url or "", real_server.namespace)
    assert admin.zscore(real_server.keys.workers, "e/0") is None


def test_a_forked_child_does_not_keep_a_private_server() -> None:
    """The server ends with the process that started it, also while a child that it forked lives on."""
    code = (
        "if not os.fork():\n    os.close(1)\n    os.close(2)\n    signal.pause()\nos.kill(os.getpid(), signal.SIGKILL)"
    )
    program = _OPEN + "print(os.getpid(), flush=True)\n" + code
    parent = subprocess.Popen(
        [sys.executable, "-c", program, "", "private"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        said, _ = parent.communicate(timeout=60)
        folder = Path(said.split()[0].removeprefix("unix://")).parent
        assert parent.returncode == -signal.SIGKILL
        assert _comes_true(lambda: not folder.exists())
    finally:
        os.killpg(parent.pid, signal.SIGKILL)


def _closes_and_exits(cache: PrefixCacheOptimizer) -> Callable[[int, FrameType | None], None]:
    def handle(_: int, __: FrameType | None) -> None:
        cache.close()
        raise SystemExit(4)

    return handle


def test_a_handler_that_closes_ends_the_call_that_it_interrupts(own_server: Server) -> None:
    """What the handler raises comes out of a look-up that waits for a reply: closing leaves its connection alone."""
    backend = Backend("own", own_server.client(), "endings", url=own_server.url)
    cache = backend.open("w", publish_timeout_s=0.5)  # closing sends what waits
    before = signal.signal(signal.SIGALRM, _closes_and_exits(cache))
    own_server.freeze()
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with pytest.raises(SystemExit):
            cache.find_longest_cache_hit(list(range(64)))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        own_server.thaw()
        backend.admin.close()
    with pytest.raises(DistPrefixError, match="closed"):
        cache.find_longest_cache_hit(list(range(64)))


@pytest.mark.parametrize("held", ["calls", "breaker", "touches", "payloads"])
def test_a_handler_may_close_while_its_own_thread_holds_a_lock(real_server: Backend, held: str) -> None:
    """A signal handler runs in the middle of whatever the thread does: each lock that closing takes is reentrant."""
    cache = real_server.open("w")
    cache.store(list(range(16)), [bytes(100)] * 4)
    cache.find_longest_cache_hit(list(range(16)))
    link = cache._state.link
    locks: dict[str, Any] = {
        "calls": link.publishes._count,
        "breaker": link.breakers.writes._lock,
        "touches": cache._state.outbox.touches._lock,
        "payloads": cache._tiers.payloads.warm.pool._lock,
    }
    with locks[held]:
        cache.close()
    with pytest.raises(DistPrefixError, match="closed"):
        cache.load(list(range(16)))


def test_waking_the_background_is_reentrant() -> None:
    """A finalizer that wakes it in the middle of another wake neither waits nor loses a round."""
    rounds: list[int] = []
    more = threading.Semaphore(0)

    class Owner:
        def work(self) -> None:
            rounds.append(1)
            more.release()

    owner = Owner()
    background = Background(owner, Owner.work, 600.0)
    for _ in range(3):
        background.wake()
        assert more.acquire(timeout=20)
    background.stop()
    background.wake()
    assert len(rounds) == 3


def test_a_connection_interrupted_half_way_is_not_used(real_server: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a connection is made: it is closed, and the next look-up makes another one."""
    cache = real_server.open("w")
    cache.cache_prefix(list(range(16)))
    reader = real_server.open("r")
    connect, left = connections.Parser.on_connect, [KeyboardInterrupt]

    def interrupted(self: Any, connection: Any) -> None:
        if left:
            raise left.pop()
        connect(self, connection)

    monkeypatch.setattr(connections.Parser, "on_connect", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reader.find_longest_cache_hit(list(range(16)))
    assert reader.find_longest_cache_hit(list(range(16))).matched_chunks == 4


def test_numbers_are_sent_as_text() -> None:
    """The serializer of hiredis gets no numbers: it crashes when a signal handler raises while it formats one."""
    assert client._words(("SCRIPT LOAD", "body")) == ["SCRIPT", "LOAD", "body"]
    assert client._words(("EVALSHA", "sha", 1, "key", -7, 2.5, b"x")) == [
        *("EVALSHA", "sha", b"1", "key", b"-7", b"2.5", b"x")
    ]


def test_a_server_is_closed_once() -> None:
    """Closing again does nothing, from whichever thread."""
    server = EmbeddedServer()
    folder = Path(server.socket).parent
    threads = [threading.Thread(target=server.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.close()
    assert not folder.exists()
