"""The stream of an engine: what is published arrives in order, comings and goings are told, nothing hostile hurts."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from typing import Any, Literal

import pytest
import zmq

from distprefix.errors import ConfigError, ForkedProcessError, ReplayError
from distprefix.events import answer as answer_module
from distprefix.events import engine as engine_module
from distprefix.events import wire as wire_module
from distprefix.events.engine import Arrival, Connected, Disconnected, EngineSocket
from distprefix.events.frames import Frame
from distprefix.events.limits import EngineLimits
from tests.fake_engine import END, FakeEngine, until
from tests.raw_publisher import long_part, raw_peer

BEAT_S = 0.2
_MIB = 1 << 20
FOREIGN = b"\xff" + bytes(8) + b"\x7f\x03\x01" + b"NONSENSE".ljust(52, b"\0")
"""How someone greets who speaks ZMQ, but in a way that is refused."""


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    """An engine with a replay endpoint."""
    with FakeEngine() as made:
        yield made


@contextlib.contextmanager
def subscribed(engine: FakeEngine, **options: Any) -> Generator[EngineSocket]:
    """A socket that the engine knows of, and that has told that it is connected."""
    with contextlib.closing(opened(engine, **options)) as made:
        engine.wait_for_subscriber()
        assert kinds(receive(made, 1)) == [Connected]
        yield made


def opened(engine: FakeEngine, **options: Any) -> EngineSocket:
    """A socket for an engine, with a quick heartbeat."""
    return EngineSocket(engine.endpoint, engine.replay_endpoint, heartbeat_s=BEAT_S, **options)


def receive(tested: EngineSocket, count: int, timeout_s: float = 5.0, most: int = 1000) -> list[Arrival]:
    """So many arrivals, or what came in time."""
    arrived: list[Arrival] = []
    deadline = time.monotonic() + timeout_s
    while len(arrived) < count and time.monotonic() < deadline:
        arrived += tested.receive(deadline - time.monotonic(), most)
    return arrived


def kinds(arrived: list[Arrival]) -> list[type[Arrival]]:
    """Frames, Connected and Disconnected, in the order in which they came."""
    return [type(each) for each in arrived]


def numbers(arrived: list[Arrival]) -> list[int]:
    """Sequence numbers of the frames."""
    return [each.seq for each in arrived if isinstance(each, Frame)]


def number(seq: int) -> bytes:
    """As it is sent."""
    return seq.to_bytes(8, "big")


@contextlib.contextmanager
def peer(
    answer: Callable[[zmq.Socket[bytes], bytes], object], limits: EngineLimits | None = None
) -> Generator[EngineSocket]:
    """A socket whose replay endpoint answers each request in a way of its own."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.setsockopt(zmq.LINGER, 0)
        router.bind("tcp://127.0.0.1:*")
        endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT)
        stopped = threading.Event()

        def serve() -> None:
            while not stopped.is_set():
                if router.poll(10):
                    answer(router, router.recv_multipart()[0])

        thread = threading.Thread(target=serve)
        thread.start()
        with contextlib.closing(EngineSocket("tcp://127.0.0.1:1", endpoint, limits=limits)) as tested:
            yield tested
        stopped.set()
        thread.join()


def answering(
    *messages: list[bytes], limits: EngineLimits | None = None
) -> contextlib.AbstractContextManager[EngineSocket]:
    """A socket whose replay endpoint answers with these messages, whatever is asked."""
    return peer(lambda router, who: [router.send_multipart([who, *parts]) for parts in messages], limits)


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("parts", [2, 3])
def test_frames_arrive_in_order(parts: Literal[2, 3]) -> None:
    """With a topic or without, after the word that the engine is there."""
    with FakeEngine(parts=parts) as engine, contextlib.closing(opened(engine)) as tested:
        assert not tested.connected
        engine.wait_for_subscriber()
        for i in range(100):
            engine.publish_raw(b"%d" % i)
        arrived = receive(tested, 101)
        assert arrived == [Connected(), *(Frame(i, b"%d" % i) for i in range(100))]
        assert tested.connected
        assert not tested.dropped


