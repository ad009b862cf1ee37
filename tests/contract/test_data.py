"""The data path: bytes come back as they went in, or a clean error in time, whatever the server does."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import tracemalloc
from array import array
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from distprefix.errors import ConfigError, ForkedProcessError, InvalidInputError, UnavailableError
from distprefix.redis.data import REFUSED, DataPool, WriteError
from tests.servers import Server, find_server
from tests.values import MIB, Into, fake, noise, read, saying, skip_all, soon

MARGIN_S = 0.3
REAL = ("redis-7.0", "redis-8.2", "valkey-9.1")


@pytest.fixture
def pool(own_server: Server) -> Iterator[DataPool]:
    """A pool on a server that the test may harm."""
    opened = DataPool(own_server.url, timeout_s=5)
    yield opened
    opened.close()


@pytest.mark.parametrize("tcp", [False, True])
@pytest.mark.parametrize("name", REAL)
def test_bytes_come_back(name: str, tcp: bool) -> None:
    """On every server, values of any size, from several buffers into several views, come back as they went in."""
    server = Server(find_server(name), tcp=tcp).start()
    pool = DataPool(server.url, timeout_s=5)
    try:
        sizes = [0, 1, 4085, 4096, 65536, 262_144, 262_145, 2 * MIB + 3, 9 * MIB]
        data = {f"k{size}": noise(size)[:size] for size in sizes}
        values = [(key, [v[: len(v) // 3], b"", memoryview(v)[len(v) // 3 :]]) for key, v in data.items()]
        assert pool.set(values, soon()) == [True] * len(sizes)
        for views in (1, 2, 700):
            sink = Into(views)
            keys = [key for key in data for key in (key, "missing")]
            lengths = pool.get(keys, sink, soon())
            assert lengths == [length for size in sizes for length in (size, -1)]
            assert [bytes(sink.found[2 * i]) for i in range(len(sizes))] == list(data.values())
        assert pool.bytes_out > sum(sizes)
        assert pool.bytes_in > 3 * sum(sizes)
        assert (pool.calls, pool.failures) == (4, {})
        assert pool.delete([*data, "missing"], soon()) == len(sizes)
        assert read(pool, *data) == [None] * len(sizes)
    finally:
        pool.close()
        server.stop()


def test_many_small_values_in_one_call(pool: DataPool) -> None:
    """Thousands of values in one call, with missing ones among them, stay in their places."""
    keys = [f"k{i}" for i in range(3000)]
    assert all(pool.set([(key, [key.encode()]) for key in keys[::2]], soon()))
    assert read(pool, *keys) == [key.encode() if i % 2 == 0 else None for i, key in enumerate(keys)]
    assert pool.delete(keys, soon()) == 1500


def test_nothing_asked_nothing_opened(own_server: Server) -> None:
    """A pool connects when it is first needed, not before, and not for empty calls."""
    own_server.kill()
    pool = DataPool(own_server.url, timeout_s=1)
    assert (pool.get([], skip_all, soon()), pool.set([], soon()), pool.delete([], soon())) == ([], [], 0)
    with pytest.raises(UnavailableError, match="refused"):
        read(pool, "a")
    assert pool.failures == {"connect": 1}


def test_what_the_sink_skips_is_drained(pool: DataPool) -> None:
    """Skipped values are read and forgotten, and the same connection goes on with the next one."""
    values = [(f"k{i}", [noise(size)[:size]]) for i, size in enumerate([10, MIB, 5000, 3 * MIB, 0])]
    pool.set(values, soon())
    sink = Into()
    lengths = pool.get([key for key, _ in values], lambda i, n: sink(i, n) if i == 2 else None, soon())
    assert lengths == [10, MIB, 5000, 3 * MIB, 0]
    assert sink.found[2] == values[2][1][0]
    assert len(pool._idle) == 1


def test_only_new_and_ttl(own_server: Server, pool: DataPool) -> None:
    """With only_new what is there stays and is told; a time to live is set in milliseconds."""
    assert pool.set([("a", [b"1"]), ("b", [b"2"])], soon(), ttl_ms=60_000) == [True, True]
    assert pool.set([("b", [b"3"]), ("c", [b"4"])], soon(), only_new=True) == [False, True]
    assert pool.set([("c", [b"5"]), ("d", [b"6"])], soon(), only_new=True, ttl_ms=60_000) == [False, True]
    assert read(pool, "a", "b", "c", "d") == [b"1", b"2", b"4", b"6"]
    with own_server.client() as admin:
        times: list[Any] = [admin.pttl(key) for key in "abcd"]
    assert [time > 0 for time in times] == [True, True, False, True]


def test_wrong_arguments(pool: DataPool) -> None:
    """What cannot be written is refused before anything is sent."""
    with pytest.raises(InvalidInputError, match="ttl_ms"):
        pool.set([("a", [b"1"])], soon(), ttl_ms=0)
    with pytest.raises(InvalidInputError, match="contiguous"):
        pool.set([("a", [memoryview(b"123456")[::2]])], soon())
    huge = memoryview(bytearray(MIB))
    with pytest.raises(InvalidInputError, match="536870912"):
        pool.set([("a", [huge] * 513)], soon())
    assert pool.set([("a", [memoryview(array("I", [1, 2]))])], soon()) == [True]
    assert pool.calls == 1


@pytest.mark.parametrize("views", [[], [memoryview(b"123")], [memoryview(bytearray(2))], [memoryview(bytearray(4))]])
def test_a_wrong_sink(pool: DataPool, views: Sequence[memoryview]) -> None:
    """Views that are not what the value needs raise; the connection with the value in it is not used again."""
    pool.set([("a", [b"123"])], soon())
    with pytest.raises(InvalidInputError, match="sink"):
        pool.get(["a"], lambda _i, _n: views, soon())
    assert pool._idle == []
    assert read(pool, "a") == [b"123"]


def test_a_failing_sink(pool: DataPool) -> None:
    """What the sink raises reaches the caller, OSError too, and the connection is not used again."""

    def sink(index: int, length: int) -> None:
        raise OSError("disk full")

    pool.set([("a", [b"123"])], soon())
    with pytest.raises(OSError, match="disk full"):
        pool.get(["a", "a"], sink, soon())
    assert pool._idle == []
    assert read(pool, "a") == [b"123"]


def test_a_key_of_another_type(own_server: Server, pool: DataPool) -> None:
    """A key that holds no string cannot be read, and is counted; the others are read on the same connection."""
    with own_server.client() as admin:
        admin.hset("h", "f", "v")
    pool.set([("a", [b"1"])], soon())
    assert read(pool, "a", "h", "a") == [b"1", None, b"1"]
    assert pool.failures == {"wrongtype": 1}
    assert len(pool._idle) == 1


def test_password_and_database(own_server: Server) -> None:
    """User, password and database of the URL are used; a wrong password, or none, is an error in the first call."""
    own_server.kill()
    own_server._command += ["--requirepass", "s%cret"]
    own_server.log_in_as("default", "s%cret")
    own_server.start()
    where = f"127.0.0.1:{own_server.port}"
    for credentials in ("default:s%25cret@", ":s%25cret@"):
        pool = DataPool(f"redis://{credentials}{where}/3", timeout_s=5)
        assert pool.set([("a", [b"1"])], soon()) == [True]
        pool.close()
    with own_server.client() as admin:
        admin.select(3)
        assert admin.get("a") == b"1"
    for credentials in ("default:wrong@", ""):
        pool = DataPool(f"redis://{credentials}{where}", timeout_s=5)
        if credentials:
            with pytest.raises(UnavailableError, match="WRONGPASS"):
                read(pool, "a")
        else:
            assert pool.get(["a"], skip_all, soon()) == [REFUSED]
        with pytest.raises(WriteError) as raised:
            pool.set([("a", [b"1"])], soon())
        assert raised.value.written == [False]
        assert pool.failures == {"auth": 2}
        pool.close()
    pool = DataPool(f"unix://:s%25cret@{own_server.socket}?db=3", timeout_s=5)
    assert read(pool, "a") == [b"1"]
    pool.close()


def test_what_the_user_may_not(own_server: Server) -> None:
    """That a value may not be read does not mean that it is not there; a write that is not permitted raises."""
    with own_server.client() as admin:
        admin.execute_command("ACL", "SETUSER", "reader", "on", ">pw", "~a*", "+get")
    pool = DataPool(f"redis://reader:pw@127.0.0.1:{own_server.port}", timeout_s=5)
    assert pool.get(["a1", "a2"], skip_all, soon()) == [-1, -1]
    assert pool.get(["a1", "b1", "a2"], skip_all, soon()) == [-1, REFUSED, -1]
    with pytest.raises(WriteError, match="NOPERM"):
        pool.set([("a1", [b"1"])], soon())
    with pytest.raises(UnavailableError, match="NOPERM"):
        pool.delete(["a1"], soon())
    assert pool.failures == {"permission": 3}
    assert len(pool._idle) == 1
    pool.close()


def test_a_full_server(own_server: Server, pool: DataPool) -> None:
    """At maxmemory a write raises and says what was written; the connection is in order and reads go on."""
    with own_server.client() as admin:
        admin.config_set("maxmemory", str(12 * MIB))
        values = [(f"k{i}", [noise(2 * MIB)[: 2 * MIB]]) for i in range(12)]
        with pytest.raises(WriteError, match="OOM") as raised:
            pool.set(values, soon())
        assert raised.value.written == [admin.exists(key) == 1 for key, _ in values]
        assert 1 < sum(raised.value.written) < 8
    assert pool.failures == {"out of memory": 1}
    assert len(pool._idle) == 1
    assert read(pool, "k0") == [values[0][1][0]]


@pytest.mark.parametrize("action", ["get", "set", "delete"])
def test_a_frozen_server(own_server: Server, pool: DataPool, action: str) -> None:
    """With the server frozen every call ends at its deadline, as does the wait for a new connection's greeting."""
    pool.set([("a", [b"1"])], soon())
    value = noise(32 * MIB)
    actions: dict[str, Callable[[], object]] = {
        "get": lambda: read(pool, "a", seconds=0.2),
        "set": lambda: pool.set([("a", [value])], soon(0.2)),
        "delete": lambda: pool.delete(["a"], soon(0.2)),
    }
    own_server.freeze()
    for _ in range(2):
        began = time.monotonic()
        with pytest.raises(UnavailableError):
            actions[action]()
        assert 0.15 < time.monotonic() - began < 0.2 + MARGIN_S
    assert pool.failures == {"timeout": 2}
    assert pool._idle == []
    own_server.thaw()
    assert pool.set([("a", [b"2"])], soon()) == [True]
    assert read(pool, "a") == [b"2"]


