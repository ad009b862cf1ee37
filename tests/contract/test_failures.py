"""Redis frozen, killed, refusing, full, answering nonsense or in drips: the cache never stands in the way."""

from __future__ import annotations

import contextlib
import gc
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import UnavailableError
from tests.contract.test_find import prompt
from tests.servers import Server

LOOKUP_S = 0.1
MARGIN_S = 0.1
"""For the scheduler of a busy machine; what is tested against would take seconds or for ever."""


def settings(server: Server, **changes: Any) -> PrefixCacheConfig:
    """Short deadlines, and a breaker that stays closed unless a test wants to see it."""
    defaults: dict[str, Any] = {
        "url": server.url,
        "worker_id": "w1",
        "chunk_size": 4,
        "lookup_timeout_s": LOOKUP_S,
        "publish_timeout_s": 0.3,
        "l1_ttl_s": 0,
        "touch_interval_s": 0,
        "feed_interval_s": 0,
        "breaker_failures": 10_000,
    }
    return PrefixCacheConfig(**{**defaults, **changes})


@pytest.fixture
def cache(own_server: Server) -> Iterator[PrefixCacheOptimizer]:
    """A cache on a server that may fail, with something published."""
    with PrefixCacheOptimizer(settings(own_server)) as opened:
        opened.cache_prefix(prompt(6), range(6))
        assert opened.find_longest_cache_hit(prompt(6)).matched_chunks == 6
        yield opened


def took(action: Callable[[], object]) -> float:
    """Seconds that something takes."""
    began = time.monotonic()
    action()
    return time.monotonic() - began


