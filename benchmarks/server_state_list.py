"""The states that a server can be in, as benchmarks/server_states.py goes through them: how each begins and ends."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.faults import Relay, refuse_writes, silent
from tests.servers import Server, find_server, free_port

__all__ = ["STATES", "Site", "State"]

_MIB = 1 << 20
_AT_ONCE = ("--repl-diskless-sync-delay", "0")
_KEEPS = ("--appendonly", "yes", "--appendfsync", "always")


class Site:
    """The servers of one run, and what a state keeps until it ends."""

    def __init__(self, state: State, seconds: float, server: str) -> None:
        binary = find_server(state.server or server)
        self.seconds = seconds
        """How long the state lasts."""
        self._stack = contextlib.ExitStack()
        self.states = contextlib.ExitStack()
        """What ends with the state."""
        self.tree = self._start(binary, *_AT_ONCE, *state.options)
        more = _KEEPS if state.second == "cold" else _AT_ONCE
        self.second = self._start(binary, *more) if state.second else None
        self.relay = self._stack.enter_context(Relay(self.tree.port)) if state.relay else None
        if state.second == "replica":
            replicate(self.other, self.tree)
        self.forgot_at = 0.0
        """When the proxy forgot its connections last."""
        self.url = (self.relay.url if self.relay else self.tree.url) + state.query
        self.cold_url = self.other.url if state.second == "cold" else None

    @property
    def other(self) -> Server:
        """The second server."""
        assert self.second is not None
        return self.second

    @property
    def name(self) -> Relay:
        """What stands between the worker and the server."""
        assert self.relay is not None
        return self.relay

    def close(self) -> None:
        """End all of it."""
        self.states.close()
        self._stack.close()

    def _start(self, binary: str, *options: str) -> Server:
        started = Server(binary, *options, tcp=True).start()
        self._stack.callback(started.stop)
        return started


Act = Callable[[Site], Any]


def _nothing(_: Site) -> None:
    pass


@dataclass(frozen=True, slots=True)
class State:
    """A state, by its name."""

    name: str
    begin: Act = _nothing
    end: Act = field(default=lambda site: site.states.close())
    during: Act = _nothing
    """Is done again and again between the worker's rounds."""
    options: tuple[str, ...] = ()
    server: str = ""
    """Which one; empty for the one that is asked for."""
    second: str = ""
    """``cold`` or ``replica``: what a second server is for."""
    relay: bool = False
    """Whether a proxy stands in front of the server."""
    query: str = ""
    """What follows the URL."""
    payload_bytes: int = 20_000
    stays: bool = False
    """Whether the state is a property of the server, and does not end."""
    short: bool = False
    """Whether the tests go through it."""


def admin(action: Callable[[Any], object], *, second: bool = False) -> Act:
    """Do something with a plain client; an error that the server answers with is not ours."""

    def act(site: Site) -> None:
        server = site.other if second else site.tree
        with contextlib.suppress(redis.RedisError), server.client() as client:
            action(client)

    return act


def replicate(server: Server, primary: Server) -> None:
    """Make a server a replica, and wait until it has a copy."""
    with server.client() as client:
        client.replicaof("127.0.0.1", str(primary.port))
        info: Any = {}
        while info.get("master_link_status") != "up":
            info = client.info("replication")
            time.sleep(0.01)


def _limit(name: str, setting: str, value: object, otherwise: object) -> State:
    """A setting of the server that is another one in the state, with long payloads."""
    begin = admin(lambda client: client.config_set(setting, value))
    end = admin(lambda client: client.config_set(setting, otherwise))
    return State(name, begin, end, payload_bytes=3_000_000)


def _kill_clients(client: Any) -> None:
    client.execute_command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")


def _restart(site: Site) -> None:
    site.tree.kill()
    site.tree.start()


def _load_slowly(site: Site) -> None:
    with site.tree.client() as client:
        for number in range(2000):
            client.set(f"filler:{number}", "x" * 100)
        client.save()
    site.tree.kill()
    site.tree._command += ["--key-load-delay", "1000", "--loading-process-events-interval-bytes", "1024"]
    site.tree.start()