def test_a_deadline_that_is_over(pool: DataPool) -> None:
    """Nothing is sent after the deadline, on a new connection or on one that rests."""
    for _ in range(2):
        with pytest.raises(UnavailableError):
            pool.set([("a", [b"1"])], time.monotonic() - 1)
        assert read(pool, "a") == [None]


@pytest.mark.parametrize("head", [b"", b"$1000000\r\n", b"$100000\r\n"])
def test_a_trickling_server(head: bytes) -> None:
    """A server that sends a byte now and then does not hold a call beyond its deadline."""

    def talk(accepted: socket.socket) -> None:
        accepted.recv(1000)
        accepted.sendall(head)
        while True:
            accepted.sendall(b"7")
            time.sleep(0.01)

    with fake(talk) as (_, pool):
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="in time"):
            read(pool, "a", seconds=0.3)
        assert 0.25 < time.monotonic() - began < 0.3 + MARGIN_S
        assert pool._idle == []


def test_a_server_that_reads_slowly() -> None:
    """A server that takes a few bytes now and then does not hold a write beyond its deadline."""

    def talk(accepted: socket.socket) -> None:
        for _ in range(60):
            accepted.recv(1000)
            time.sleep(0.01)

    with fake(talk) as (_, pool):
        began = time.monotonic()
        with pytest.raises(WriteError, match="in time"):
            pool.set([("a", [noise(32 * MIB)])], soon(0.3))
        assert 0.25 < time.monotonic() - began < 0.3 + MARGIN_S
        pool.close()


