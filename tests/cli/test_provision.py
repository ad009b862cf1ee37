"""`distprefix provision` as an operator runs it: scripts, namespaces, users and their passwords."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.redis.keys import Keys
from distprefix.redis.rights import hash_password
from distprefix.redis.scripts import SCRIPTS, load_script
from tests.commands import run_cli
from tests.faults import wait_until
from tests.servers import Server, find_server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with an empty ACL file, and the user default as servers come."""
    acl = tmp_path_factory.mktemp("acl") / "users.acl"
    acl.write_text("user default on nopass ~* &* +@all\n")
    started = Server(find_server("valkey-9.1"), "--aclfile", str(acl), tcp=True).start()
    yield started
    started.stop()


@pytest.fixture
def admin(server: Server) -> Iterator[redis.Redis]:
    """May do anything, on a server without scripts and namespaces."""
    with server.client() as client:
        client.flushall()
        client.script_flush()
        yield client


def _known(admin: redis.Redis) -> int:
    found: Any = admin.script_exists(*(load_script(name).sha for name in SCRIPTS))
    return sum(found)


def test_scripts_are_loaded_once(server: Server, admin: redis.Redis) -> None:
    """With --scripts-only all scripts are loaded, those that are there are left, and nothing else is made."""
    done = run_cli("provision", "--url", server.url, "--scripts-only")
    assert (done.returncode, done.stdout) == (0, "")
    assert f"scripts: {len(SCRIPTS)} loaded" in done.stderr
    assert _known(admin) == len(SCRIPTS)
    assert "scripts: 0 loaded" in run_cli("provision", "--url", server.url, "--scripts-only").stderr
    assert admin.dbsize() == 0


def test_keeper_loads_them_again(server: Server, admin: redis.Redis) -> None:
    """With --every missing scripts are loaded again and again, until it is stopped."""
    command = [sys.executable, "-m", "distprefix", "provision", "--scripts-only", "--every", "0.1", "--url", server.url]
    code = "from distprefix.cli import main; main()"
    keeper = subprocess.Popen([sys.executable, "-c", code, *command[3:]], stderr=subprocess.PIPE)
    try:
        for _ in range(2):
            wait_until(lambda: _known(admin) == len(SCRIPTS))
            admin.script_flush()
        wait_until(lambda: _known(admin) == len(SCRIPTS))
    finally:
        keeper.terminate()
        _, said = keeper.communicate(timeout=20)
    assert b"loaded again" in said


def test_namespaces_have_the_given_settings(server: Server, admin: redis.Redis, tmp_path: Path) -> None:
    """Settings come from --set, over those of a TOML file; a namespace that is there with others is refused."""
    toml = tmp_path / "node.toml"
    toml.write_text('[distprefix]\nchunk_size = 8\npolicy = "cost"\n')
    options = ("--config", str(toml), "--set", "chunk_size=4", "--namespace", "a", "--namespace", "b")
    done = run_cli("provision", "--url", server.url, *options)
    assert done.returncode == 0, done.stderr
    for name in ("a", "b"):
        found: Any = admin.hgetall(Keys(name).descriptor)
        assert (found[b"chunk_size"], found[b"policy"]) == (b"4", b"cost")
        assert admin.hlen(Keys(name).epochs) == 0
    again = run_cli("provision", "--url", server.url, "--namespace", "a", "--set", "chunk_size=16")
    assert again.returncode == 1
    assert "made with other settings" in again.stderr


def test_users_are_applied_and_saved(server: Server, admin: redis.Redis, tmp_path: Path) -> None:
    """With --apply the users log in with the passwords of the file, a second run keeps these, and the server saves."""
    passwords = tmp_path / "env"
    users = ("--worker-user", "w", "--inspector-user", "i", "--operator-user", "o", "--passwords-file", str(passwords))
    options = ("--namespace", "n", "--set", "chunk_size=4", "--apply", *users)
    done = run_cli("provision", "--url", server.url, *options)
    assert done.returncode == 0, done.stderr
    assert "user default may still do everything" in done.stderr
    text = passwords.read_text()
    assert stat.S_IMODE(passwords.stat().st_mode) == 0o600
    values = dict(line.split("=") for line in text.splitlines())
    assert list(values) == ["DP_WORKER_PASSWORD", "DP_INSPECTOR_PASSWORD", "DP_OPERATOR_PASSWORD"]
    assert all(len(value) == 32 for value in values.values())
    assert run_cli("provision", "--url", server.url, *options).returncode == 0
    assert passwords.read_text() == text
    (saved,) = server._command[-1:]
    assert re.findall(r"^user (\w+)", Path(saved).read_text(), re.MULTILINE) == ["default", "i", "o", "w"]
    assert not any(value in done.stdout + done.stderr + Path(saved).read_text() for value in values.values())
    url = f"redis://w:{values['DP_WORKER_PASSWORD']}@127.0.0.1:{server.port}"
    with PrefixCacheOptimizer(PrefixCacheConfig(url=url, namespace="n", chunk_size=4, strict=True)) as cache:
        cache.cache_prefix([1, 2, 3, 4])
        assert cache.find_longest_cache_hit([1, 2, 3, 4]).matched_tokens == 4
    people = f"redis://i:{values['DP_INSPECTOR_PASSWORD']}@127.0.0.1:{server.port}"
    assert json.loads(run_cli("stats", "--url", people, "--namespace", "n", "--json").stdout)["chunks"] == 1