def _spin(site: Site) -> None:
    def run() -> None:
        with contextlib.suppress(redis.RedisError), site.tree.client() as client:
            client.eval("while true do end", 0)

    with site.tree.client() as client:
        client.config_set("busy-reply-threshold", 100)
    threading.Thread(target=run, daemon=True).start()


def _fill_clients(site: Site) -> None:
    with contextlib.suppress(redis.RedisError), site.tree.client() as client:
        client.config_set("maxclients", 12)
        _kill_clients(client)
        for _ in range(20):
            taken = site.states.enter_context(site.tree.client())
            taken.ping()


def _change_password(client: Any) -> None:
    client.execute_command("ACL", "SETUSER", "default", "resetpass", ">another")
    _kill_clients(client)


def _restore_password(site: Site) -> None:
    with redis.Redis(port=site.tree.port, password="another", protocol=2) as client:
        client.execute_command("ACL", "SETUSER", "default", "nopass")


def _acl(*rights: str) -> Act:
    return admin(lambda client: client.execute_command("ACL", "SETUSER", "default", *rights))


def _deny_identity(site: Site) -> None:
    _acl("-info", "-role")(site)
    admin(_kill_clients)(site)  # so that new connections ask


def _fail_over(site: Site) -> None:
    with site.other.client() as second:
        second.replicaof("NO", "ONE")
    site.name.target = site.other.port
    with site.tree.client() as first:
        first.replicaof("127.0.0.1", str(site.other.port))


def _fail_over_by_death(site: Site) -> None:
    site.tree.kill()
    with site.other.client() as second:
        second.replicaof("NO", "ONE")
    site.name.target = site.other.port


def _become_replica(client: Any) -> None:
    client.replicaof("127.0.0.1", str(free_port()))


def _become_strict_replica(client: Any) -> None:
    client.config_set("replica-serve-stale-data", "no")
    _become_replica(client)


def _each(pattern: str, action: Callable[[Any, bytes], object]) -> Act:
    return admin(lambda client: [action(client, key) for key in client.scan_iter(match=pattern, count=1000)])


def _damage(client: Any, key: bytes) -> None:
    client.setrange(key, 200, b"damaged")


def _cut(site: Site) -> None:
    site.name.cuts_after = 10_000


def _mend(site: Site) -> None:
    site.name.cuts_after = 0


def _refuse(how: str, *, second: bool = False) -> Act:
    return lambda site: site.states.enter_context(refuse_writes(site.other if second else site.tree, how))


def _drop_packets(site: Site) -> None:
    site.other.kill()
    site.states.enter_context(silent(site.other.port, accepts=False))


def _start_again(site: Site) -> None:
    site.states.close()
    site.other.start()


def _renamed(command: str, query: str = "") -> State:
    note = f", url with {query}" if query else ""
    return State(f"{command} renamed{note}", options=("--rename-command", command, ""), query=query, stays=True)


def _pause(site: Site) -> None:
    with site.tree.client() as client:
        client.client_pause(int(1000 * site.seconds))  # it could not be ended: all commands wait


def _promote(client: Any) -> None:
    client.replicaof("NO", "ONE")


def _forget_now_and_then(site: Site) -> None:
    now = time.monotonic()
    if now - site.forgot_at > 1.0:
        site.forgot_at = now
        site.name.forget()