@pytest.mark.parametrize(
    "answer",
    [
        *(b"$-2\r\n", b"$536870913\r\n", b"$abc\r\n", b"$" + b"9" * 30 + b"\r\n", b"$+5\r\n", b"$ 5\r\n", b"$\r\n"),
        *(b":5\r\n", b"*1\r\n$1\r\na\r\n", b"+OK\r\n", b"\r\n", b"HTTP/1.1 400 Bad Request\r\n", b"x" * 10_000),
        *(b"$5\r\nabcdeXY", b"$3\r\nabcdef\r\n", b"$5\r\nabc\r\n$1\r\n", b"$5\r\nabcde\n\r", "$\u0665\r\n".encode()),
        *(b"$70000\r\n" + b"a" * 70_000 + b"b\r\n", b"$300000\r\n" + b"a" * 300_000 + b"bc"),
    ],
)
@pytest.mark.parametrize("wanted", [True, False])
def test_garbage(answer: bytes, wanted: bool) -> None:
    """What is no value of the announced length ends the call and the connection, also where it would be skipped."""
    with fake(saying(answer)) as (server, pool):
        for _ in range(2):
            with pytest.raises(UnavailableError, match="server"):
                pool.get(["a"], Into() if wanted else skip_all, soon())
        assert pool.failures == {"protocol": 2}
        assert (server.connections, pool._idle) == (2, [])