def wait_until(condition: Callable[[], bool]) -> None:
    """Poll until something holds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.01)


@pytest.mark.parametrize("failure", ["freeze", "kill"])
def test_look_ups_answer_within_their_deadline(own_server: Server, cache: PrefixCacheOptimizer, failure: str) -> None:
    """With the server frozen or dead a look-up returns what L1 has in time, and the failure is counted."""
    getattr(own_server, failure)()
    assert took(lambda: cache.find_longest_cache_hit(prompt(9))) < LOOKUP_S + MARGIN_S
    assert cache.find_longest_cache_hit(prompt(9)).matched_chunks == 6
    assert not cache.find_longest_cache_hit([9] * 40).hit
    assert sum(cache.get_metrics()["redis_failures"].values()) >= 3


def test_the_deadline_covers_hashing(own_server: Server) -> None:
    """A prompt that takes longer to hash than a look-up may take is looked up in part, in time."""
    with PrefixCacheOptimizer(settings(own_server, chunk_size=1)) as cache:
        cache.cache_prefix([7] * 5000)
        assert cache.find_longest_cache_hit([7] * 5000).matched_chunks == 5000
        long = array("I", [7] * 5000 + [8] * 1_000_000)
        assert cache.find_longest_cache_hit(long).matched_chunks == 5000
        own_server.freeze()
        assert took(lambda: cache.find_longest_cache_hit(long)) < LOOKUP_S + MARGIN_S


@pytest.mark.parametrize("value", [b"", b"x:y", b"1", b"1:\xff"])
def test_a_malformed_holder_is_a_clean_miss(own_server: Server, cache: PrefixCacheOptimizer, value: bytes) -> None:
    """Coverage that another hand wrote gives what L1 has, and is counted."""
    admin: Any = own_server.client()
    admin.hset(next(iter(admin.scan_iter(match="dp:*:n:*"))), "h:w9/0@gpu", value)
    assert cache.find_longest_cache_hit(prompt(9)).matched_chunks == 6
    assert cache.get_metrics()["redis_failures"]["DPDAMAGED"] == 1


# Python may say that it closes the sockets itself: nobody else did.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_a_forgotten_cache_ends(own_server: Server) -> None:
    """A cache that nobody closed and nobody holds leaves no thread behind."""
    before = set(threading.enumerate())
    cache = PrefixCacheOptimizer(settings(own_server, touch_interval_s=0.05))
    (thread,) = set(threading.enumerate()) - before
    del cache
    gc.collect()
    wait_until(lambda: not thread.is_alive())


def test_publishes_are_dropped_within_their_deadline(own_server: Server, cache: PrefixCacheOptimizer) -> None:
    """With the server frozen a publish returns in time, is counted as dropped, and stays known to this process."""
    own_server.freeze()
    assert took(lambda: cache.cache_prefix([8] * 20, range(5))) < 0.3 + MARGIN_S
    assert cache.get_metrics()["publishes_dropped"] == 1
    assert cache.get_computed_blocks([8] * 20) == [0, 1, 2, 3, 4]


def test_strict_raises(own_server: Server) -> None:
    """A strict cache says what failed instead of counting it."""
    with PrefixCacheOptimizer(settings(own_server, strict=True)) as cache:
        own_server.freeze()
        with pytest.raises(UnavailableError):
            cache.find_longest_cache_hit(prompt(3))
        with pytest.raises(UnavailableError):
            cache.cache_prefix(prompt(3))


def test_the_breaker_opens_and_recovers(own_server: Server) -> None:
    """After some failures nobody asks any more; when the server is back a probe closes the breaker by itself."""
    changes: dict[str, Any] = {"breaker_failures": 2, "breaker_reset_s": 0.05}
    with PrefixCacheOptimizer(settings(own_server, **changes)) as cache:
        own_server.freeze()
        for _ in range(2):
            cache.find_longest_cache_hit(prompt(3))
        metrics = cache.get_metrics()
        assert (metrics["breakers"]["walk"], metrics["breakers"]["write"]) == ("open", "open")
        assert metrics["breaker_opened"] == 2
        cache.find_longest_cache_hit(prompt(3))
        own_server.thaw()
        wait_until(lambda: cache.find_longest_cache_hit(prompt(3)).redis_calls > 0 and _state(cache) == "closed")
        wait_until(lambda: bool(cache.cache_prefix(prompt(3))) and cache.health().ok)


def _state(cache: PrefixCacheOptimizer) -> str:
    return str(cache.get_metrics()["breakers"]["walk"])


def test_an_open_breaker_asks_nobody(own_server: Server) -> None:
    """While the breaker is open look-ups and publishes send nothing."""
    with PrefixCacheOptimizer(settings(own_server, breaker_failures=1, breaker_reset_s=3600)) as cache:
        own_server.kill()
        cache.find_longest_cache_hit(prompt(3))
        calls = cache.get_metrics()["redis_calls_lookup"]
        for _ in range(5):
            cache.find_longest_cache_hit(prompt(3))
            cache.cache_prefix(prompt(3))
        assert cache.get_metrics()["redis_calls_lookup"] == calls
        assert cache.get_metrics()["redis_failures"]["breaker open"] >= 10


def test_a_restarted_server_is_attached_again(own_server: Server, cache: PrefixCacheOptimizer) -> None:
    """A server that comes back empty is used again, without an error and without opening the cache anew."""
    own_server.restart()

    def published() -> bool:
        dropped = cache.get_metrics()["publishes_dropped"]
        cache.cache_prefix(prompt(6), range(6))
        return cache.get_metrics()["publishes_dropped"] == dropped

    wait_until(published)
    with PrefixCacheOptimizer(settings(own_server, worker_id="w2")) as other:
        assert other.find_longest_cache_hit(prompt(6)).matched_chunks == 6


def test_a_full_server_still_answers(own_server: Server, cache: PrefixCacheOptimizer) -> None:
    """At maxmemory publishes are dropped and counted; look-ups, removals, leases and eviction work."""
    with own_server.client() as admin:
        admin.config_set("maxmemory-policy", "noeviction")
        admin.config_set("maxmemory", "1mb")
        cache.cache_prefix([7] * 40)
        metrics = cache.get_metrics()
        assert (metrics["publishes_dropped"], metrics["redis_failures"], metrics["breakers"]["write"]) == (
            1,
            {"out of memory": 1},
            "closed",
        )
        assert cache.find_longest_cache_hit(prompt(6)).matched_chunks == 6
        assert cache.remove_skipped_blocks([4]) == 1
        assert cache.find_longest_cache_hit(prompt(6)).matched_chunks == 4
        small = PrefixCacheConfig(url=own_server.url, worker_id="w2", chunk_size=4, l2_max_chunks=2, high_watermark=1.0)
        with PrefixCacheOptimizer(replace(small, low_watermark=1.0)) as evicting:
            with cache.find_longest_cache_hit(prompt(6)).lease(60) as lease:
                assert lease.active
                assert evicting.maintain().chunks == 0
            assert evicting.maintain().chunks == 2
        assert cache.find_longest_cache_hit(prompt(6)).matched_chunks == 2
        admin.config_set("maxmemory", "0")
    cache.cache_prefix([7] * 40)
    assert cache.get_metrics()["publishes_dropped"] == 1


def test_retractions_are_kept_until_redis_is_back(own_server: Server, cache: PrefixCacheOptimizer) -> None:
    """Blocks taken back while Redis is away are taken back there later, before anything new is published."""
    own_server.freeze()
    assert cache.remove_skipped_blocks([3]) == 1
    assert cache.get_metrics()["retractions_waiting"] == 1
    own_server.thaw()
    cache.flush()
    assert cache.get_metrics()["retractions_waiting"] == 0
    with PrefixCacheOptimizer(settings(own_server, worker_id="w2")) as other:
        assert other.find_longest_cache_hit(prompt(6)).matched_chunks == 3


def test_errors_are_misses(own_server: Server, cache: PrefixCacheOptimizer) -> None:
    """A server that refuses every script gives misses and dropped publishes, counted."""
    with own_server.client() as admin:
        admin.execute_command("ACL", "SETUSER", "default", "-evalsha", "-evalsha_ro")
        assert not cache.find_longest_cache_hit([6] * 8).hit
        cache.cache_prefix([6] * 8)
    assert cache.get_metrics()["publishes_dropped"] == 1
    assert cache.get_metrics()["redis_failures"]["permission"] == 2


class Impostor:
    """A TCP proxy in front of a server that can begin to drip or to talk nonsense."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.mode = "pass"
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"redis://127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets = [self._listener]
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(("127.0.0.1", self._server.port))
            self._sockets += [near, far]
            for work in ((near, far, self._copy), (far, near, self._reply)):
                thread = threading.Thread(target=work[2], args=work[:2], daemon=True)
                self._threads.append(thread)
                thread.start()

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                target.sendall(data)
        except OSError:
            return

    def _reply(self, source: socket.socket, target: socket.socket) -> None:
        try:
            while data := source.recv(65536):
                if self.mode == "pass":
                    target.sendall(data)
                elif self.mode == "nonsense":
                    target.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                else:
                    for i in range(len(data)):
                        target.sendall(data[i : i + 1])
                        time.sleep(0.02)
        except OSError:
            return

    def close(self) -> None:
        """Close all sockets and end the threads."""
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join(timeout=5)