def test_receive_gives_up_in_time(engine: FakeEngine) -> None:
    """Nothing comes, and nothing is what it returns."""
    with subscribed(engine) as tested:
        began = time.monotonic()
        assert tested.receive(0.05) == []
        assert 0.04 < time.monotonic() - began < 1
        assert tested.receive(0) == []


def test_no_more_than_asked_for(engine: FakeEngine) -> None:
    """The rest comes with the next calls."""
    with subscribed(engine) as tested:
        for _ in range(10):
            engine.publish_raw(b"")
        calls = [tested.receive(0.1, 4) for _ in range(10)]
        assert max(map(len, calls)) <= 4
        assert [seq for arrived in calls for seq in numbers(arrived)] == list(range(10))


def test_one_call_takes_no_more_bytes_than_a_frame_may_have(engine: FakeEngine) -> None:
    """Or a little more: many large frames come in several calls, so memory is bounded."""
    with subscribed(engine, limits=EngineLimits(message_bytes=1024)) as tested:
        for _ in range(10):
            engine.publish_raw(b"x" * 900)
        calls = [tested.receive(0.1) for _ in range(10)]
        assert max(map(len, calls)) <= 2
        assert [seq for arrived in calls for seq in numbers(arrived)] == list(range(10))


def test_topics_are_prefixes() -> None:
    """What is published under another topic does not arrive, and is not counted."""
    with FakeEngine(topic="kv@pod-1") as engine, subscribed(engine, topic="kv@") as tested:
        engine.send(b"load", number(7), b"")
        engine.publish_raw(b"mine")
        assert receive(tested, 1) == [Frame(0, b"mine")]
        assert not tested.dropped


def test_messages_that_make_no_sense_are_counted(engine: FakeEngine) -> None:
    """Too few parts, too many, a number that is none: left out, and what follows arrives."""
    with subscribed(engine) as tested:
        engine.send(b"alone")
        engine.send(b"kv", number(1), b"payload", b"more")
        engine.send(*[b"part"] * 5000)
        engine.send(b"kv", b"short", b"payload")
        engine.send(b"kv", END, b"")
        engine.publish_raw(b"good")
        assert receive(tested, 1) == [Frame(0, b"good")]
        assert tested.dropped == {"frames": 3, "sequence": 2}


def test_listens_for_an_engine_that_connects() -> None:
    """The host '*' means that this side listens; engines come and go."""
    port = free_port()

    def publishes(engine: FakeEngine) -> list[type[Arrival]]:
        arrived = kinds(receive(tested, 1))
        until(lambda: tested.receive(0) or engine.wait_for_subscriber() is None)
        engine.publish_raw(b"")
        return arrived + kinds(receive(tested, 1))

    with contextlib.closing(EngineSocket(f"tcp://*:{port}")) as tested:
        with FakeEngine(connect=f"tcp://127.0.0.1:{port}") as engine:
            assert publishes(engine) == [Connected, Frame]
            engine.kill()
            assert kinds(receive(tested, 1)) == [Disconnected]
            assert not tested.connected
            engine.restart()
            assert publishes(engine) == [Connected, Frame]
        assert kinds(receive(tested, 1)) == [Disconnected]


def test_strangers_do_not_count_as_engines() -> None:
    """Who connects and speaks no ZMQ is not told of, and its going does not make the engine seem gone."""
    port = free_port()
    with contextlib.closing(EngineSocket(f"tcp://*:{port}")) as tested, FakeEngine(connect=f"tcp://127.0.0.1:{port}"):
        assert kinds(receive(tested, 1)) == [Connected]
        for said in (b"", b"GET / HTTP/1.1\r\nHost: engine\r\n\r\n", FOREIGN):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(said)
                time.sleep(0.02)
        assert tested.receive(0.1) == []
        assert tested.connected


