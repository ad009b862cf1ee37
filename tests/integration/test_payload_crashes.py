"""A node that is killed before any command of a demotion, promotion or store: nothing is lost, wrong or left over."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from random import Random
from typing import Any

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer, operations
from distprefix.redis.client import Client
from distprefix.redis.data import DataPool
from distprefix.redis.scripts import load_script
from distprefix.redis.transfers import Sink
from distprefix.tiers.elsewhere import Elsewhere
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.forks import ROOT, run_function
from tests.integration.test_payload_stress import everything_ends_well
from tests.payloads import ALWAYS, MIB, data, demote, loaded, meta, names
from tests.servers import Backend, Server, find_server

TOKENS, DROPPED = prompt(3), [9] * 8
CLAIM_S = 0.5
SCRIPTS = sorted(path.stem for path in (ROOT / "lua").glob("*.lua"))
_WANTED = {
    ("demote", "here"): {"idle", "SET NX", "read", "write", "move", "DEL"},
    ("demote", "elsewhere"): {
        *("idle", "SET NX", "read", "write", "move", "DEL", "HGETALL", "GETRANGE", "PERSIST", "settled", "SRANDMEMBER"),
        *("EXPIRE", "dropped"),
    },
    ("promote", "here"): {"where", "read", "write", "move"},
    ("promote", "elsewhere"): {"where", "read", "write", "move"},
    ("store", "here"): {"where", "write", "store"},
    ("store", "elsewhere"): {"where", "write", "store"},
}
"""What a node must be seen to do, so that it was killed before each of these."""


@cache
def bodies() -> list[bytes]:
    """The prompt's payloads; the one in the middle has two parts."""
    return [*data(TOKENS[:4]), Random(1).randbytes(9 * MIB), *data(TOKENS)[2:]]


class Steps:
    """Prints what a process is about to send, and kills it before step `last`."""

    def __init__(self, last: int) -> None:
        self._left = last

    def take(self, name: str) -> None:
        """One more."""
        if not self._left:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1
        print(name, flush=True)  # noqa: T201 - the parent reads it


def act() -> None:
    """What the child does: open a node, and die before the step `last` of a demotion, promotion or store."""
    action = sys.argv[1]
    settings: dict[str, Any] = json.loads(sys.argv[2])
    last = int(sys.argv[3])
    node = PrefixCacheOptimizer(PrefixCacheConfig(**settings, worker_id="dies"))
    steps, (command, ask, write, read) = Steps(last), (Client.command, Elsewhere._ask, DataPool.set, DataPool.get)
    scripts = {load_script(name, with_flags=True).sha: name for name in SCRIPTS}

    def counted_command(self: Client, *args: Any, deadline: float, reads: bool | None = None) -> Any:
        name = scripts[args[1]] if args[0].startswith("EVALSHA") else args[0]
        steps.take("SET NX" if "NX" in args[:4] else name)
        return command(self, *args, deadline=deadline, reads=reads)

    def counted_ask(self: Elsewhere, deadline: float, *args: Any) -> Any:
        steps.take(args[0])
        return ask(self, deadline, *args)

    def counted_write(self: DataPool, values: Sequence[Any], *args: Any, **options: Any) -> list[bool]:
        written: list[bool] = []
        for value in values:
            steps.take("write")
            written += write(self, [value], *args, **options)
        return written

    def counted_read(
        self: DataPool, keys: Sequence[str], sink: Sink, deadline: float, expected: Sequence[int] | None = None
    ) -> list[int]:
        steps.take("read")
        return read(self, keys, sink, deadline, expected)

    Client.command, Elsewhere._ask, DataPool.set, DataPool.get = (
        counted_command,
        counted_ask,
        counted_write,
        counted_read,
    )
    if action == "demote":
        node.demote(ALWAYS)
    elif action == "promote":
        node.promote(TOKENS)
    else:
        node.store(TOKENS, bodies())
    sys.stdout.flush()
    os._exit(0)


