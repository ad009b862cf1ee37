"""What may trim the tree: an absence that the primary confirms, and bytes that came whole and failed their check."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from distprefix import PrefixCacheOptimizer
from distprefix.redis import client as redis_client
from distprefix.tiers import envelope
from distprefix.tiers.envelope import HEADER_BYTES
from tests.contract.test_failures import wait_until
from tests.contract.test_tree import heads
from tests.payloads import KEYS, TIERS, data, delete, flip, loaded, metric, put, sound
from tests.proxy import CloseError, bulk
from tests.scene import AT, LONG, SHORT, TOKENS, Scene
from tests.servers import Backend, Server

FLIPS = {"header": (0, 6), "check": (0, 33), "first value": (0, 50), "later part": (2, 9)}
"""Part and byte."""
ERRORS = {
    "ERR max number of clients reached": "err",
    "ERR upstream failure": "err",
    "ERR unknown command 'GET'": "err",
    "ERR value is too large": "err",
    "QUOTA exceeded for this tenant": "refused",
    "NOPERM this user has no permissions to run the 'get' command": "permission",
    "NOAUTH Authentication required.": "auth",
    "LOADING Redis is loading the dataset in memory": "loading",
    "READONLY You can't write against a read only replica.": "readonly",
    "MASTERDOWN Link with MASTER is down": "masterdown",
    "MISCONF Redis is configured to save RDB snapshots": "misconf",
    "BUSY Redis is busy running a script": "busy",
    "CLUSTERDOWN The cluster is down": "clusterdown",
    "MOVED 3999 127.0.0.1:6381": "refused",
}
"""What a server may say in place of a value, and how it is counted."""


@pytest.fixture
def scene(request: pytest.FixtureRequest, real_server: Backend, second: Server) -> Iterator[Scene]:
    """Payloads of one value in the tier of the parameter."""
    made = Scene(real_server, request.param, second)
    yield made
    made.close()


@pytest.fixture
def long_scene(
    request: pytest.FixtureRequest, real_server: Backend, second: Server, small_parts: int
) -> Iterator[Scene]:
    """Payloads of several parts in the tier of the parameter."""
    assert small_parts < LONG // 4
    made = Scene(real_server, request.param, second, LONG)
    yield made
    made.close()


def every_tier(fixture: str = "scene") -> Any:
    """Run with payloads in each tier."""
    long = pytest.mark.long  # as the warm tier, whose scripts and server it shares
    short = ("warm", "elsewhere") if fixture == "scene" else ("warm",)
    tiers = [pytest.param(tier, marks=() if tier in short else long) for tier in TIERS]
    return pytest.mark.parametrize(fixture, tiers, indirect=True)


# What proves nothing


@pytest.mark.parametrize("text", ERRORS)
@every_tier()
def test_an_error_in_place_of_a_value_trims_nothing(scene: Scene, text: str) -> None:
    """Whatever error a server or a proxy answers a read with, the hit ends there and the tree stays."""
    scene.answer_reads(lambda _words, _ask: b"-%s\r\n" % text.encode())
    scene.ends_there()
    assert metric(scene.reader, "payloads_unavailable") == 1
    assert scene.failures()[ERRORS[text]] >= 1
    scene.recovers()


@pytest.mark.parametrize(
    "reply", [b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n", b"$-1\r\n"]
)
@every_tier()
def test_an_absence_that_the_server_denies_trims_nothing(scene: Scene, reply: bytes) -> None:
    """A proxy that says falsely that there is no such value is refuted by the server, and the tree stays."""
    scene.answer_reads(lambda _words, _ask: reply)
    scene.ends_there()
    assert metric(scene.reader, "payloads_missing") == 1
    assert metric(scene.reader, "evidence_refuted") == 1
    scene.recovers()


@pytest.mark.parametrize("reply", [b"-WRONGTYPE no\r\n", b"$-1\r\n"])
@every_tier("long_scene")
def test_an_absent_part_that_the_server_denies_trims_nothing(long_scene: Scene, reply: bytes) -> None:
    """A proxy that says falsely that a part of a long payload is not there is refuted by the server."""
    key = long_scene.key(2).encode()
    long_scene.values.answer = lambda words, ask: reply if words[:2] == [b"GET", key] else ask()
    long_scene.ends_there()
    assert metric(long_scene.reader, "payloads_missing") == 1
    assert metric(long_scene.reader, "evidence_refuted") == 1
    long_scene.recovers()


@every_tier()
def test_a_value_that_was_cut_on_its_way_trims_nothing(scene: Scene) -> None:
    """A value that comes shorter than the server has it is refuted by the server, and the tree stays."""
    value: Any = scene.server.get(scene.key())
    scene.answer_reads(lambda _words, _ask: bulk(value[:-5]))
    scene.ends_there()
    assert metric(scene.reader, "payloads_damaged") == 1
    assert metric(scene.reader, "evidence_refuted") == 1
    scene.recovers()


@pytest.mark.parametrize("scene", TIERS[:2], indirect=True)
def test_a_value_that_was_changed_on_its_way_trims_nothing(scene: Scene) -> None:
    """A value that comes changed in every reply, while the server has it as it was, is refuted by the server."""
    value: Any = scene.server.get(scene.key())
    scene.answer_reads(lambda _words, _ask: bulk(value[:-5] + bytes(each ^ 1 for each in value[-5:])))
    scene.ends_there()
    assert metric(scene.reader, "payloads_damaged") == 1
    assert metric(scene.reader, "evidence_refuted") == 1
    scene.recovers()


@pytest.mark.parametrize("times", [1, 2])
@every_tier()
def test_a_value_that_came_changed_for_a_while_trims_nothing(scene: Scene, times: int) -> None:
    """A value that failed its check once or twice, and passes it when it is compared, stays."""
    left = [times]

    def change(_: list[bytes], ask: Callable[[], bytes]) -> bytes:
        left[0] -= 1
        reply = bytearray(ask())
        reply[-9] ^= left[0] >= 0
        return bytes(reply)

    scene.answer_reads(change)
    assert loaded(scene.reader, TOKENS) == (scene.right if times == 1 else scene.right[:AT])
    assert metric(scene.reader, "evidence_refuted") == times - 1
    scene.recovers()


@pytest.mark.parametrize("share", [0.0, 0.5])
@every_tier()
def test_a_connection_that_ends_in_the_middle_trims_nothing(scene: Scene, share: float) -> None:
    """A connection that ends before a value or within it brings no evidence, and the tree stays."""

    def end(_: list[bytes], ask: Callable[[], bytes]) -> bytes:
        reply = ask()
        raise CloseError(reply[: int(share * len(reply))])

    scene.answer_reads(end)
    assert len(loaded(scene.reader, TOKENS)) <= AT
    assert scene.backend.dump() == scene.before
    assert metric(scene.reader, "payloads_unavailable") == 1
    assert sum(scene.failures().values()) >= 1
    scene.recovers()


@every_tier()
def test_a_value_that_never_comes_trims_nothing(scene: Scene) -> None:
    """A read without an answer ends with its deadline, brings no evidence, and the tree stays."""
    until = time.monotonic() + 60

    def hang(_: list[bytes], ask: Callable[[], bytes]) -> bytes:
        while time.monotonic() < until and not done:
            time.sleep(0.01)
        return ask()

    done: list[bool] = []
    scene.answer_reads(hang)
    assert len(loaded(scene.reader, TOKENS)) <= AT
    done.append(True)
    assert scene.backend.dump() == scene.before
    assert metric(scene.reader, "payloads_unavailable") == 1
    assert metric(scene.reader, "payloads_trimmed") == 0
    assert set(scene.failures()) & {"timeout", "silent"}
    scene.recovers()


@every_tier()
def test_a_server_with_too_many_clients_trims_nothing(scene: Scene) -> None:
    """A server that refuses new connections brings no evidence, and the tree stays."""
    assert scene.reader.find_stored(TOKENS) == len(scene.right)
    scene.values.greeting = b"-ERR max number of clients reached\r\n"
    assert loaded(scene.reader, TOKENS) == []
    assert scene.backend.dump() == scene.before
    assert metric(scene.reader, "payloads_unavailable") == 1
    assert metric(scene.reader, "payloads_trimmed") == 0
    assert sum(scene.failures().values()) >= 1
    scene.recovers()


@every_tier()
def test_a_replica_trims_nothing(scene: Scene) -> None:
    """A replica in place of the primary is not asked for payloads, whatever it lacks."""
    assert scene.reader.find_stored(TOKENS) == len(scene.right)
    nothing = {b"ROLE": b"*1\r\n$5\r\nslave\r\n", b"GET": b"$-1\r\n"}
    scene.values.answer = lambda words, ask: nothing.get(words[0]) or ask()
    assert loaded(scene.reader, TOKENS) == []
    assert scene.backend.dump() == scene.before
    assert metric(scene.reader, "payloads_unavailable") == 1
    assert scene.failures()["replica"] >= 1
    scene.recovers()


@pytest.mark.parametrize("scene", TIERS[2:], indirect=True)
def test_a_server_that_became_a_replica_trims_nothing(scene: Scene) -> None:
    """An absence on an open connection to a server that became a replica proves nothing."""
    assert loaded(scene.reader, TOKENS) == scene.right
    nothing = {b"ROLE": b"*1\r\n$5\r\nslave\r\n", b"GET": b"$-1\r\n", b"TYPE": b"+none\r\n"}
    scene.values.answer = lambda words, ask: nothing.get(words[0]) or ask()
    assert loaded(scene.reader, TOKENS) == []
    assert scene.backend.dump() == scene.before
    assert metric(scene.reader, "evidence_refuted") == 1
    scene.recovers()


@every_tier()
def test_a_server_promoted_just_now_trims_nothing(scene: Scene) -> None:
    """What a server lacks that was promoted just now stays in the tree until the promotion is past."""
    value: Any = scene.server.get(scene.key())
    scene.server.delete(scene.key())
    scene.before = scene.backend.dump()
    pools = scene.reader._tiers.pools
    endpoint = pools["warm" if scene.tier == "warm" else "cold"].endpoint
    assert loaded(scene.reader, TOKENS[: 4 * AT]) == scene.right[:AT]
    endpoint._promoted_at = time.monotonic()
    scene.ends_there()
    assert metric(scene.reader, "payloads_missing") == 1
    scene.server.set(scene.key(), value)
    assert loaded(scene.reader, TOKENS) == scene.right
    scene.server.delete(scene.key())
    endpoint._promoted_at = float("-inf")
    scene.trims()


def _frozen_server_trims_nothing(reader: PrefixCacheOptimizer, backend: Backend, server: Server) -> None:
    right = data(TOKENS, SHORT)
    assert loaded(reader, TOKENS) == right
    before = backend.dump()
    server.freeze()
    found = loaded(reader, TOKENS)
    server.thaw()
    assert found == []
    assert backend.dump() == before
    assert metric(reader, "payloads_trimmed") == 0
    wait_until(lambda: loaded(reader, TOKENS) == right)


def test_a_frozen_server_of_the_tree_trims_nothing(own: Backend, own_server: Server, second: Server) -> None:
    """A server that stops answering brings no evidence against its payloads."""
    put(own, "warm", TOKENS, second, SHORT)
    reader = own.open("reader", strict=False, payload_timeout_s=1, publish_timeout_s=1, breaker_reset_s=0.05)
    _frozen_server_trims_nothing(reader, own, own_server)


def test_a_frozen_server_of_cold_payloads_trims_nothing(real_server: Backend, third: Server) -> None:
    """A server of cold payloads that stops answering brings no evidence against them."""
    put(real_server, "elsewhere", TOKENS, third, SHORT)
    settings: dict[str, Any] = {"strict": False, "payload_timeout_s": 1, "breaker_reset_s": 0.05}
    reader = real_server.open("reader", cold_url=third.url, **settings)
    _frozen_server_trims_nothing(reader, real_server, third)


@pytest.mark.parametrize("failure", ["error", "end", "before"])
@every_tier()
def test_a_trim_that_fails_is_counted_and_made_up_for(scene: Scene, failure: str) -> None:
    """A tree that does not answer at the trim stays, no error is raised, and the next load trims it."""
    scene.server.delete(scene.key())
    scene.before = scene.backend.dump()
    sha = redis_client.load_script("disprove").sha.encode()

    def fail(words: list[bytes], ask: Callable[[], bytes]) -> bytes:
        if words[:2] != [b"EVALSHA", sha]:
            return ask()
        if failure == "error":
            return b"-BUSY Redis is busy running a script\r\n"
        raise CloseError(b"*3\r\n:1\r\n" if failure == "end" else b"")

    scene.tree.answer = fail
    scene.ends_there()
    assert metric(scene.reader, "payloads_missing") == 1
    assert metric(scene.reader, "trims_failed") == 1
    scene.tree.answer = lambda _, ask: ask()
    wait_until(lambda: loaded(scene.reader, TOKENS) == scene.right[:AT] and scene.writer.find_stored(TOKENS) == AT)


# What is proof


def _of_another_type(server: redis.Redis, key: str, _: str) -> None:
    server.delete(key)
    server.hset(key, "a", "b")


def _longer(server: redis.Redis, key: str, _: str) -> None:
    server.append(key, b"x")


def _shorter(server: redis.Redis, key: str, _: str) -> None:
    value: Any = server.get(key)
    server.set(key, value[:20])


def _empty(server: redis.Redis, key: str, _: str) -> None:
    server.set(key, b"")


DAMAGES = [delete, _of_another_type, _longer, _shorter, _empty, flip]


@pytest.mark.parametrize("damage", DAMAGES)
@every_tier()
def test_what_is_not_as_it_was_stored_is_trimmed(scene: Scene, damage: Callable[..., None]) -> None:
    """A payload that is gone, of another type or length, or changed, is trimmed with all that follows it."""
    damage(scene.server, scene.key(), "")
    scene.trims()
    sound(scene.backend, scene.reader, scene.server)


@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("damage", DAMAGES)
@every_tier("long_scene")
def test_a_long_payload_that_is_not_as_it_was_stored_is_trimmed(
    long_scene: Scene, damage: Callable[..., None], part: int
) -> None:
    """A part of a long payload that is gone, of another type or length, or changed, has all of it trimmed."""
    damage(long_scene.server, long_scene.key(part), "")
    long_scene.trims()


@pytest.mark.parametrize("place", FLIPS)
@every_tier("long_scene")
def test_a_changed_byte_is_found_wherever_it_is(long_scene: Scene, place: str) -> None:
    """A byte that was changed in the header, the first value or a later part has the payload trimmed."""
    part, at = FLIPS[place]
    _change(long_scene.server, long_scene.key(part), at)
    long_scene.trims()
    assert metric(long_scene.reader, "payloads_damaged") == 1


def _change(server: redis.Redis, key: str, at: int) -> None:
    value: Any = server.get(key)
    server.setrange(key, at, bytes([value[at] ^ 1]))


# What is mended before the trim


def _meanwhile(scene: Scene, act: Callable[[], object]) -> list[bool]:
    """Have something happen between the second read and the comparison. Returns a list that is empty then."""
    todo = [True]
    sha = redis_client.load_script("disprove").sha.encode()
    proxy = scene.values

    def answer(words: list[bytes], ask: Callable[[], bytes]) -> bytes:
        is_last = words[0] == b"TYPE" if scene.tier == "elsewhere" else words[:2] == [b"EVALSHA", sha]
        if is_last and todo:
            todo.pop()
            act()
        return ask()

    proxy.answer = answer
    return todo


def _store_anew(scene: Scene) -> None:
    """Write the payload again, under another upload; the tree names it already."""
    tiers = scene.writer._tiers.payloads
    store = tiers.warm if scene.tier == "warm" else tiers.cold
    assert store is not None
    first = scene.key()
    scene.server.delete(first, *scene.server.scan_iter(match=f"{first}:*", count=1000))
    store.write([(bytes.fromhex(scene.chunk), scene.right[AT])], time.monotonic() + 10)
    for key in [first, *scene.server.scan_iter(match=f"{first}:*", count=1000)]:
        scene.server.persist(key)


@pytest.mark.parametrize("repair", ["same bytes", "another upload"])
@pytest.mark.parametrize("damage", DAMAGES)
@every_tier()
def test_what_is_repaired_before_the_trim_stays(scene: Scene, damage: Callable[..., None], repair: str) -> None:
    """A payload that was damaged when it was read, and is whole when the tree compares it, stays."""
    key = scene.key()
    value: Any = scene.server.get(key)
    damage(scene.server, key, "")
    todo = _meanwhile(scene, lambda: scene.server.set(key, value) if repair == "same bytes" else _store_anew(scene))
    assert loaded(scene.reader, TOKENS) == scene.right[:AT]
    assert not todo
    assert metric(scene.reader, "evidence_refuted") == 1
    assert metric(scene.reader, "payloads_trimmed") == 0
    assert loaded(scene.reader, TOKENS) == scene.right


@pytest.mark.parametrize("part", [0, 2])
@pytest.mark.parametrize("damage", DAMAGES)
@every_tier("long_scene")
def test_a_long_payload_that_is_repaired_before_the_trim_stays(
    long_scene: Scene, damage: Callable[..., None], part: int
) -> None:
    """A long payload that was damaged when it was read, and stored anew when the tree compares it, stays."""
    scene = long_scene
    damage(scene.server, scene.key(part), "")
    todo = _meanwhile(scene, lambda: _store_anew(scene))
    assert loaded(scene.reader, TOKENS) == scene.right[:AT]
    assert not todo
    assert metric(scene.reader, "evidence_refuted") == 1
    assert metric(scene.reader, "payloads_trimmed") == 0
    assert loaded(scene.reader, TOKENS) == scene.right


@pytest.mark.parametrize("damage", [delete, flip])
@pytest.mark.parametrize("size", [SHORT, LONG])
@pytest.mark.parametrize("tier", TIERS)
def test_two_find_the_same_damage_and_one_repairs_it(
    real_server: Backend, second: Server, small_parts: int, tier: str, size: int, damage: Callable[..., None]
) -> None:
    """A loader that comes second with its evidence does not trim what the first one trimmed and stored anew."""
    assert SHORT < small_parts < LONG
    scene = Scene(real_server, tier, second, size)
    damage(scene.server, scene.key(), "")

    def repair() -> None:
        assert loaded(scene.writer, TOKENS) == scene.right[:AT]
        assert scene.writer.store(TOKENS, scene.right) == len(scene.right)

    todo = _meanwhile(scene, repair)
    found = loaded(scene.reader, TOKENS)
    assert found == scene.right[: len(found)]
    assert not todo
    assert metric(scene.reader, "payloads_trimmed") == 0
    assert loaded(scene.reader, TOKENS) == scene.right
    scene.close()


# Keys


@pytest.mark.parametrize("keys", ["", "1:" + "22" * 32, "2:" + "11" * 32])
@pytest.mark.parametrize("tier", TIERS)
def test_a_wrong_key_trims_nothing(real_server: Backend, second: Server, tier: str, keys: str) -> None:
    """Payloads that a reader has no key for, or another one under the same id, are not damaged: the tree stays."""
    scene = Scene(real_server, tier, second, encryption_keys=KEYS)
    reader = real_server.open("blind", **{**scene.options, "encryption_keys": keys, "strict": False})
    for _ in range(3):
        assert loaded(reader, TOKENS) == []
    assert real_server.dump() == scene.before
    assert metric(reader, "payloads_unreadable") == 3
    assert metric(reader, "payloads_trimmed") == 0
    scene.close()


@pytest.mark.parametrize("at", [0, AT])
@pytest.mark.parametrize("tier", TIERS)
def test_a_forged_payload_is_trimmed_once_the_key_is_proved(
    real_server: Backend, second: Server, tier: str, at: int
) -> None:
    """A payload changed with its checksum is damaged for a key that has opened another one, else unreadable."""
    scene = Scene(real_server, tier, second, encryption_keys=KEYS)
    chunk = heads(TOKENS)[at]
    bound = scene.reader._state.link.hasher.payload_context + bytes.fromhex(chunk)
    _forge(scene.server, real_server.keys.payload(chunk, cold=tier != "warm"), bound)
    assert loaded(scene.reader, TOKENS) == scene.right[:at]
    stored = real_server.open("other", **scene.options).find_stored(TOKENS)
    assert stored == (at or len(scene.right))
    assert metric(scene.reader, "payloads_damaged" if at else "payloads_unreadable") == 1
    scene.close()


def _forge(server: redis.Redis, key: str, bound: bytes) -> None:
    value: Any = server.get(key)
    body = memoryview(value[HEADER_BYTES:-1] + bytes([value[-1] ^ 1]))
    proven = value[: HEADER_BYTES - 8]
    checksum = envelope._checksum(bound, proven, body).to_bytes(8, "little")
    server.set(key, proven + checksum + bytes(body))