@pytest.fixture
def impostor(own_server: Server) -> Iterator[Impostor]:
    """A proxy in front of a server."""
    proxy = Impostor(own_server)
    yield proxy
    proxy.close()


@pytest.mark.parametrize("mode", ["drip", "nonsense"])
@pytest.mark.parametrize("connected", [True, False])
def test_drips_and_nonsense_end_with_the_deadline(
    own_server: Server, impostor: Impostor, mode: str, connected: bool
) -> None:
    """A reply that comes a byte every 20 ms, or is none, does not hold a look-up over its deadline."""
    with PrefixCacheOptimizer(settings(own_server, url=impostor.url)) as cache:
        cache.cache_prefix(prompt(6))
        if connected:
            cache.find_longest_cache_hit(prompt(6))
        impostor.mode = mode
        results: list[Any] = []
        seconds = took(lambda: results.append(cache.find_longest_cache_hit(prompt(9))))
        assert seconds < LOOKUP_S + MARGIN_S
        assert sum(cache.get_metrics()["redis_failures"].values()) >= 1
        assert results[0].matched_chunks == 6
        assert took(lambda: cache.cache_prefix(prompt(8))) < 0.3 + MARGIN_S
        impostor.mode = "pass"
        assert cache.find_longest_cache_hit(prompt(9)).redis_calls == 1


_FORK = """
import os, sys
from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import ForkedProcessError
cache = PrefixCacheOptimizer(PrefixCacheConfig(url=sys.argv[1], chunk_size=4, worker_id="forked"))
cache.cache_prefix(list(range(16)))
child = os.fork()
if child == 0:
    code = 1
    try:
        cache.find_longest_cache_hit(list(range(16)))
    except ForkedProcessError:
        own = PrefixCacheOptimizer(PrefixCacheConfig(url=sys.argv[1], chunk_size=4, worker_id="child"))
        code = 0 if own.find_longest_cache_hit(list(range(16))).matched_chunks == 4 else 2
        own.close()
        cache.close()
    os._exit(code)
_, status = os.waitpid(child, 0)
assert cache.find_longest_cache_hit(list(range(16))).matched_chunks == 4
cache.close()
sys.exit(os.waitstatus_to_exitcode(status))
"""


