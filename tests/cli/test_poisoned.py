"""Commands against a server where somebody wrote what no worker writes: they end in order and steer no terminal."""

from __future__ import annotations

import array
import itertools
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import msgpack
import pytest
import redis
from typer.testing import CliRunner

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.cli.app import app
from distprefix.cli.output import console
from distprefix.redis.client import Client
from distprefix.redis.keys import NAMESPACES, Keys
from distprefix.redis.metrics import write_metrics
from tests.servers import Server, find_server

NAMES = b"\x1b]0;owned\x07\x9b2J[/red]\xe2\x80\xae[link=http://x]\xff"
"""Escape sequences of 7 and of 8 bits, markup, a mark of direction, a byte that is no UTF-8."""


def _packed(value: Any) -> bytes:
    return cast("bytes", msgpack.packb(value))


NOW = b"<now>"
"""What a worker's report begins with is put here: then it is fresh."""
PACKED = (
    *(b"\x91" * 20_000 + b"\xc0", b"\x81" * 50, b"\xdd\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff", b"\xc1"),
    *(b"\xc7\x05\x01hello", b"\xd4\xff\x00", _packed(msgpack.Timestamp(2**33)), _packed([1, [2]])),
    *(_packed(value) for value in ({1: 2}, {b"\xff": NAMES}, {NAMES.decode("latin-1"): 1}, {"model": NAMES})),
    _packed({"lookups": float("nan"), "hits": float("inf"), "l1_bytes": [], "breakers": 7, "hit_rate": "x"}),
    _packed({"breakers": {"[/x]": "\x1b[31m", "y": []}, "lookups": "[/x]", "lag_s": -(2**63)}),
    _packed({"lag_s": float("nan"), "running": 2**64 - 1}),
)
VALUES = (
    *(b"", b"\0", b"-1", b"0", b"1", b"1e309", b"nan", b"-inf", b"1.5", b" 7", b"9" * 25, b"9" * 5000, b"x", b"\xff"),
    *("²".encode(), NAMES, b"a\nb\r\n{}*?:", b"C" * 70_000, b"%d" % 2**63, b"1:-1", b":", b"0:1", b"1:" + b"9" * 30),
    *(b"\xff" * 160, b"1:1:1", b"f" * 32, *PACKED, *(NOW + each for each in PACKED)),
)
FIELDS = (
    b"h:" + NAMES,
    b"b:@warm",
    b"e:w/0@gpu",
    b"l:x",
    b"o",
    b"root",
    b"f" * 32,
    NAMES,
    b"w/\xc2\xb2",
    b"w/" + b"9" * 5000,
)
TYPES = ("none", "hash", "string", "list", "zset", "set", "stream")
PROMPT = list(range(48))


