"""Users have the rights that they need and no other: each is taken away in turn, and its lack is noticed."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from redis.exceptions import NoPermissionError

from distprefix.errors import ConfigError
from distprefix.redis.keys import PROBE, Keys
from distprefix.redis.provision import load_scripts
from distprefix.redis.rights import Role, User, hash_password, rules_of
from distprefix.redis.scripts import SCRIPTS, load_script
from tests.lengths import short_or_long
from tests.rights import NAMESPACE, OTHER, WORK, Work, prepare
from tests.servers import Server, find_server

SPACES: dict[Role, tuple[str, ...]] = {
    Role.WORKER: (NAMESPACE, OTHER),
    Role.READER: (NAMESPACE,),
    Role.INSPECTOR: (NAMESPACE,),
    Role.OPERATOR: (),
}
SERVERS = ("redis-7.0", "redis-8.2", "valkey-9.1")
NOT_RIGHTS = ("resetkeys", "resetchannels", "-@all")
SECRET = b"bytes of a prompt"


@pytest.fixture(scope="module")
def valkey() -> Iterator[Server]:
    """A server whose users a test may change."""
    server = Server(find_server("valkey-9.1"), tcp=True).start()
    yield server
    server.stop()


@pytest.fixture(scope="module", params=SERVERS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """Each kind of server, with a user of each kind for one namespace whose password is its name."""
    server = Server(find_server(request.param), tcp=True).start()
    with server.client() as admin:
        load_scripts(admin)
        for role in SPACES:
            user = User(role, role, (NAMESPACE,), hash_password(role))
            admin.execute_command("ACL", "SETUSER", user.name, *user.rules)
        for namespace in (NAMESPACE, OTHER):
            keys = Keys(namespace)
            admin.set(keys.payload("00"), SECRET)
            admin.set(keys.payload("00", cold=True), SECRET)
            admin.hset(keys.secret, "secret", "x")
            admin.hset(keys.node("00"), "r", "x")
    yield server
    server.stop()


def _login(server: Server, role: Role) -> redis.Redis:
    return redis.Redis(port=server.port, username=role, password=role)


def _refused_in(server: Server, role: Role, rules: list[str], folder: Path) -> tuple[Work, list[str]]:
    """Do a role's work with these rights. Returns it, and what the server refused to the user."""
    with server.client() as admin:
        prepare(admin, server.url, folder)
        if role in (Role.READER, Role.INSPECTOR):
            WORK[Role.WORKER](Work(server.url, folder))  # for them to have something to read
            admin.delete(*admin.scan_iter(match=f"*{{{OTHER}*", count=1000), Keys(OTHER).descriptor)
        admin.execute_command("ACL", "SETUSER", role, "reset", "on", f">{role}", *rules)
        admin.execute_command("ACL", "LOG", "RESET")
        work = Work(f"redis://{role}:{role}@127.0.0.1:{server.port}", folder)
        WORK[role](work)
        admin.execute_command("CLIENT", "KILL", "USER", role)
        log: Any = admin.execute_command("ACL", "LOG")
    entries = [dict(zip(entry[::2], entry[1::2], strict=True)) for entry in log]
    return work, [f"{entry[b'reason'].decode()} {entry[b'object'].decode()}" for entry in entries]


@pytest.mark.parametrize("role", WORK, ids=str)
def test_nothing_is_refused_to_a_user_with_all_its_rights(valkey: Server, role: Role, tmp_path: Path) -> None:
    """A broad workload of each kind of user meets no denial, and all of it works."""
    work, refused = _refused_in(valkey, role, list(rules_of(role, SPACES[role])), tmp_path)
    assert refused == []
    assert work.failed == []