def test_a_forked_child_is_refused(own_server: Server) -> None:
    """A cache opened before a fork refuses to work in the child, which can open its own; the parent goes on."""
    done = subprocess.run(
        [sys.executable, "-c", _FORK, own_server.url], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_the_background_goes_on_whatever_it_meets(own_server: Server) -> None:
    """A round that fails is counted and the next one comes, and what another hand wrote among the epochs is skipped."""
    with PrefixCacheOptimizer(settings(own_server, touch_interval_s=0.02)) as cache:
        admin: Any = own_server.client()
        admin.hset("dp:{default}:epochs", "w9", "garbage")
        check, failed = cache._state.outbox.send, [False]

        def fail_once() -> None:
            if not failed[0]:
                failed[0] = True
                raise RuntimeError("once")
            check()

        cache._state.outbox.send = fail_once
        wait_until(lambda: cache.get_metrics()["background_errors"] == 1)
        cache.cache_prefix(prompt(3))
        cache.find_longest_cache_hit(prompt(3))
        wait_until(lambda: any(int(admin.hget(key, "n")) for key in admin.scan_iter(match="dp:*:n:*")))


def test_one_damaged_key_does_not_open_the_breaker(own_server: Server) -> None:
    """A node that another hand made something else is nobody's reason to leave the server alone."""
    with PrefixCacheOptimizer(settings(own_server, breaker_failures=2)) as cache:
        cache.cache_prefix(prompt(3))
        cache.cache_prefix([9] * 12)
        admin: Any = own_server.client()
        heads = [key for key in admin.scan_iter(match="dp:*:n:*") if admin.hget(key, "n")]
        damaged = next(key for key in heads if key.endswith(heads[0][-8:]))
        admin.delete(damaged)
        admin.set(damaged, "x")
        for tokens in (prompt(3), [9] * 12) * 3:
            cache.cache_prefix(tokens)
        assert set(cache.get_metrics()["breakers"].values()) == {"closed"}
        assert cache.get_metrics()["publishes_dropped"] >= 1


def test_a_forked_child_cannot_use_the_parents_leases(own_server: Server) -> None:
    """Releasing a lease in a forked child raises, and the parent's connections stay its own."""
    program = f"""
import os, sys
from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import ForkedProcessError
with PrefixCacheOptimizer(PrefixCacheConfig(url={own_server.url!r}, chunk_size=4)) as cache:
    cache.cache_prefix(list(range(16)))
    lease = cache.find_longest_cache_hit(list(range(16))).lease(60)
    child = os.fork()
    if child == 0:
        try:
            lease.release()
        except ForkedProcessError:
            os._exit(7)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert cache.find_longest_cache_hit(list(range(16))).hit
    sys.exit(0 if os.waitstatus_to_exitcode(status) == 7 else 1)
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_threads_share_a_cache(own_server: Server) -> None:
    """Eight threads publish and look up at once under a small L1: none sees too much, and all is there afterwards."""
    changes: dict[str, Any] = {"lookup_timeout_s": 30, "publish_timeout_s": 30, "strict": True, "max_run": 8}
    errors: list[BaseException] = []
    with PrefixCacheOptimizer(settings(own_server, l1_max_bytes=40_000, **changes)) as cache:

        def work(number: int) -> None:
            try:
                for i in range(40):
                    tokens = prompt(4 + (i * 7 + number) % 30, tail=1 + i % 5)
                    cache.cache_prefix(tokens)
                    result = cache.find_longest_cache_hit([*tokens, number])
                    assert 0 < result.matched_chunks <= len(tokens) // 4
                    cache.get_metrics()
            except BaseException as error:  # noqa: BLE001 - told by the test
                errors.append(error)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert errors == []
        for number in range(8):
            for i in range(40):
                tokens = prompt(4 + (i * 7 + number) % 30, tail=1 + i % 5)
                assert cache.find_longest_cache_hit([*tokens, number]).matched_chunks == len(tokens) // 4
        assert cache.check_integrity().problems == []
