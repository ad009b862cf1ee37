"""URLs on real servers: each is understood by both paths, or refused at the opening with the part named."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import ConfigError
from distprefix.redis import link
from distprefix.redis.keys import Keys
from tests.servers import Server, find_server

PASSWORD = "p@ss/w:rd#?&%+ é"
QUOTED = quote(PASSWORD, safe="")
DEFAULT = ":top%20secret@"
GOOD = {
    "quoted password": "redis://weird:{q}@{h}",
    "credentials in the query": "redis://{h}?username=weird&password={q}",
    "plus sign kept": "redis://weird:{plus}@{h}",
    "password only": "redis://{d}{h}",
    "password only, RESP2": "redis://{d}{h}?protocol=2",
    "database in the path": "redis://{d}{h}/3",
    "database in the query": "redis://{d}{h}?db=3",
    "user only": "redis://free@{h}",
    "user and colon": "redis://free:@{h}",
    "user only, RESP2": "redis://free@{h}?protocol=2",
    "user only, Unix socket": "unix://free@{s}",
    "IPv6": "redis://weird:{q}@[::1]:{p}/0",
    "Unix socket and database": "unix://weird:{q}@{s}?db=2",
    "Unix socket, all in the query": "unix://{s}?db=2&username=weird&password={q}",
    "client name": "redis://{d}{h}?client_name=kv",
    "capitals": "REDIS://{d}LOCALHOST:{p}/",
    "white space around": " redis://{d}{h}\n",
    "valkey": "valkey://{d}{h}",
    "a password the server does not ask for": "redis://free:any@{h}",
}
BAD = {
    "no password": ("redis://{h}", "wants a password"),
    "wrong password": ("redis://weird:nope@{h}", "refuses the user name or password"),
    "wrong user": ("redis://who:nope@{h}", "refuses the user name or password"),
    "user that needs a password": ("redis://weird@{h}", "refuses the user name or password"),
    "no such database": ("redis://{d}{h}/99", "database 99 of redis://.* cannot be used"),
    "user who may not select": ("redis://bound@{h}/1", "database 1 of .*NOPERM"),
    "user who may not be named": ("redis://bound@{h}?client_name=x", "refuses client_name"),
    "TLS to a plain port": ("rediss://{d}{h}", "does not speak TLS at this port: write redis://"),
}


@pytest.fixture(scope="module", params=["redis-7.0", "valkey-9.1"])
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server with users, on both loopback addresses and a socket whose name has a space."""
    server = Server(find_server(request.param), tcp=True)
    server.socket = str(server.folder / "a b")
    server._command += ["--unixsocket", server.socket, "--bind", "127.0.0.1 -::1"]
    server.start()
    allowed = ("~*", "&*", "+@all")
    with server.client() as admin:
        admin.execute_command("ACL", "SETUSER", "weird", "on", f">{PASSWORD}", *allowed)
        admin.execute_command("ACL", "SETUSER", "free", "on", "nopass", *allowed)
        admin.execute_command("ACL", "SETUSER", "bound", "on", "nopass", *allowed, "-select", "-client|setname")
        admin.execute_command("ACL", "SETUSER", "default", "on", ">top secret", *allowed)
    server.log_in_as("default", "top secret")
    yield server
    server.stop()


def _url(server: Server, form: str) -> str:
    places = {"h": f"127.0.0.1:{server.port}", "p": server.port, "s": quote(server.socket), "d": DEFAULT}
    return form.format(q=QUOTED, plus=QUOTED.replace("%2B", "+"), **places)


def _config(namespace: str, **settings: Any) -> PrefixCacheConfig:
    defaults: dict[str, Any] = {"lookup_timeout_s": 20.0, "publish_timeout_s": 20.0, "strict": True}
    defaults |= {"touch_interval_s": 0, "feed_interval_s": 0}
    return PrefixCacheConfig(namespace=namespace, worker_id="w", **{**defaults, **settings})


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


@pytest.mark.parametrize("form", GOOD)
def test_both_paths_understand_the_url(server: Server, namespace: str, form: str) -> None:
    """A cache opens, publishes, stores, loads and finds, over look-up calls and data connections alike."""
    if form == "IPv6" and not _has_ipv6():
        pytest.skip("this machine has no IPv6 loopback address")
    tokens = list(range(64))
    with PrefixCacheOptimizer(_config(namespace, url=_url(server, GOOD[form]))) as cache:
        cache.cache_prefix(tokens)
        assert cache.store(tokens, [b"x" * 100] * 4) == 4
        assert cache.load(tokens).chunks == 4
        assert cache.find_longest_cache_hit(tokens, blocks_of="w/0@gpu").matched_chunks == 4


def test_connections_of_both_paths_have_the_client_name(server: Server, namespace: str) -> None:
    """The server's list of clients names the connections of calls and of data."""
    url = _url(server, GOOD["client name"].replace("=kv", f"={namespace}"))
    with PrefixCacheOptimizer(_config(namespace, url=url)) as cache, server.client() as admin:
        cache.store(list(range(64)), [b"x"] * 4)
        clients: Any = admin.client_list()
        commands = {client["cmd"] for client in clients if client["name"] == namespace}
        assert any(command.startswith("evalsha") for command in commands)
        assert "set" in commands


@pytest.mark.parametrize("form", BAD)
@pytest.mark.parametrize("setting", ["url", "cold_url"])
def test_opening_says_which_part_is_wrong(
    server: Server, namespace: str, setting: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A URL that the server refuses fails the opening with ConfigError: setting, part, remedy."""
    monkeypatch.setattr(link, "_ADMIN_TIMEOUT_S", 1.0)
    url, message = BAD[form]
    good = _url(server, GOOD["password only"])
    wrong = _url(server, url)
    config = _config(namespace, **{"url": good, setting: wrong})
    with pytest.raises(ConfigError, match=message) as raised:
        PrefixCacheOptimizer(config)
    assert str(raised.value).startswith(f"{setting}: ")
    assert "secret" not in str(raised.value)
    with server.client() as admin:
        assert not admin.exists(Keys(namespace).meta)
