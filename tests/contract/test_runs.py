"""Values whose lengths are expected: whatever the server has instead, what comes back is what would come otherwise."""

from __future__ import annotations

import socket
import time
from array import array
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from distprefix.errors import InvalidInputError, UnavailableError
from distprefix.redis.data import DataPool
from tests.servers import Server, find_server
from tests.values import MIB, Into, fake, noise, saying, skip_all, soon

SIZES = st.one_of(st.integers(0, 40), st.sampled_from([4095, 4096, 65_536, 300_000]), st.none())


@pytest.fixture(scope="module", params=[False, True], ids=["unix", "tcp"])
def pool(request: pytest.FixtureRequest) -> Iterator[DataPool]:
    """A pool on a server that nobody harms."""
    server = Server(find_server("valkey-9.1"), tcp=request.param).start()
    opened = DataPool(server.url, timeout_s=5)
    yield opened
    opened.close()
    server.stop()


def expecting(pool: DataPool, keys: Sequence[str], expected: Sequence[int], views: int = 1) -> list[bytes | None]:
    """The values, None for what is not there."""
    sink = Into(views)

    def fresh(index: int, length: int) -> list[memoryview]:
        sink.found.pop(index, None)  # asked again: another length came
        return sink(index, length)

    lengths = pool.get(keys, fresh, soon(), expected)
    return [None if length < 0 else bytes(sink.found.get(i, b"")) for i, length in enumerate(lengths)]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.tuples(SIZES, st.booleans()), min_size=1, max_size=40), views=st.integers(1, 3))
def test_lengths_only_make_it_faster(pool: DataPool, values: list[tuple[int | None, bool]], views: int) -> None:
    """Some values missing, some of other lengths than expected, on one connection: each comes whole, in its place."""
    pool.delete([f"k{i}" for i in range(40)], soon())
    data = [None if size is None else noise(size + i)[i : size + i] for i, (size, _) in enumerate(values)]
    pool.set([(f"k{i}", [value]) for i, value in enumerate(data) if value is not None], soon())
    expected = [(0 if size is None else size) + (0 if right else i % 7) for i, (size, right) in enumerate(values)]
    keys = [f"k{i}" for i in range(len(values))]
    assert expecting(pool, keys, expected, views) == data
    assert len(pool._idle) == 1
    assert pool.failures == {}


def test_many_values_take_few_reads(pool: DataPool, monkeypatch: pytest.MonkeyPatch) -> None:
    """256 small values are read with a fraction of as many system calls when their lengths are expected."""
    keys = [f"many{i}" for i in range(256)]
    pool.set([(key, [noise(2000)[:2000]]) for key in keys], soon())
    calls: list[int] = []
    monkeypatch.setattr(pool._idle[0], "_socket", _Counting(pool._idle[0]._socket, calls))
    assert expecting(pool, keys, [2000] * 256) == [noise(2000)[:2000]] * 256
    assert len(calls) < 64


class _Counting:
    """A socket that counts what it receives."""

    def __init__(self, of: socket.socket, calls: list[int]) -> None:
        self._of, self._calls = of, calls

    def recvmsg_into(self, *args: object) -> object:
        """Count it."""
        self._calls.append(1)
        return self._of.recvmsg_into(*args)  # pyright: ignore[reportArgumentType, reportCallIssue]

    def __getattr__(self, name: str) -> object:
        return getattr(self._of, name)


@pytest.mark.parametrize("cut", [1, 3, 4, 7, 8, 9, 10, 12, 13])
def test_a_reply_in_two_pieces(cut: int) -> None:
    """Wherever a reply is cut, right and wrong lengths and missing values are told apart."""
    reply = b"$2\r\nab\r\n$-1\r\n$3\r\nabc\r\n"

    def talk(accepted: socket.socket) -> None:
        accepted.recv(65536)
        accepted.sendall(reply[:cut])
        time.sleep(0.02)
        accepted.sendall(reply[cut:])
        accepted.recv(65536)

    with fake(talk) as (_, pool):
        assert expecting(pool, "abc", [2, 2, 2]) == [b"ab", None, b"abc"]


@pytest.mark.parametrize("reply", [b"$2\r\nabcd\r\n", b"$2\r\nabXX$2\r\ncd\r\n", b"$2\r\nab\r\n*1\r\n"])
def test_nonsense(reply: bytes) -> None:
    """What is no reply ends the call as a failure of the protocol."""
    with fake(saying(reply)) as (_, pool):
        with pytest.raises(UnavailableError):
            expecting(pool, "ab", [2, 2])
        assert pool.failures == {"protocol": 1}
        assert pool._idle == []


def test_an_error_among_them() -> None:
    """An error in place of a value says nothing of others, unless it is one of the server."""
    with fake(saying(b"$1\r\na\r\n-WRONGTYPE no\r\n$1\r\nc\r\n")) as (_, pool):
        assert expecting(pool, "abc", [1, 1, 1]) == [b"a", None, b"c"]
        assert pool.failures == {"wrongtype": 1}
    with fake(saying(b"$1\r\na\r\n-LOADING wait\r\n$1\r\nc\r\n")) as (_, pool):
        assert expecting(pool, "abc", [1, 1, 1]) == [b"a", None, None]
        assert pool.failures == {"loading": 1}
        assert len(pool._idle) == 1


def test_what_the_sink_skips(pool: DataPool) -> None:
    """Values that nobody wants are skipped, of the expected length too."""
    pool.set([("a", [b"1"]), ("b", [noise(MIB)[:MIB]])], soon())
    assert pool.get(["a", "b", "a"], skip_all, soon(), [1, MIB, 1]) == [1, MIB, 1]


def test_a_frozen_server_in_the_middle() -> None:
    """A server that says no more than a part of what it announced ends the call at its deadline."""
    with fake(saying(b"$100\r\nonly this")) as (_, pool):
        began = time.monotonic()
        with pytest.raises(UnavailableError, match="in time"):
            pool.get(["a"], Into(), soon(0.3), [100])
        assert time.monotonic() - began < 0.6


def test_as_many_lengths_as_values(pool: DataPool) -> None:
    """Lengths that are not one for each value are refused before anything is sent."""
    calls = pool.calls
    with pytest.raises(InvalidInputError, match="1 lengths are expected of 2 values"):
        pool.get(["a", "b"], skip_all, soon(), [1])
    assert pool.calls == calls


@pytest.mark.parametrize("expected", [None, [8]])
@pytest.mark.parametrize(
    "views",
    [
        [memoryview(bytearray(8)), memoryview(bytearray(0)), memoryview(bytearray(100))],
        [memoryview(bytearray(8)), memoryview(b"read-only")],
        [memoryview(array("i", range(8)))],
    ],
)
def test_views_that_do_not_fit(pool: DataPool, views: list[memoryview], expected: list[int] | None) -> None:
    """Views that hold more than the value, behind those that hold it or by their items, are refused."""
    pool.set([("a", [b"12345678"])], soon())
    with pytest.raises(InvalidInputError, match="sink"):
        pool.get(["a"], lambda _i, _n: views, soon(), expected)
    assert expecting(pool, ["a"], [8]) == [b"12345678"]