@short_or_long("share", 3, 1)
@pytest.mark.parametrize("role", WORK, ids=str)
def test_no_right_is_without_use(valkey: Server, role: Role, share: int, tmp_path: Path) -> None:
    """Without any one command or pattern of keys the same workload meets a denial: the short form tries a third."""
    rules = list(rules_of(role, SPACES[role]))
    rights = [rule for rule in rules if rule not in NOT_RIGHTS]
    useless: list[str] = []
    for right in random.sample(rights, len(rights) // share):
        _, refused = _refused_in(valkey, role, [rule for rule in rules if rule != right], tmp_path)
        if not refused:
            useless.append(right)
    assert useless == []


@pytest.mark.parametrize("role", SPACES, ids=str)
@pytest.mark.parametrize(
    "command",
    [
        *("FLUSHALL", "FLUSHDB", "CONFIG GET maxmemory", "CONFIG SET maxmemory 1", "ACL LIST", "ACL SETUSER x"),
        *("SHUTDOWN NOSAVE", "KEYS *", "MONITOR", "CLIENT LIST", "CLIENT KILL ID 1", "SCRIPT FLUSH", "SCRIPT KILL"),
        *("EVAL x 0", "EVAL_RO x 0", "FUNCTION LOAD x", "FCALL x 0", "SUBSCRIBE dp:x", "PUBLISH dp:x y", "SLOWLOG GET"),
        *("HGETALL other", "HSET other a b", "DEL other", "HGETALL dp2:x", "REPLICAOF NO ONE"),
        *("DUMP dp:x", "RESTORE dp:x 0 x", "RENAME dp:x dp:y", "COPY dp:x dp:y", "SORT dp:x", "SELECT 1"),
    ],
)
def test_administration_is_refused(server: Server, role: Role, command: str) -> None:
    """No user of ours administers the server, subscribes, runs Lua of its own, or touches keys of other programs."""
    with _login(server, role) as client, pytest.raises(NoPermissionError):
        client.execute_command(*command.split())


@pytest.mark.parametrize("role", [Role.WORKER, Role.READER], ids=str)
@pytest.mark.parametrize("command", [("SCAN", "0"), ("SCRIPT", "LOAD", "return 1"), ("DBSIZE",), ("RANDOMKEY",)])
def test_programs_see_no_names_and_load_no_scripts(server: Server, role: Role, command: tuple[str, ...]) -> None:
    """Neither workers nor routers list the keys of the server, nor bring Lua of their own."""
    with _login(server, role) as client, pytest.raises(redis.ResponseError, match="permission"):
        client.execute_command(*command)


@pytest.mark.parametrize("role", [Role.WORKER, Role.READER, Role.INSPECTOR], ids=str)
def test_other_namespaces_are_out_of_reach(server: Server, role: Role) -> None:
    """Nothing of another namespace is read, written or removed, not by a script either."""
    keys = Keys(OTHER)
    commands: tuple[tuple[str, ...], ...] = (
        *(("GET", keys.payload("00")), ("HGETALL", keys.node("00")), ("HGETALL", keys.descriptor)),
        *(("HGETALL", keys.secret), ("HSET", keys.descriptor, "a", "b"), ("UNLINK", keys.meta)),
        *(("EVALSHA_RO", load_script("walk").sha, "1", keys.meta, "x"), ("ZRANGE", "dp:namespaces", "0", "-1")),
    )
    with _login(server, role) as client:
        for command in commands:
            with pytest.raises(redis.ResponseError, match="permission"):
                client.execute_command(*command)


@pytest.mark.parametrize("role", [Role.READER, Role.INSPECTOR], ids=str)
def test_those_who_read_change_nothing_and_read_no_payload(server: Server, role: Role) -> None:
    """Not one command changes a key, and neither payloads nor their parts are read, by any script that is loaded."""
    keys = Keys(NAMESPACE)
    with _login(server, role) as client:
        assert client.hget(keys.node("00"), "r") == b"x"
        for command in (
            *(("HSET", keys.node("00"), "r", "y"), ("DEL", keys.meta), ("ZADD", keys.leaves, "1", "x")),
            *(("EVALSHA", load_script("drop").sha, "1", keys.meta), ("SET", keys.claim("x"), "y")),
            *(("GET", keys.payload("00")), ("GET", keys.payload("00", cold=True)), ("GETRANGE", PROBE, "0", "1")),
            *(("GET", keys.part("00", "11", 1)), ("STRLEN", keys.payload("00")), ("GETEX", keys.payload("00"))),
        ):
            with pytest.raises(redis.ResponseError, match="permission"):
                client.execute_command(*command)
        for name in SCRIPTS:
            try:
                reply = client.execute_command(
                    "EVALSHA_RO", load_script(name).sha, 1, keys.payload("00"), "4", "x", "y"
                )
            except redis.ResponseError:
                continue
            assert SECRET not in repr(reply).encode()


def test_only_programs_read_the_secret(server: Server) -> None:
    """Workers and routers name chunks with it; people never see it; a worker of a provisioned namespace keeps it."""
    secret = Keys(NAMESPACE).secret
    for role in (Role.WORKER, Role.READER):
        with _login(server, role) as client:
            assert client.hget(secret, "secret") == b"x"
            for command in (("HSET", secret, "secret", "y"), ("DEL", secret), ("EVALSHA", "0" * 40, "1", secret)):
                with pytest.raises(redis.ResponseError, match="permission"):
                    client.execute_command(*command)
    with _login(server, Role.INSPECTOR) as client, pytest.raises(redis.ResponseError, match="permission"):
        client.hget(secret, "secret")


def test_patterns_hold_what_they_say(server: Server) -> None:
    """A user for all namespaces that begin so reads no payload by the pattern, and nothing that begins otherwise."""
    with server.client() as admin:
        for role in (Role.WORKER, Role.INSPECTOR):
            rules = rules_of(role, ("on*",))
            admin.execute_command("ACL", "SETUSER", "some", "reset", "on", ">some", *rules)
            with redis.Redis(port=server.port, username="some", password="some") as client:
                assert client.hget(Keys(NAMESPACE).node("00"), "r") == b"x"
                forbidden = [Keys(OTHER).payload("00")]
                if role is Role.INSPECTOR:
                    forbidden += [Keys(NAMESPACE).payload("00"), Keys(NAMESPACE).payload("00", cold=True)]
                for key in forbidden:
                    with pytest.raises(redis.ResponseError, match="permission"):
                        client.get(key)


@pytest.mark.parametrize("namespace", ["", "a b", "*x", "a*b", "a?", "a{b}", "a:0", "x" * 65, "[a]", "a\n"])
def test_namespaces_that_widen_a_pattern_are_refused(namespace: str) -> None:
    """A name with a character that means something in a pattern, or in a key, makes no user."""
    with pytest.raises(ConfigError, match="namespace is"):
        rules_of(Role.WORKER, (namespace,))


@pytest.mark.parametrize("name", ["", "a b", "default", "a\nuser b on nopass ~* +@all", "x" * 65, "a#"])
def test_user_names_that_break_an_acl_file_are_refused(name: str) -> None:
    """A name that would end its line, or that is the server's own, makes no user."""
    with pytest.raises(ConfigError, match="worker user is"):
        User(name, Role.WORKER, (NAMESPACE,), hash_password("x"))