@dataclass
class Scene:
    """A server with every kind of key, as workers and an ingester wrote them."""

    server: Server
    admin: redis.Redis
    commands: dict[str, list[tuple[str, ...]]]
    """Of each command the ways to call it."""
    dump: dict[bytes, tuple[bytes, int]]

    def restore(self) -> None:
        """All is again as it was written."""
        self.admin.flushall()
        for key, (value, ttl_ms) in self.dump.items():
            self.admin.restore(key, ttl_ms, cast("str", value))

    def poison(self, key: bytes, field: bytes, value: bytes) -> None:
        """Write a value where no worker would; a key keeps its type."""
        admin: Any = self.admin
        kind = admin.type(key)
        value = value.replace(NOW, b"%d:" % (1000 * time.time()))
        if kind == b"hash":
            admin.hset(key, field, value)
        elif kind == b"string":
            admin.set(key, value)
        elif kind == b"zset":
            admin.zadd(key, {value or field: random.choice(("-inf", "inf", "0", "1e300", "99999999999999999"))})
        elif kind == b"set":
            admin.sadd(key, value)
        elif kind == b"stream":
            admin.xadd(key, {field or b"n": value})

    def retype(self, key: bytes, kind: str) -> None:
        """Let a key have another type."""
        admin: Any = self.admin
        admin.delete(key)
        writes = {
            "string": lambda: admin.set(key, NAMES),
            "list": lambda: admin.rpush(key, NAMES),
            "zset": lambda: admin.zadd(key, {NAMES: 1}),
            "hash": lambda: admin.hset(key, NAMES, NAMES),
            "set": lambda: admin.sadd(key, NAMES),
            "stream": lambda: admin.xadd(key, {NAMES: NAMES}),
        }
        if kind in writes:
            writes[kind]()

    def fields(self, key: bytes) -> list[bytes]:
        """The fields of a hash; one that does not matter for any other key."""
        admin: Any = self.admin
        return sorted(admin.hkeys(key)) if admin.type(key) == b"hash" else [b""]


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Workers with leases, payloads, pins and reports, and an engine whose events were followed."""
    folder = tmp_path_factory.mktemp("poisoned")
    server = Server(find_server("valkey-9.1")).start()
    with server.client() as admin:
        _populate(server, admin, folder)
        commands = _commands(server.url, admin, folder)
        dump: Any = {key: (admin.dump(key), max(0, admin.pttl(key))) for key in admin.keys("*")}
        yield Scene(server, admin, commands, dump)
    server.stop()


def _populate(server: Server, admin: redis.Redis, folder: Path) -> None:
    settings: dict[str, Any] = {"chunk_size": 4, "touch_interval_s": 0, "feed_interval_s": 0, "cold_codec": "raw"}
    settings |= {"lookup_timeout_s": 10.0, "publish_timeout_s": 10.0, "prewarm_threshold": 1}
    events = [
        time.time(),
        [["BlockStored", [11, 12], None, list(range(900, 908)), 4, None, "GPU", None, [None, None]]],
        0,
    ]
    stream = folder / "events.jsonl"
    stream.write_text(json.dumps({"seq": 0, "payload_hex": _packed(events).hex()}) + "\n")
    config = PrefixCacheConfig(url=server.url, worker_id="w", **settings)
    with (
        PrefixCacheOptimizer(config) as worker,
        PrefixCacheOptimizer(config.__class__(url=server.url, worker_id="v", **settings)) as other,
    ):
        worker.register_worker(address="10.0.0.7:1", model="tiny", load={"running": 2}, lease_s=3600)
        worker.cache_prefix(PROMPT, range(12), metadata={"model": "tiny"})
        other.cache_prefix([*PROMPT[:24], *range(500, 512)])
        worker.store(PROMPT, [bytes(64)] * 12)
        other.demote(idle_s=0)
        worker.pin([*PROMPT[:24], *range(500, 512)])
        other.find_longest_cache_hit(PROMPT)
        other.flush()
        calls = Client(admin)
        for name in ("w/0@gpu", "w/0@gpu 1", "v/0@gpu"):
            write_metrics(calls, Keys("default"), name, worker.get_metrics(), time.monotonic() + 5)
        run = CliRunner().invoke(app, ["ingest", "--url", server.url, "--file", str(stream), "--worker", "eng"])
        assert run.exit_code == 0, run.output
        kept: Any = {key: (admin.dump(key), max(0, admin.pttl(key))) for key in admin.keys("*")}
    admin.flushall()  # a worker that closes takes back its lease and its report
    for key, (value, ttl_ms) in kept.items():
        admin.restore(key, ttl_ms, value)


def _commands(url: str, admin: redis.Redis, folder: Path) -> dict[str, list[tuple[str, ...]]]:
    """Ways to call every command that reads a namespace, those that change it last."""
    prompt = folder / "prompt.json"
    prompt.write_text(json.dumps(PROMPT))
    base = f"{Keys('default').base}n:"
    head = min(key.decode().removeprefix(base) for key in cast("list[bytes]", admin.keys(f"{base}*")))
    where = ("--url", url)
    return {
        "stats": [where],
        "tree": [(*where, "--depth", "20")],
        "top": [(*where, "--count", "2", "--interval", "0.1")],
        "workers": [where],
        "node": [(*where, head), (*where, head[:8])],
        "lookup": [(*where, str(prompt))],
        "namespaces": [where],
        "maintain": [(*where, "--repair"), (*where, "--max-chunks", "5")],
        "restored": [(*where, "--all")],
    }


OTHERS = {"audit", "demo", "ingest", "provision", "purge", "replay"}
"""Commands that work in a namespace of their own, or write: below."""


def _check(arguments: list[str], codes: tuple[int, ...] = (0, 1)) -> str:
    """Run a command; what it printed."""
    run = CliRunner().invoke(app, arguments)
    assert run.exception is None or isinstance(run.exception, SystemExit), (arguments, run.exc_info)
    assert run.exit_code in codes, (arguments, run.output)
    strange = {each for each in run.output if not each.isprintable() and each != "\n"}
    assert not strange, (arguments, run.output)
    if "--json" in arguments and run.exit_code == 0:
        for line in run.stdout.splitlines():
            json.loads(line, parse_constant=pytest.fail)
    return run.output


_forms = itertools.cycle(((), ("--json",), ("--json",), ()))


def _check_all(scene: Scene) -> None:
    """Run every command, in one of its forms in turn."""
    for name, calls in scene.commands.items():
        for call in calls:
            _check([name, *call, *next(_forms)], codes=(0, 1, 2) if name == "lookup" else (0, 1))


def test_every_command_is_here(scene: Scene) -> None:
    """A command that is added has to be tried too."""
    names = {cast("Any", each.callback).__name__ for each in app.registered_commands}
    assert names == {*scene.commands, *OTHERS}


def test_sound_data_end_well(scene: Scene) -> None:
    """Without poison every one of the calls finds something: what follows tries the code that reads it."""
    scene.restore()
    for name, calls in scene.commands.items():
        for call in calls:
            for more in ((), ("--json",)):
                _check([name, *call, *more], codes=(0,))


def _keys(scene: Scene) -> list[bytes]:
    return sorted(scene.dump)


def _try_value(scene: Scene, keys: list[bytes], value: bytes, chosen: random.Random) -> None:
    """One value in a field of each of these keys, and in a field that none has."""
    scene.restore()
    for key in keys:
        scene.poison(key, chosen.choice(scene.fields(key)), value)
        scene.poison(key, chosen.choice(FIELDS), value)
    _check_all(scene)


@pytest.mark.parametrize("value", VALUES[::4], ids=lambda value: value[:12].hex())
def test_values(scene: Scene, value: bytes) -> None:
    """A value of any kind in every key at once, but for what says that there is a namespace."""
    keys = [key for key in _keys(scene) if not key.startswith(NAMESPACES[:-1].encode())]
    _try_value(scene, keys, value, random.Random(7))


@pytest.mark.parametrize("kind", [*TYPES[:2], *(pytest.param(kind, marks=pytest.mark.long) for kind in TYPES[2:])])
def test_types(scene: Scene, kind: str) -> None:
    """Keys of another type, or gone: each kind of key by itself, as one may hide what another does."""
    for _, keys in itertools.groupby(_keys(scene), lambda key: key.rpartition(b":")[0]):
        scene.restore()
        for key in keys:
            scene.retype(key, kind)
        _check_all(scene)


def test_descriptors(scene: Scene) -> None:
    """Each field of what a namespace was made with has a value that no worker writes."""
    descriptor = Keys("default").descriptor.encode()
    values = itertools.cycle((b"", b"0", NAMES, b"9" * 25, "²".encode()))
    for field in (*scene.fields(descriptor), b"max_run", b"chunk_size", b"chunk_size"):
        scene.restore()
        scene.poison(descriptor, field, next(values))
        _check_all(scene)


def test_nodes_that_lead_to_themselves(scene: Scene) -> None:
    """Junctions that name each other's nodes, and the root, end every walk over the tree."""
    scene.restore()
    keys = Keys("default")
    nodes = [key for key in scene.dump if key.startswith(f"{keys.base}n:".encode())]
    for key in scene.dump:
        if key.startswith(f"{keys.base}j:".encode()):
            for node in nodes:
                scene.poison(key, node.rpartition(b":")[2], b"")
            scene.poison(key, b"root", b"")
    _check_all(scene)