def _states() -> Iterator[State]:
    yield State("all well", short=True)
    yield State("all well, Redis 7.0", server="redis-7.0", stays=True)
    yield State("all well, Redis 8.2", server="redis-8.2", stays=True)
    yield State("connections killed, once", begin=admin(_kill_clients))
    yield State("connections killed, all the time", during=admin(_kill_clients), short=True)
    yield State(
        "idle connections closed by the server",
        begin=admin(lambda client: client.config_set("timeout", 1)),
        end=admin(lambda client: client.config_set("timeout", 0)),
        during=lambda _: time.sleep(1.2),
    )
    yield State("SCRIPT FLUSH, all the time", during=admin(lambda client: client.script_flush()))
    yield State("SCRIPT KILL, all the time", during=admin(lambda client: client.script_kill()))
    yield State("FLUSHALL, all the time", during=admin(lambda client: client.flushall()), short=True)
    yield State("restarted empty", begin=_restart, short=True)
    yield State("restarted with its data", begin=_restart, options=_KEEPS, short=True)
    yield State("restarted empty, all the time", during=_restart)
    yield State("killed", begin=lambda site: site.tree.kill(), end=lambda site: site.tree.start(), short=True)
    yield State("frozen", begin=lambda site: site.tree.freeze(), end=lambda site: site.tree.thaw(), short=True)
    yield State("LOADING", begin=_load_slowly)
    yield State("BUSY with a script", begin=_spin, end=admin(lambda client: client.script_kill()))
    yield State("CLIENT PAUSE ALL", begin=_pause)
    yield State("CLIENT PAUSE WRITE", begin=_refuse("pause"), short=True)
    yield State("disk full (MISCONF)", begin=_refuse("misconf"), short=True)
    yield State("too few replicas (NOREPLICAS)", begin=_refuse("noreplicas"))
    yield State(
        "maxmemory reached",
        begin=admin(lambda client: client.config_set("maxmemory", client.info("memory")["used_memory"])),
        end=admin(lambda client: client.config_set("maxmemory", 0)),
        short=True,
    )
    yield State("maxclients reached", begin=_fill_clients)
    yield _limit(
        "client-output-buffer-limit of 64 KiB", "client-output-buffer-limit", "normal 65536 65536 1", "normal 0 0 0"
    )
    yield _limit("proto-max-bulk-len of 1 MiB", "proto-max-bulk-len", _MIB, 512 * _MIB)
    yield _limit("client-query-buffer-limit of 1 MiB", "client-query-buffer-limit", _MIB, 1024 * _MIB)
    yield State("password changed", begin=admin(_change_password), end=_restore_password)
    yield State("right to SET taken", begin=_acl("-set"), end=_acl("+set"))
    yield State("right to GET taken", begin=_acl("-get"), end=_acl("+get"))
    yield State(
        "right to run scripts taken", begin=_acl("-evalsha", "-evalsha_ro"), end=_acl("+evalsha", "+evalsha_ro")
    )
    yield State("became a replica (READONLY)", begin=admin(_become_replica), end=admin(_promote), short=True)
    yield State("became a strict replica (MASTERDOWN)", begin=admin(_become_strict_replica), end=admin(_promote))
    yield State("failover, connections kept", begin=_fail_over, second="replica", relay=True, short=True)
    yield State("failover, old primary dead", begin=_fail_over_by_death, second="replica", relay=True)
    yield State("connections forgotten by a balancer", begin=lambda site: site.name.forget(), relay=True, short=True)
    yield State("connections forgotten, all the time", during=_forget_now_and_then, relay=True)
    yield State("connections cut in the middle of replies", begin=_cut, end=_mend, relay=True, payload_bytes=200_000)
    yield State("payloads deleted", during=_each("*:kv:*", lambda client, key: client.delete(key)), short=True)
    yield State("payloads damaged", during=_each("*:kv:*", _damage))
    yield State(
        "cold server frozen",
        begin=lambda site: site.other.freeze(),
        end=lambda site: site.other.thaw(),
        second="cold",
        short=True,
    )
    yield State(
        "cold server killed", begin=lambda site: site.other.kill(), end=lambda site: site.other.start(), second="cold"
    )
    yield State("cold server drops packets", begin=_drop_packets, end=_start_again, second="cold")
    yield State("cold server's disk full", begin=_refuse("misconf", second=True), second="cold")
    yield State("right to INFO and ROLE taken", begin=_deny_identity, end=_acl("+info", "+role"))
    yield State("one database only", options=("--databases", "1"), stays=True)
    for command in ("ROLE", "CLIENT", "CONFIG", "SCAN", "EVALSHA_RO"):
        yield _renamed(command)
    yield _renamed("HELLO", "?protocol=2")


STATES = tuple(_states())
