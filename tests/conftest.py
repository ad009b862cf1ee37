"""Servers and namespaces for every test that needs them."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from typing import Any

import fakeredis
import pytest
from hypothesis import HealthCheck, settings

from distprefix import Chain, PrefixCacheOptimizer
from tests.servers import DEPLOY, Backend, Server, absent, find_server

settings.register_profile(
    "distprefix",
    derandomize=os.environ.get("CI") == "true",  # the gate tries the same examples each time
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("distprefix")

_names = itertools.count()
SERVERS = ("fakeredis", "redis-7.0", "redis-8.2", "valkey-9.1", "valkey-9.1-acl")


def _start(name: str) -> Server:
    if name != "valkey-9.1-acl":
        return Server(find_server(name)).start()
    binary, config, users = find_server(name), DEPLOY / "redis.conf", DEPLOY / "users.acl"
    if not config.exists() or not users.exists():
        absent("deploy/redis.conf and deploy/users.acl are not there")
    server = Server(binary, config=config)
    acl = server.folder / "users.acl"
    shutil.copy(users, acl)
    with acl.open("a") as file:
        file.write("\nuser tests on nopass ~* &* +@all\n")
    server = _with_options(server, "--aclfile", str(acl))
    server.log_in_as("tests", "tests")
    server.user = _credentials(users.read_text())
    return server.start()


def _with_options(server: Server, *options: str) -> Server:
    server._command += options
    return server


def _credentials(users: str) -> str:
    for line in users.splitlines():
        words = line.split()
        if len(words) > 2 and words[0] == "user" and words[1] != "default" and "on" in words:
            passwords = [word[1:] for word in words if word.startswith(">")]
            return f"{words[1]}:{passwords[0] if passwords else 'any'}"
    raise AssertionError("users.acl names no user for the cache")


@pytest.fixture(scope="session")
def servers() -> Iterator[dict[str, Server]]:
    """Servers by name, started when first asked for, shared by all tests."""
    started: dict[str, Server] = {}
    yield started
    for server in started.values():
        server.stop()


@pytest.fixture
def namespace() -> str:
    """A namespace that no other test uses."""
    return f"t{os.getpid()}-{next(_names)}"


def _backend(name: str, servers: dict[str, Server], namespace: str) -> Backend:
    if name == "fakeredis":
        fake: Any = fakeredis.FakeServer()
        return Backend(name, fakeredis.FakeRedis(server=fake), namespace, client=fakeredis.FakeRedis(server=fake))
    if name not in servers:
        servers[name] = _start(name)
    return Backend(name, servers[name].client(), namespace, url=servers[name].url)


@pytest.fixture(params=SERVERS)
def any_server(request: pytest.FixtureRequest, servers: dict[str, Server], namespace: str) -> Iterator[Backend]:
    """Each kind of server in turn, with a namespace of its own."""
    backend = _backend(request.param, servers, namespace)
    yield backend
    backend.close()
    backend.admin.close()


@pytest.fixture
def real_server(servers: dict[str, Server], namespace: str) -> Iterator[Backend]:
    """The newest real server, for what need not be tried on each."""
    backend = _backend("valkey-9.1", servers, namespace)
    yield backend
    backend.close()
    backend.admin.close()


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A server that the test may freeze, kill and flush."""
    server = Server(find_server("valkey-9.1"), tcp=True).start()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def second() -> Iterator[Server]:
    """A server for cold payloads, shared by the tests that leave it running."""
    server = Server(find_server("valkey-9.1")).start()
    yield server
    server.stop()


@pytest.fixture
def plain_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes of engines name chunks as they are, so that a test reaches the same chunks by tokens."""
    named = PrefixCacheOptimizer.chain_of_hashes

    def chain_of_hashes(cache: PrefixCacheOptimizer, hashes: bytes, role: bytes = b"") -> Chain:
        return named(cache, hashes, role) if role else Chain.packed(hashes)

    monkeypatch.setattr(PrefixCacheOptimizer, "chain_of_hashes", chain_of_hashes)