def test_names_are_shown_escaped(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker's address and model, and a holder, are shown as they are: as text, escaped."""
    scene.restore()
    keys = Keys("default")
    scene.poison(keys.member("w/0").encode(), b"model", NAMES)
    scene.poison(keys.member("w/0").encode(), b"address", b"[bold]x\x1b[2J")
    url = scene.commands["stats"][0]
    monkeypatch.setattr(console, "width", 200)
    shown = _check(["workers", *url])
    assert r"\x1b]0;owned\x07" in shown
    assert "[/red]" in shown
    assert r"[bold]x\x1b[2J" in shown
    (found,) = (each for each in json.loads(_check(["workers", *url, "--json"])) if each["worker"] == "w")
    assert found["address"] == "[bold]x\x1b[2J"


def test_commands_that_write(scene: Scene, tmp_path: Path) -> None:
    """Ingest, demo, replay and what operators run end in order on a poisoned server as well."""
    scene.restore()
    keys = Keys("default")
    for key in scene.dump:
        scene.poison(key, NAMES, NAMES)
    scene.poison(keys.descriptor.encode(), b"fingerprint", NAMES)
    trace = tmp_path / "trace.jsonl"
    trace.write_text(json.dumps({"timestamp": 0, "input_length": 4, "output_length": 1, "hash_ids": [0]}) + "\n")
    events = [time.time(), [["BlockStored", [13], 12, list(range(908, 912)), 4, None, "GPU", None, [None]]], 0]
    stream = tmp_path / "events.jsonl"
    stream.write_text(json.dumps({"seq": 1, "payload_hex": _packed(events).hex()}) + "\n")
    where = scene.commands["stats"][0]
    _check(["ingest", *where, "--file", str(stream), "--worker", "eng"], codes=(0, 1, 2))
    _check(["replay", *where, str(trace), "--nodes", "1"])
    _check(["demo", *where, "--sessions", "1", "--turns", "1", "--nodes", "1"])
    for form in ((), ("--json",)):
        _check(["audit", *where, *form])
    _check(["provision", *where, "--namespace", "default"], codes=(0, 1, 2))
    _check(["maintain", "--server", *where])
    _check(["purge", "default", *where, "--yes"])


@pytest.mark.long
@pytest.mark.parametrize("seed", range(2))
def test_every_value(scene: Scene, seed: int) -> None:
    """Every value in each kind of key by itself, of which each seed tries some."""
    chosen = random.Random(seed)
    kinds = itertools.groupby(_keys(scene), lambda key: key.rpartition(b":")[0])
    for number, (_, keys) in enumerate([(kind, list(keys)) for kind, keys in kinds]):
        for value in VALUES[(seed + number) % 8 :: 8]:
            _try_value(scene, keys, value, chosen)


def test_block_ids_are_columns(scene: Scene) -> None:
    """Columns of a node that are no whole numbers of four bytes are problems that repair names."""
    scene.restore()
    node = next(key for key in sorted(scene.dump) if key.startswith(f"{Keys('default').base}n:".encode()))
    scene.poison(node, b"b:@warm", array.array("B", [255] * 7).tobytes())
    run = CliRunner().invoke(app, ["maintain", "--repair", "--json", *scene.commands["stats"][0]])
    assert "more block ids" in run.stdout or json.loads(run.stdout.splitlines()[0])["problems"]