@pytest.mark.parametrize(
    "answer", [b"", b"$5", b"$5\r\n", b"$5\r\nab", b"$5\r\nabcde\r", b"$300000\r\n" + b"a" * 99_999]
)
@pytest.mark.parametrize("wanted", [True, False])
def test_a_server_that_closes(answer: bytes, wanted: bool) -> None:
    """A connection that ends anywhere in a reply ends the call at once."""
    with fake(saying(answer, stay=False)) as (_, pool):
        with pytest.raises(UnavailableError, match=r"closed|closing|reset"):
            pool.get(["a"], Into() if wanted else skip_all, soon())
        assert (pool.failures, pool._idle) == ({"connection": 1}, [])


def test_a_server_that_closes_in_mid_write() -> None:
    """A connection that ends while a value is written raises, and says what is known to be written."""

    def talk(accepted: socket.socket) -> None:
        accepted.recv(200_000)
        accepted.sendall(b"+OK\r\n")
        time.sleep(0.1)

    with fake(talk) as (_, pool), pytest.raises(WriteError) as raised:
        pool.set([("a", [b"1"]), ("b", [noise(32 * MIB)]), ("c", [b"1"])], soon())
    assert raised.value.written in ([True, False, False], [False] * 3)  # a reset may overtake the reply


@pytest.mark.parametrize("answer", [b"$-1\r\n", b"_\r\n", b"*-1\r\n"])
def test_nulls(answer: bytes) -> None:
    """Every null of RESP2 and RESP3 means that there is no value, and for SET that nothing was written."""
    with fake(saying(answer * 2, answer)) as (_, pool):
        assert read(pool, "a", "b") == [None, None]
        assert pool.set([("a", [b"1"])], soon(), only_new=True) == [False]


def test_an_error_in_the_middle() -> None:
    """An error of one key leaves the others in their places; after one of the server no other value counts."""
    replies = [b"$1\r\na\r\n", b"-ERR no such thing\r\n", b"$2\r\nbc\r\n"]
    replies += [b"$1\r\na\r\n", b"-LOADING wait\r\n", b"$2\r\nbc\r\n", b"$1\r\nz\r\n"]

    def talk(accepted: socket.socket) -> None:
        while got := accepted.recv(65536):
            for _ in range(got.count(b"GET")):
                accepted.sendall(replies.pop(0))

    with fake(talk) as (server, pool):
        assert read(pool, "1", "2", "3") == [b"a", None, b"bc"]
        assert read(pool, "1", "2", "3") == [b"a", None, None]
        assert read(pool, "1") == [b"z"]
        assert (server.connections, pool.failures) == (2, {"err": 1, "loading": 1})


def test_an_unexpected_reply_to_a_write() -> None:
    """A write whose reply is not one of SET's raises and closes the connection."""
    with fake(saying(b":1\r\n")) as (_, pool):
        with pytest.raises(WriteError, match=":1"):
            pool.set([("a", [b"1"])], soon())
        assert pool._idle == []