def test_an_engine_in_the_place_of_something_else(engine: FakeEngine) -> None:
    """Whatever answers at the port before, the engine is found when it is there."""
    engine.kill()
    port = int(engine.endpoint.rpartition(":")[2])
    with contextlib.closing(opened(engine)) as tested:
        with socket.create_server(("127.0.0.1", port)) as server:
            server.settimeout(0.05)
            for _ in range(20):
                tested.receive(0)
                with contextlib.suppress(TimeoutError), server.accept()[0] as accepted:
                    accepted.sendall(FOREIGN)
                    assert tested.receive(0.1) == []
        engine.restart()
        assert kinds(receive(tested, 1)) == [Connected]


def test_a_name_with_two_kinds_of_addresses(engine: FakeEngine) -> None:
    """An engine that listens on IPv4 only is found by a name that has an IPv6 address, too."""
    endpoint = engine.endpoint.replace("127.0.0.1", "localhost")
    with contextlib.closing(EngineSocket(endpoint)) as tested:
        assert kinds(receive(tested, 1)) == [Connected]


def test_a_killed_engine_and_its_successor_are_told(engine: FakeEngine) -> None:
    """Disconnected soon after the end, Connected when another one is there, which counts from zero."""
    with subscribed(engine) as tested:
        engine.publish_raw(b"old")
        engine.publish_raw(b"old")
        engine.kill()
        assert [*kinds(arrived := receive(tested, 3)), *numbers(arrived)] == [Frame, Frame, Disconnected, 0, 1]
        assert not tested.connected
        engine.restart()
        engine.wait_for_subscriber()
        engine.publish_raw(b"new")
        assert receive(tested, 2) == [Connected(), Frame(0, b"new")]


def test_disconnected_waits_for_the_frames_before_it(engine: FakeEngine) -> None:
    """Also when they take several calls."""
    with subscribed(engine) as tested:
        for _ in range(10):
            engine.publish_raw(b"")
        time.sleep(0.2)
        engine.kill()
        time.sleep(0.2)
        assert kinds(receive(tested, 11, most=4)) == [*[Frame] * 10, Disconnected]
        assert tested.receive(0) == []


def test_nobody_is_there_yet() -> None:
    """No engine, no word of one; when it comes, it is found."""
    with FakeEngine() as engine:
        engine.kill()
        with contextlib.closing(opened(engine)) as tested:
            assert tested.receive(0.1) == []
            engine.restart()
            assert kinds(receive(tested, 1)) == [Connected]