def run(action: str, backend: Backend, last: int, **settings: Any) -> list[str]:
    """What a node did before it was killed, or finished. It must have been killed if `last` is not negative."""
    options: dict[str, Any] = {
        **{"url": backend.url, "namespace": backend.namespace, "chunk_size": 4, "strict": True},
        **{"lookup_timeout_s": 20, "publish_timeout_s": 20, "feed_interval_s": 0, "touch_interval_s": 0},
        **{"payload_timeout_s": 20.0 if action == "store" else CLAIM_S, **settings},
    }
    child = run_function(f"{__name__}:act", action, json.dumps(options), str(last), timeout_s=60)
    assert child.returncode == (0 if last < 0 else -signal.SIGKILL), child.stderr
    return child.stdout.split("\n")[:-1]


def prepare(action: str, backend: Backend, node: PrefixCacheOptimizer) -> None:
    """What there is before the node that dies begins; for a demotion something in the trash as well."""
    assert node.store(DROPPED, data(DROPPED)) == 2
    if action == "store":
        return
    assert demote(backend, node) == 2
    node._state.link.publish(operations.trim(bytes.fromhex(heads(DROPPED)[0]), "@cold", 1))
    assert node.store(TOKENS, bodies()) == 3
    if action == "promote":
        assert demote(backend, node) == 3


def finish(action: str, backend: Backend, node: PrefixCacheOptimizer) -> None:
    """Another node does what the one that died did not, once claims have ended."""
    while names(backend.admin, backend, "moving:"):
        assert all(
            backend.admin.pttl(backend.keys.base + key) != -1 for key in names(backend.admin, backend, "moving:")
        )
        time.sleep(0.02)
    if action == "demote":
        while node.demote(ALWAYS):
            pass
        assert meta(backend, "warm") == 0 < meta(backend, "cold")
    else:
        assert (node.promote(TOKENS) >= 0) if action == "promote" else (node.store(TOKENS, bodies()) == 3)
        assert meta(backend, "cold") == 0 < meta(backend, "warm")


@pytest.fixture
def second() -> Iterator[Server]:
    """A server for cold payloads."""
    server = Server(find_server("valkey-9.1")).start()
    yield server
    server.stop()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("tier", ["here", "elsewhere"])
@pytest.mark.parametrize("action", ["demote", "promote", "store"])
@pytest.mark.parametrize(
    "every_step", [pytest.param(False, id="each-kind"), pytest.param(True, id="every-step", marks=pytest.mark.long)]
)
def test_a_node_is_killed_before_any_step(
    real_server: Backend, second: Server, action: str, tier: str, every_step: bool
) -> None:
    """Whatever was the last thing that it sent, another node has right bytes, finishes the work, and nothing leaks."""
    options: dict[str, Any] = {"cold_url": second.url} if tier == "elsewhere" else {}
    cold = second.client() if tier == "elsewhere" else None
    for name in SCRIPTS:  # so that no run takes more steps than another one
        real_server.admin.script_load(load_script(name, with_flags=True).body)
    steps: list[str] = []
    at, last = 0, -1
    todo = [-1]  # first see what there is to do
    while todo:
        last = todo.pop()
        backend = Backend(real_server.name, real_server.admin, f"{real_server.namespace}-{at}", url=real_server.url)
        at += 1
        node = backend.open("lives", **options)
        prepare(action, backend, node)
        done = run(action, backend, last, **options)
        if last < 0:
            steps = done
            assert set(steps) >= _WANTED[action, tier]
            last_write = len(steps) - 1 - steps[::-1].index("write")
            some = {last_write, *(steps.index(name) for name in steps)}
            todo = list(range(len(steps))) if every_step else sorted(some)
        else:
            assert len(done) == last
        found = loaded(node, TOKENS)
        assert found == (bodies()[: len(found)] if action == "store" and last >= 0 else bodies()), (last, steps)
        finish(action, backend, node)
        everything_ends_well(backend, node, cold)
        assert loaded(node, TOKENS) == bodies()
        node.clear()
        backend.close()
    assert at > 3