@pytest.mark.parametrize("extra", [b"$1\r\nb\r\n", b"x"])
def test_unread_bytes_end_a_connection(extra: bytes) -> None:
    """A connection on which more came than was asked for is never used again, whenever it came."""
    with fake(saying(b"$1\r\na\r\n" + extra)) as (server, pool):
        for turn in range(1, 4):
            assert read(pool, "a") == [b"a"]
            assert server.connections == turn


def test_a_server_that_cannot_write_does_not_read() -> None:
    """Replies are read while values are written, or two full sockets would wait for each other."""

    def talk(accepted: socket.socket) -> None:
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        rest = b""
        while True:
            got = accepted.recv(65536)
            if not got:
                return
            *done, rest = (rest + got).split(b"$100\r\n" + b"v" * 100 + b"\r\n")
            for _ in done:
                accepted.sendall(b"+OK\r\n")

    with fake(talk) as (_, pool):
        assert all(pool.set([(f"k{i}", [b"v" * 100]) for i in range(10_000)], soon()))


def test_no_more_is_asked_for_than_is_sensible() -> None:
    """Until the size of values is known few are asked for: the server holds all of them in memory at once."""
    asked: list[int] = []

    def talk(accepted: socket.socket) -> None:
        time.sleep(0.1)
        asked.append(accepted.recv(65536).count(b"GET"))

    with fake(talk) as (_, pool), pytest.raises(UnavailableError):
        read(pool, *(str(i) for i in range(100)))
    assert asked == [2]


def test_a_restarted_server(own_server: Server, pool: DataPool) -> None:
    """Connections that ended while they rested are replaced without an error."""
    pool.set([("a", [b"1"])], soon())
    own_server.restart()
    assert read(pool, "a") == [None]
    assert pool.failures == {}


def test_threads(pool: DataPool) -> None:
    """Threads have connections of their own, and no more than `size` are kept."""
    failures: list[object] = []

    def work(number: int) -> None:
        for turn in range(20):
            value = noise(70_000 + number)[: 70_000 + number]
            key = f"{number}-{turn}"
            if pool.set([(key, [value])], soon()) != [True] or read(pool, key) != [value]:
                failures.append(key)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (failures, pool.calls, pool.failures) == ([], 320, {})
    assert 1 <= len(pool._idle) <= 4


def test_a_closed_pool_keeps_nothing(pool: DataPool) -> None:
    """After close() no connection is kept."""
    pool.set([("a", [b"1"])], soon())
    pool.close()
    assert read(pool, "a") == [b"1"]
    assert pool._idle == []


def test_a_forked_child_may_not(pool: DataPool) -> None:
    """A child process is told to open its own pool, and the parent's connection goes on."""
    pool.set([("a", [b"1"])], soon())
    child = os.fork()
    if child == 0:
        code = 1
        with contextlib.suppress(BaseException):
            try:
                read(pool, "a")
            except ForkedProcessError:
                pool.close()
                code = 0
        os._exit(code)
    assert os.waitpid(child, 0)[1] == 0
    assert read(pool, "a") == [b"1"]


@pytest.mark.parametrize("skipped", [False, True])
def test_memory(own_server: Server, pool: DataPool, skipped: bool) -> None:
    """Writing and reading 64 MiB allocates next to nothing."""
    source, target = bytearray(noise(64 * MIB)[: 64 * MIB]), bytearray(64 * MIB)
    views = [memoryview(target)]
    tracemalloc.start()
    try:
        pool.set([("a", [source])], soon(60))
        pool.get(["a"], skip_all if skipped else lambda _i, _n: views, soon(60))
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
    assert (target == source) is not skipped


@pytest.mark.parametrize(
    ("url", "message"),
    [
        *(
            ("http://h", "begin with"),
            ("", "begin with"),
            ("redis://h:port", "[Pp]ort"),
            ("redis://h:99999", "[Pp]ort"),
        ),
        *(("unix://", "socket"), ("redis://h/abc", "database"), ("redis://h?db=x", "db")),
        ("rediss://h?ssl_cert_reqs=perhaps", "ssl_cert_reqs"),
    ],
)
def test_wrong_urls(url: str, message: str) -> None:
    """A URL that cannot be used is refused at once, without its password."""
    with pytest.raises(ConfigError, match=message) as raised:
        DataPool(url.replace("//h", "//u:hidden@h"), timeout_s=1)
    assert "hidden" not in str(raised.value)