def test_a_stopped_process_is_told_by_its_silence() -> None:
    """Its connections stay open, but it answers no heartbeat; when it goes on, it is connected to again."""
    program = (
        "import zmq, time; s = zmq.Context().socket(zmq.PUB); s.bind('tcp://127.0.0.1:*');"
        "print(s.getsockopt_string(zmq.LAST_ENDPOINT), flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            endpoint = process.stdout.readline().strip()
            with contextlib.closing(EngineSocket(endpoint, heartbeat_s=BEAT_S)) as tested:
                assert kinds(receive(tested, 1)) == [Connected]
                assert tested.receive(4 * BEAT_S) == []  # a healthy one is not suspected
                os.kill(process.pid, signal.SIGSTOP)
                assert kinds(receive(tested, 1)) == [Disconnected]
                os.kill(process.pid, signal.SIGCONT)
                assert kinds(receive(tested, 1)) == [Connected]
        finally:
            process.kill()


def test_who_only_accepts_is_no_engine() -> None:
    """A connection over which nobody speaks ZMQ is not told of."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        with contextlib.closing(EngineSocket(endpoint, heartbeat_s=BEAT_S)) as tested:
            assert tested.receive(0.2) == []
            assert not tested.connected


def test_an_oversize_message_is_refused(engine: FakeEngine) -> None:
    """It costs the connection, which is told; after that the stream goes on."""
    with subscribed(engine, limits=EngineLimits(message_bytes=1024)) as tested:
        engine.publish_raw(b"x" * 1024)
        engine.publish_raw(b"x" * 1025)
        arrived = receive(tested, 3)
        assert [*kinds(arrived), *numbers(arrived)] == [Frame, Disconnected, Connected, 0]
        until(lambda: engine.publish_raw(b"next") and tested.receive(0.05))


def test_what_finds_no_room_is_dropped_and_told(engine: FakeEngine) -> None:
    """While nobody receives, messages wait in so many bytes; in the place of what was dropped stands a Connected."""
    with subscribed(engine, limits=EngineLimits(queue_bytes=100_000)) as tested:
        for _ in range(400):
            engine.publish_raw(b"x" * 5000)
        until(lambda: tested.dropped["queue"] > 0)
        arrived: list[Arrival] = []

        def is_all() -> bool:
            arrived.extend(tested.receive(0.1))
            return len(numbers(arrived)) + tested.dropped["queue"] == 400

        until(is_all)
        seen = numbers(arrived)
        assert seen == sorted(seen)
        first_gap = next((at for at, seq in enumerate(seen) if at != seq), len(seen))
        assert kinds(arrived).index(Connected) <= first_gap


def test_messages_wait_while_nobody_receives(engine: FakeEngine) -> None:
    """More than ZMQ's own queue holds, and none is lost: it is emptied meanwhile."""
    with subscribed(engine) as tested:
        for _ in range(20_000):
            engine.publish_raw(b"x" * 100)
        time.sleep(0.3)
        arrived: list[Arrival] = []
        while len(arrived) < 20_000:
            taken = tested.receive(5.0)
            assert taken
            arrived += taken
        assert numbers(arrived) == list(range(20_000))
        assert not tested.dropped


def without_end(sent: list[int], stop_after: int) -> Callable[[socket.socket], None]:
    """Sends parts of one message that has no end."""
    part = long_part(_MIB, more=True)

    def talk(connection: socket.socket) -> None:
        connection.settimeout(1.0)
        while len(sent) < stop_after:
            connection.sendall(part)
            sent.append(len(part))

    return talk


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much a connection received")
def test_a_message_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """ZMQ keeps all parts of a message until the last one came: the connection is ended before they fill memory."""
    monkeypatch.setattr(wire_module, "INCOMPLETE_BYTES", 4 * _MIB)
    sent: list[int] = []
    with raw_peer("PUB", without_end(sent, 1 << 20)) as endpoint:
        limits = EngineLimits(message_bytes=2 * _MIB)
        with contextlib.closing(EngineSocket(endpoint, limits=limits, heartbeat_s=60)) as tested:
            until(lambda: not any(isinstance(each, Frame) for each in tested.receive(0.05)) and tested.dropped)
            assert tested.dropped["incomplete"] >= 1
        del sent[:]
        sent += [0] * (1 << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells how much a connection received")
def test_a_replay_without_end_in_one_message_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same where the engine is asked for a replay."""
    monkeypatch.setattr(engine_module, "INCOMPLETE_BYTES", 4 * _MIB)
    sent: list[int] = []
    with raw_peer("ROUTER", without_end(sent, 1 << 20)) as endpoint:
        limits = EngineLimits(message_bytes=2 * _MIB)
        tested = EngineSocket("tcp://127.0.0.1:1", endpoint, limits=limits)
        with contextlib.closing(tested), pytest.raises(ReplayError, match="very many parts"):
            list(tested.replay(0, 10))
        sent += [0] * (1 << 20)


def test_many_messages_of_many_parts_are_no_reason_to_cut(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was delivered is not pending: messages of any sizes, in however many parts, keep the connection."""
    monkeypatch.setattr(wire_module, "INCOMPLETE_BYTES", 1)
    with subscribed(engine, limits=EngineLimits(message_bytes=100_000)) as tested:
        for i in range(300):
            engine.send(b"kv", number(i), b"x" * (i * 50), *[b"part" * i] * (i % 7))
            engine.publish_raw(b"x" * i)
            if i % 20 == 0:
                tested.receive(0.11)
        arrived = receive(tested, 10_000, timeout_s=0.5)
        assert Disconnected not in kinds(arrived)
        assert not tested.dropped["incomplete"]


def test_more_peers_than_engines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this side listens, so many may connect, each with a queue of its own; the engine stays connected."""
    monkeypatch.setattr(wire_module, "_MAX_PEERS", 5)
    port = free_port()
    with contextlib.ExitStack() as stack:
        tested = stack.enter_context(contextlib.closing(EngineSocket(f"tcp://*:{port}")))
        engine = stack.enter_context(FakeEngine(connect=f"tcp://127.0.0.1:{port}"))
        assert kinds(receive(tested, 1)) == [Connected]
        others = [stack.enter_context(socket.create_connection(("127.0.0.1", port))) for _ in range(20)]
        until(lambda: tested.receive(0.05) == [] and tested.dropped["peers"] >= 10)
        assert len(others) == 20
        assert tested.connected
        engine.publish_raw(b"still here")
        assert receive(tested, 1) == [Frame(0, b"still here")]


@pytest.mark.parametrize("form", ["topic", "plain"])
def test_replay_begins_where_asked(form: Literal["topic", "plain"]) -> None:
    """At the start, in the middle, at the end or beyond; old engines leave the topic out."""
    with FakeEngine(replay=form, buffer_steps=8) as engine, contextlib.closing(opened(engine)) as tested:
        assert list(tested.replay(0, 2)) == []
        for i in range(10):
            engine.publish_raw(b"%d" % i)
        assert list(tested.replay(5, 2)) == [Frame(i, b"%d" % i) for i in range(5, 10)]
        assert [frame.seq for frame in tested.replay(0, 2)] == list(range(2, 10))
        assert list(tested.replay(10, 2)) == []
        assert list(tested.replay(1 << 63, 2)) == []


def test_what_the_network_dropped_is_replayed(engine: FakeEngine) -> None:
    """What the engine no longer has is not."""
    with subscribed(engine) as tested:
        engine.drop_next(2)
        for _ in range(4):
            engine.publish_raw(b"")
        engine.lose_next(1)
        for _ in range(2):
            engine.publish_raw(b"")
        assert numbers(receive(tested, 3)) == [2, 3, 5]
        assert [frame.seq for frame in tested.replay(0, 2)] == [0, 1, 2, 3, 5]
        assert engine.requests == [0, 4]  # once more, as the queue of the engine may have dropped it


def test_an_end_that_was_dropped_is_asked_for_again(engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second without a message, and what follows the last one is asked for: the end comes then, or it is an error."""
    for _ in range(4):
        engine.publish_raw(b"")
    with contextlib.closing(opened(engine)) as tested:
        engine.swallow_next(1)
        assert [frame.seq for frame in tested.replay(1, 10)] == [1, 2, 3]
        assert (engine.requests, tested.counts["replays_asked_again"]) == ([1, 4], 1)
        monkeypatch.setattr(engine_module, "_FIRST_ANSWER_S", 0.5)
        engine.swallow_next(2)
        replay = tested.replay(0, 10)
        assert [next(replay).seq for _ in range(4)] == [0, 1, 2, 3]
        with pytest.raises(ReplayError, match="did not finish"):
            next(replay)


def test_what_a_full_queue_dropped_of_a_replay_is_asked_for_again(engine: FakeEngine) -> None:
    """All that lacks between two messages, as long as an answer brings some of it."""
    for _ in range(40):
        engine.publish_raw(b"")
    with contextlib.closing(opened(engine)) as tested:
        engine.room = 10
        assert [frame.seq for frame in tested.replay(0, 10)] == list(range(40))
        assert engine.requests == [0, 9, 18, 27, 36]


def test_no_more_is_waited_for_than_is_needed(engine: FakeEngine) -> None:
    """Who asks for what lacks before a message has it when that is there, without an end."""
    for _ in range(4):
        engine.publish_raw(b"")
    with contextlib.closing(opened(engine)) as tested:
        engine.swallow_next(1)
        assert [frame.seq for frame in tested.replay(1, 10, until=4)] == [1, 2, 3]
        assert engine.requests == [1]


def test_the_right_to_write_is_kept_while_an_engine_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tenth of a second, until the engine answers or the time is over."""
    calls: list[float] = []
    monkeypatch.setattr(engine_module, "_FIRST_ANSWER_S", 0.5)
    tested = EngineSocket("tcp://127.0.0.1:1", "tcp://127.0.0.1:1")
    with contextlib.closing(tested), pytest.raises(ReplayError, match="did not answer"):
        list(tested.replay(0, 10, keep=lambda: calls.append(time.monotonic())))
    assert 2 <= len(calls) <= 6


def test_a_whole_buffer_is_replayed_at_once(engine: FakeEngine) -> None:
    """As many messages as engines keep, none left out for want of room."""
    for _ in range(10_000):
        engine.publish_raw(b"x" * 100)
    with contextlib.closing(opened(engine)) as tested:
        assert [frame.seq for frame in tested.replay(0, 5)] == list(range(10_000))


@pytest.mark.parametrize("before", [[], [b""], [b"kv"], [b"", b"kv"]])
def test_replies_of_every_form_are_understood(before: list[bytes]) -> None:
    """With a delimiter, a topic, both or neither; what lies before the start is skipped."""
    frames = [[*before, number(seq), b"payload"] for seq in (3, 4, 5)]
    with answering(*frames, [*before, END, b""]) as tested:
        assert list(tested.replay(4, 2)) == [Frame(4, b"payload"), Frame(5, b"payload")]


@pytest.mark.parametrize(
    "message",
    [[b""], [b"", b"kv", number(2), b"", b"more"], [b"", b"short", b""], [b"", number(1), b""], [b"", END, b"x"]],
)
def test_what_is_no_replay_is_refused(message: list[bytes]) -> None:
    """Too few or too many parts, a number that is none or comes twice, an end that is none."""
    with answering([b"", number(1), b"good"], message) as tested:
        replay = tested.replay(0, 2)
        assert next(replay) == Frame(1, b"good")
        with pytest.raises(ReplayError, match="sent"):
            next(replay)


def test_a_replay_without_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """At so many frames."""
    monkeypatch.setattr(answer_module, "_MAX_FRAMES", 50)
    with answering(*([b"", number(seq), b"x" * 100] for seq in range(100))) as tested:
        seen: list[Frame] = []
        with pytest.raises(ReplayError, match="too much"):
            seen.extend(tested.replay(0, 2))
        assert len(seen) == 50


def test_a_replay_is_bounded_in_bytes() -> None:
    """What came up to there is given, and then the error."""
    limits = EngineLimits(replay_bytes=5000)
    with answering(*([b"", number(seq), b"x" * 100] for seq in range(100)), limits=limits) as tested:
        seen: list[Frame] = []
        with pytest.raises(ReplayError, match="too much"):
            seen.extend(tested.replay(0, 2))
        assert 0 < len(seen) <= 5000 // 100


def test_a_replay_that_trickles_is_cut_off() -> None:
    """The time limit is for all of it, and what came until then has been handed out."""

    def trickle(router: zmq.Socket[bytes], who: bytes) -> None:
        for seq in range(60):
            router.send_multipart([who, b"", number(seq), b""])
            time.sleep(0.01)

    with peer(trickle) as tested:
        began = time.monotonic()
        replay = tested.replay(0, 0.3)
        assert next(replay).seq == 0
        with pytest.raises(ReplayError, match=r"did not finish within 0\.3 s"):
            list(replay)
        assert time.monotonic() - began < 1


def test_the_caller_may_take_its_time(engine: FakeEngine) -> None:
    """What is done with each frame does not count as the engine's time."""
    for _ in range(3):
        engine.publish_raw(b"")
    with contextlib.closing(opened(engine)) as tested:
        for _ in tested.replay(0, 0.5):
            time.sleep(0.3)


def test_nobody_replays(engine: FakeEngine) -> None:
    """No endpoint, a dead one, or one that is busy for ever: an error that says so, in time."""
    with contextlib.closing(EngineSocket(engine.endpoint)) as tested, pytest.raises(ReplayError, match="No replay"):
        list(tested.replay(0, 2))
    with contextlib.closing(opened(engine)) as tested:
        engine.freeze()
        began = time.monotonic()
        with pytest.raises(ReplayError, match="did not answer"):
            list(tested.replay(0, 0.1))
        engine.thaw()
        assert list(tested.replay(0, 2)) == []
        engine.kill()
        with pytest.raises(ReplayError, match="did not answer"):
            list(tested.replay(0, 0.1))
        assert time.monotonic() - began < 2


@pytest.mark.parametrize(
    "endpoint",
    [
        *("", "localhost:5557", "http://host:5557", "tcp://host", "tcp://:5557", "tcp://host:0", "tcp://host:65536"),
        *("tcp://a b:5557", "tcp://::1:5557", "tcp://host:5557/x", "tcp://host:*", "ipc://", "inproc://x"),
    ],
)
def test_an_endpoint_that_cannot_be(endpoint: str) -> None:
    """It is refused by name, whichever it is."""
    with pytest.raises(ConfigError, match=r"endpoint is .*; it must be"):
        EngineSocket(endpoint)
    with pytest.raises(ConfigError, match=r"replay is .*; it must be"):
        EngineSocket("tcp://host:5557", endpoint)


def test_settings_that_cannot_be() -> None:
    """Nobody asks everybody for a replay, two cannot listen at one port, and limits are positive."""
    with pytest.raises(ConfigError, match="not at '\\*'"):
        EngineSocket("tcp://127.0.0.1:5557", "tcp://*:5558")
    with pytest.raises(ConfigError, match="message_bytes is 0"):
        EngineLimits(message_bytes=0)
    with pytest.raises(ConfigError, match="heartbeat_s is 0"):
        EngineSocket("tcp://127.0.0.1:5557", heartbeat_s=0)
    endpoint = f"tcp://*:{free_port()}"
    with contextlib.closing(EngineSocket(endpoint)), pytest.raises(ConfigError, match="in use"):
        EngineSocket(endpoint)


def test_closing_again_does_nothing(engine: FakeEngine) -> None:
    """Nor does forgetting to close warn or leave anything behind."""
    tested = opened(engine)
    tested.close()
    tested.close()
    forgotten = opened(engine)
    replay = forgotten.replay(0, 1)
    engine.publish_raw(b"")
    assert next(replay).seq == 0
    del forgotten, replay
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        gc.collect()
    assert seen == []


def _use(tested: EngineSocket, outcome: Any) -> None:
    try:
        tested.receive(0)
    except ForkedProcessError as error:
        outcome.put(str(error))
    tested.close()


def test_a_child_process_leaves_the_stream_alone(engine: FakeEngine) -> None:
    """It cannot receive, and its closing does not end the parent's connection."""
    context: Any = multiprocessing.get_context("fork")
    with subscribed(engine) as tested, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is what is tried here
        outcome = context.SimpleQueue()
        child = context.Process(target=_use, args=(tested, outcome))
        child.start()
        child.join(5)
        assert child.exitcode == 0
        assert "fork" in outcome.get()
        engine.publish_raw(b"still here")
        assert receive(tested, 1) == [Frame(0, b"still here")]
