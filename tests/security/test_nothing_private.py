"""After a broad run neither Redis nor any output has a token, a salt, a secret or a key in it."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import msgpack
import pytest
from typer.testing import CliRunner

from distprefix import PrefixCacheOptimizer
from distprefix.cli.app import app
from distprefix.engines.identity import Identity
from distprefix.engines.store import EngineStore, config_for
from distprefix.errors import DistPrefixError
from tests.servers import Backend

TOKENS = [3_141_592_653 + 7_919 * number for number in range(64)]
EVENT_TOKENS = [2_718_281_828 + 104_729 * number for number in range(32)]
SALT = "salt-of-the-tenant-zq"
REQUEST_SALT = "salt-of-the-request-zq"
CACHE_SALT = "cache-salt-of-the-request-zq"
SECRET = "secret-of-the-cluster-zq"
KEY = "6b" * 32
PRIVATE = (SALT, REQUEST_SALT, CACHE_SALT, SECRET, KEY, f"1:{KEY}")


def needles() -> list[bytes]:
    """What must be nowhere: secrets as text, their bytes, and tokens as numbers, text and MessagePack."""
    found = [text.encode() for text in PRIVATE] + [bytes.fromhex(KEY)]
    for token in (*TOKENS, *EVENT_TOKENS):
        found += [str(token).encode(), token.to_bytes(4, "little"), token.to_bytes(4, "big")]
    return found


def in_redis(backend: Backend) -> bytes:
    """Every name, field and value on the server that is of this test."""
    admin: Any = backend.admin
    parts: list[bytes] = []
    for name in admin.scan_iter(count=1000):
        kind = admin.type(name).decode()
        read = {
            "string": lambda name=name: [admin.get(name)],
            "hash": lambda name=name: [part for pair in admin.hgetall(name).items() for part in pair],
            "zset": lambda name=name: admin.zrange(name, 0, -1),
            "set": lambda name=name: list(admin.smembers(name)),
            "list": lambda name=name: admin.lrange(name, 0, -1),
            "none": list,  # it expired meanwhile
            "stream": lambda name=name: [
                part for _, fields in admin.xrange(name) for pair in fields.items() for part in pair
            ],
        }[kind]
        parts += [name, *read()]
    return b"\n".join(parts)


def run_broadly(backend: Backend, folder: Path) -> str:
    """Library, engine store, events and every command that reads. Returns what commands printed."""
    quiet: dict[str, Any] = {"secret": SECRET, "salt": SALT, "request_salt": REQUEST_SALT, "strict": False}
    settings = {**quiet, "encryption_keys": f"1:{KEY}", "prewarm_threshold": 1, "cold_codec": "raw"}
    worker = backend.open("w1", worker_lease_s=30.0, **settings)
    worker.register_worker(address="http://w1", model="m")
    worker.cache_prefix(TOKENS, range(16), {"kind": "chat"})
    worker.cache_prefix([*TOKENS[:20], *TOKENS[:4]])
    salted = worker.chain_of(TOKENS, lora_name="a", cache_salt=CACHE_SALT)
    worker.cache_prefix(salted)
    worker.store(TOKENS, [bytes([number]) * 100 for number in range(16)])
    worker.demote(0.0)
    hit = worker.find_longest_cache_hit(TOKENS)
    with hit.lease(5):
        worker.pin(TOKENS)
    for _ in range(2):
        worker.find_longest_cache_hit(salted)
    worker.find_longest_cache_hit([9] * 16).claim(5).release()
    worker.load(TOKENS)
    worker.flush()
    worker.prewarm()
    shown = [repr(worker), repr(worker.config), repr(hit), repr(worker._state.link.hasher), str(worker.get_metrics())]
    shown += [repr(entry) for entry in worker.get_prewarm_candidates()]
    for wrong in ({"salt": "x"}, {"secret": "another " + "secret" * 3}, {"chunk_size": 8}):
        with pytest.raises(DistPrefixError) as caught:
            PrefixCacheOptimizer(backend.config("w9", **{**settings, **wrong}))
        shown.append(str(caught.value))
    engine = EngineStore(config_for(Identity("e", "m", "w", "", "l", 16, "r", "h"), {"url": backend.url, "salt": SALT}))
    engine.store(bytes(range(64)), [b"x" * 50] * 4, 0).result(20)
    engine.close()
    return "\n".join([*shown, *commands(backend, folder)])


def commands(backend: Backend, folder: Path) -> list[str]:
    """What commands print."""
    prompt = folder / "prompt.json"
    prompt.write_text(json.dumps(TOKENS))
    event = ["BlockStored", [1, 2], None, EVENT_TOKENS, 16, None, "GPU", None, [None, None]]
    events = folder / "events.jsonl"
    events.write_text(json.dumps({"seq": 0, "payload_hex": msgpack.packb([time.time(), [event], 0]).hex()}) + "\n")  # pyright: ignore[reportOptionalMemberAccess]
    env = {"DISTPREFIX_SECRET": SECRET, "DISTPREFIX_SALT": SALT, "DISTPREFIX_REQUEST_SALT": REQUEST_SALT}
    where = ("--url", backend.url or "")
    mine = (*where, "--namespace", backend.namespace)
    calls: list[tuple[str, ...]] = [
        *(("stats", *mine), ("tree", *mine), ("top", *mine, "--count", "1"), ("workers", *mine)),
        *(("lookup", *mine, str(prompt)), ("lookup", *mine, str(prompt), "--cache-salt", CACHE_SALT)),
        *(("ingest", *mine, "--file", str(events), "--worker", "e"), ("namespaces", *where), ("audit", *mine)),
        *(
            ("maintain", *mine, "--repair"),
            ("stats", *where, "--namespace", "nope"),
            ("ingest", *mine, "--file", "/nope"),
        ),
    ]
    shown: list[str] = []
    for call in calls:
        for form in ((), ("--json",)):
            done = CliRunner().invoke(app, [*call, *form], env=env)
            assert done.exception is None or isinstance(done.exception, SystemExit)
            shown.append(done.output)
    return shown


def test_nothing_private_is_anywhere(real_server: Backend, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of Redis, all output, all of the log at its most talkative, and all metrics are searched."""
    with caplog.at_level(logging.DEBUG):
        shown = run_broadly(real_server, tmp_path)
    places = {"redis": in_redis(real_server), "output": shown.encode(), "log": caplog.text.encode()}
    assert len(places["redis"]) > 5000
    assert len(places["output"]) > 5000
    found = [(place, needle) for place, text in places.items() for needle in needles() if needle in text]
    assert not found


def test_the_search_finds_what_is_there(real_server: Backend) -> None:
    """What is searched for would be found: in names, fields, values of every type."""
    admin: Any = real_server.admin
    keys = [f"dp:private-{number}" for number in range(6)]
    admin.set(keys[0], SALT)
    admin.hset(keys[1], SECRET, "x")
    admin.zadd(keys[2], {str(TOKENS[3]): 1})
    admin.sadd(keys[3], bytes.fromhex(KEY))
    admin.xadd(keys[4], {"x": TOKENS[5].to_bytes(4, "little")})
    admin.set(keys[5] + CACHE_SALT, "x")
    text = in_redis(real_server)
    admin.delete(*keys, keys[5] + CACHE_SALT)
    for needle in (SALT.encode(), SECRET.encode(), str(TOKENS[3]).encode(), bytes.fromhex(KEY), CACHE_SALT.encode()):
        assert needle in text
    assert TOKENS[5].to_bytes(4, "little") in text