def test_acl_file_starts_a_server(tmp_path: Path) -> None:
    """With --users-only no server is asked; a server that reads the file has the users, and default is off."""
    acl = tmp_path / "users.acl"
    passwords = tmp_path / "env"
    passwords.write_text("OTHER=1\nDP_WORKER_PASSWORD=mine\n")
    users = ("--worker-user", "w", "--reader-user", "r", "--admin-user", "root")
    files = ("--acl-file", str(acl), "--passwords-file", str(passwords))
    done = run_cli("provision", "--users-only", "--namespace", "n", *users, *files)
    assert (done.returncode, done.stdout) == (0, "")
    assert [stat.S_IMODE(path.stat().st_mode) for path in (acl, passwords)] == [0o600, 0o600]
    values = dict(line.split("=") for line in passwords.read_text().splitlines())
    assert list(values) == ["OTHER", "DP_WORKER_PASSWORD", "DP_READER_PASSWORD", "DP_ADMIN_PASSWORD"]
    assert values["DP_WORKER_PASSWORD"] == "mine"
    server = Server(find_server("redis-8.2"), "--aclfile", str(acl))
    server.log_in_as("root", values["DP_ADMIN_PASSWORD"])
    server.start()
    try:
        with redis.Redis(unix_socket_path=server.socket, username="w", password="mine") as client:
            assert client.ping()
        with redis.Redis(unix_socket_path=server.socket) as client, pytest.raises(redis.AuthenticationError):
            client.ping()
    finally:
        server.stop()


def test_new_passwords_are_shown_once(server: Server, admin: redis.Redis) -> None:
    """Without a file the ACL lines go to standard output, and the passwords that were made to standard error."""
    done = run_cli("provision", "--users-only", "--namespace", "n*", "--worker-user", "w", "--admin-user", "root")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert [line.split()[1] for line in lines] == ["default", "w", "root"]
    shown = dict(re.findall(r"(DP_\w+_PASSWORD)=(\S+)", done.stderr))
    assert list(shown) == ["DP_WORKER_PASSWORD", "DP_ADMIN_PASSWORD"]
    assert not any(password in done.stdout for password in shown.values())
    assert "~dp-secret:n*" in lines[1]


def test_password_of_the_environment_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A password in the environment wins over the file, and is shown nowhere."""
    monkeypatch.setenv("DP_WORKER_PASSWORD", "of the environment")
    passwords = tmp_path / "env"
    passwords.write_text("DP_WORKER_PASSWORD=of the file\n")
    users = ("--namespace", "n", "--worker-user", "w", "--passwords-file", str(passwords))
    done = run_cli("provision", "--users-only", *users)
    assert f"#{hash_password('of the environment')}" in done.stdout
    assert "of the" not in done.stdout + done.stderr
    assert passwords.read_text() == "DP_WORKER_PASSWORD=of the file\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "name the server with --url"),
        (("--users-only",), "--users-only makes users"),
        (("--users-only", "--worker-user", "w"), "which namespaces is the worker user for"),
        (("--users-only", "--worker-user", "w", "--namespace", "a b"), "namespace is 'a b'"),
        (("--users-only", "--worker-user", "default", "--namespace", "n"), "the worker user is 'default'"),
        (("--users-only", "--worker-user", "w", "--reader-user", "w", "--namespace", "n"), "the same name"),
        (("--scripts-only", "--namespace", "n", "--url", "redis://x"), "--scripts-only loads scripts alone"),
        (("--apply", "--url", "redis://x"), "--apply sets users"),
    ],
)
def test_options_that_do_not_go_together(options: tuple[str, ...], message: str) -> None:
    """Exit code 2, and a line that says what to pass, before anything is done."""
    done = run_cli("provision", *options)
    assert done.returncode == 2
    assert message in done.stderr


def test_settings_that_are_none(server: Server, admin: redis.Redis) -> None:
    """A --set that is no NAME=VALUE, and a name that is no setting, are refused."""
    for text, message in (("chunk_size", "write NAME=VALUE"), ("size=4", "unknown setting")):
        done = run_cli("provision", "--url", server.url, "--namespace", "n", "--set", text)
        assert done.returncode == 2
        assert message in done.stderr
