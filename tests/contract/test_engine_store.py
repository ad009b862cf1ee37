"""What engines are given: nothing blocks their threads, nothing raises, and Redis may come and go."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from distprefix import PrefixCacheConfig
from distprefix.engines.identity import Identity, weights_of
from distprefix.engines.store import EngineStore, config_for
from distprefix.errors import ConfigError
from tests.fake_engine import until
from tests.servers import Backend, Server

IDENTITY = Identity("vllm 0.32", "meta/Llama 3", "main", "bfloat16/auto", "2 layers", 32, "tp 0/1 pp 0/1", "sha256")
CHAIN = bytes(range(96))
"""Six chunks."""
BODIES = [bytes([i]) * 500 for i in range(6)]


@pytest.fixture
def store(own_server: Server) -> Iterator[EngineStore]:
    """A store on a server that the test may stop."""
    settings = {"url": own_server.url, "breaker_reset_s": 0.05, "payload_timeout_s": 0.5}
    store = EngineStore(config_for(IDENTITY, settings), max_waiting_bytes=1500)
    yield store
    own_server.thaw()
    store.close()


def into(count: int) -> list[bytearray]:
    """Room for payloads."""
    return [bytearray(500) for _ in range(count)]


def test_chunks_go_there_and_come_back(store: EngineStore) -> None:
    """What is stored is found and loaded, from any chunk on."""
    assert store.look_up(CHAIN).result() == 0
    assert store.store(CHAIN[:64], BODIES[:4], 0).result() == 4
    assert store.store(CHAIN, BODIES[4:], 4).result() == 6
    assert store.look_up(CHAIN).result() == 6
    assert store.look_up(CHAIN[:32] + bytes(16)).result() == 2
    room = into(4)
    assert store.load(CHAIN, room, 2).result() == 4
    assert room == BODIES[2:]
    assert store.metrics()["chunks_loaded"] == 4
    assert store.metrics()["connected"] == 1


def test_what_has_a_gap_before_it_is_dropped(store: EngineStore, own_server: Server) -> None:
    """A chunk behind one that is not stored is not stored, and counted; as is what there is no room for to wait."""
    assert store.store(CHAIN[:48], BODIES[2:3], 2).result() == 0
    assert store.counts["stores_dropped"] == 1
    own_server.freeze()
    waiting = store.store(CHAIN[:64], BODIES[:4], 0)  # however large, when nothing else waits
    assert store.store(CHAIN, BODIES[4:], 4).result() == 0
    assert store.counts["stores_dropped"] == 1 + 2
    own_server.thaw()
    assert waiting.result() == 4


def test_chunks_that_stand_alone(store: EngineStore, own_server: Server) -> None:
    """Chunks behind holes, as of a sliding window, are stored, found and loaded each by itself."""
    assert store.store_each(CHAIN[32:64], BODIES[2:4]).result() == [True, True]
    assert store.look_up_each(CHAIN).result() == [False, False, True, True, False, False]
    assert store.look_up(CHAIN).result() == 0
    room = into(3)
    assert store.load_each(CHAIN[16:64], room).result() == [False, True, True]
    assert room[1:] == BODIES[2:4]
    assert store.counts["chunks_loaded"] == 2
    own_server.freeze()
    assert store.look_up_each(CHAIN).result(10) == [False] * 6
    assert store.load_each(CHAIN[32:48], into(1)).result(10) == [False]
    assert store.store_each(CHAIN[:16], BODIES[:1]).result(10) == [False]


def test_a_frozen_server_stops_nobody(store: EngineStore, own_server: Server) -> None:
    """While the server does not answer, calls return at once, and their results are misses in time."""
    assert store.store(CHAIN[:16], BODIES[:1], 0).result() == 1
    own_server.freeze()
    began = time.monotonic()
    waiting: list[Any] = [store.look_up(CHAIN), store.load(CHAIN, into(1), 0), store.store(CHAIN, BODIES[1:2], 1)]
    assert time.monotonic() - began < 0.2
    assert [each.result(10) for each in waiting] == [0, 0, 0]
    own_server.thaw()
    until(lambda: store.look_up(CHAIN).result() == 1)
    room = into(1)
    assert store.load(CHAIN, room, 0).result() == 1
    assert room == BODIES[:1]


def test_a_server_that_comes_later(own_server: Server, caplog: pytest.LogCaptureFixture) -> None:
    """Without a server all are misses, with one warning; once it is there they are not, without a restart."""
    own_server.kill()
    store = EngineStore(config_for(IDENTITY, {"url": own_server.url}))
    other = EngineStore(config_for(replace(IDENTITY, ranks="tp 1/2"), {"url": own_server.url}))
    assert [store.look_up(CHAIN).result(), store.store(CHAIN, BODIES, 0).result(), other.look_up(CHAIN).result()] == [
        0
    ] * 3
    assert store.counts["unavailable"] == 2
    assert store.metrics()["connected"] == 0
    assert sum("KV is not shared for now" in each.message for each in caplog.records) == 1
    own_server.start()
    store._next_try = 0.0
    assert store.store(CHAIN, BODIES, 0).result() == 6
    assert store.look_up(CHAIN).result() == 6
    store.close()
    other.close()
    assert store.look_up(CHAIN).result() == 0


def test_a_password_that_is_corrected_later(own_server: Server) -> None:
    """A password that the server refuses makes misses, tried again every few seconds and not with each call."""
    store = EngineStore(config_for(IDENTITY, {"url": f"redis://engine:secret@127.0.0.1:{own_server.port}"}))
    with own_server.client() as admin:
        assert [store.look_up(CHAIN).result(), store.look_up(CHAIN).result()] == [0, 0]
        assert store._next_try > time.monotonic()
        refused: Any = admin.acl_log()
        assert sum(int(entry["count"]) for entry in refused) == 1
        admin.execute_command("ACL", "SETUSER", "engine", "on", ">secret", "~*", "+@all")
    store._next_try = 0.0
    assert store.store(CHAIN, BODIES, 0).result() == 6
    store.close()


def test_another_identity_in_the_same_namespace_is_refused_in_words(
    real_server: Backend, caplog: pytest.LogCaptureFixture
) -> None:
    """By default identities never meet; who names a namespace exactly is told what differs, and shares nothing."""
    settings = {"url": real_server.url, "namespace": real_server.namespace}
    half = replace(IDENTITY, dtype="float16/auto")
    assert config_for(IDENTITY, settings).namespace != config_for(half, settings).namespace
    one = EngineStore(config_for(IDENTITY, {**settings, "exact_namespace": True}))
    other = EngineStore(config_for(half, {**settings, "exact_namespace": True}))
    assert one.store(CHAIN, BODIES, 0).result() == 6
    assert other.look_up(CHAIN).result() == 0
    assert "dtype is 'bfloat16/auto' there and 'float16/auto' here" in caplog.text
    one.close()
    other.close()


def test_every_part_of_an_identity_counts() -> None:
    """Two that differ in anything have other namespaces; long parts are told as digests."""
    names = [spec.name for spec in fields(Identity) if spec.name != "chunk_size"]
    others = [replace(IDENTITY, **{name: "x"}) for name in names]
    others += [replace(IDENTITY, chunk_size=16), IDENTITY]
    assert len({each.namespace("kv") for each in others}) == len(others)
    assert IDENTITY.namespace("kv").startswith("kv-Llama-3-")
    assert len(replace(IDENTITY, layout="layer " * 500).text) < 400


def test_weights_of_a_folder(tmp_path: Path) -> None:
    """Two folders with other weights of the same size differ; a name without a folder has its revision."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_bytes(bytes(300_000) + name.encode())
    assert weights_of(str(tmp_path / "a")) == weights_of(str(tmp_path / "a"), "v1")
    assert weights_of(str(tmp_path / "a")) != weights_of(str(tmp_path / "b"))
    assert (weights_of("meta/llama"), weights_of("meta/llama", "v1")) == ("main", "v1")


def test_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings come from the engine's configuration, a TOML file and the environment; unknown ones are refused."""
    monkeypatch.setenv("DISTPREFIX_URL", "redis://env:1")
    config = config_for(IDENTITY, {})
    assert (config.url, config.identity) == ("redis://env:1", IDENTITY)
    assert config.max_prefix_length is None
    (tmp_path / "d.toml").write_text('[distprefix]\nurl = "redis://file:1"\nlookup_timeout_s = 0.5\n')
    config = config_for(IDENTITY, {"config": str(tmp_path / "d.toml"), "namespace": "team"})
    assert (config.url, config.lookup_timeout_s, config.namespace[:5]) == ("redis://file:1", 0.5, "team-")
    with pytest.raises(ConfigError, match="unknown setting 'rul'"):
        config_for(IDENTITY, {"rul": "redis://x"})
    with pytest.raises(ConfigError, match=r"dtype differs between .*: 'fp8' and 'bfloat16/auto'"):
        config_for(IDENTITY, {"dtype": "fp8"})
    with pytest.raises(ConfigError, match="chunk_size differs"):
        config_for(IDENTITY, {"chunk_size": 64})
    with pytest.raises(ConfigError, match="engines share a Redis"):
        EngineStore(PrefixCacheConfig())


def test_nothing_is_left_running(own_server: Server) -> None:
    """A closed store has no thread left, whatever was under way."""
    before = set(threading.enumerate())
    store = EngineStore(config_for(IDENTITY, {"url": own_server.url}))
    futures = [store.look_up(CHAIN) for _ in range(50)]
    store.close()
    assert set(threading.enumerate()) <= before
    assert all(future.done() for future in futures)
