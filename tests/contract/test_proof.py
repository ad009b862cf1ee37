"""The proof of a server at the opening: what is the fault of a URL, and what is the server's own for now."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import ConfigError, UnavailableError
from distprefix.redis.address import parse_address
from distprefix.redis.proof import prove
from tests.servers import Server
from tests.values import fake, saying


def _config(server: Server, **settings: str | float) -> PrefixCacheConfig:
    values = {"url": server.url, "worker_id": "w", "lookup_timeout_s": 20.0, "publish_timeout_s": 20.0, **settings}
    return PrefixCacheConfig.from_mapping(values)


@pytest.mark.parametrize(
    ("url", "answers", "message"),
    [
        ("", [b"-ERR max number of clients reached\r\n"], "cannot serve now: ERR max number of clients"),
        ("u:hidden@", [b"-ERR max number of clients reached\r\n"], "cannot serve now: ERR"),
        ("", [b"-LOADING Redis is loading\r\n"], "cannot serve now: LOADING"),
        ("u:hidden@", [b"+OK\r\n", b"-MASTERDOWN Link\r\n"], "cannot serve now: MASTERDOWN"),
        ("", [b"-DENIED protected mode\r\n"], "cannot serve now: DENIED"),
        ("", [], "no answer in time"),
    ],
)
def test_what_a_server_says_for_itself_is_unavailable(url: str, answers: list[bytes], message: str) -> None:
    """A server that is full, loading or silent raises UnavailableError naming setting and server."""
    with fake(saying(*answers)) as (server, _):
        address = parse_address(f"redis://{url}127.0.0.1:{server.port}")
        with pytest.raises(UnavailableError, match=message) as raised:
            prove(address, 0.5, "cold_url")
        assert str(raised.value).startswith(f"cold_url: redis://127.0.0.1:{server.port} ")
        assert "hidden" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "answers", "message"),
    [
        ("u:hidden@{0}", [b"-WRONGPASS invalid\r\n"], "refuses the user name or password: correct them"),
        ("hidden@{0}", [b"-WRONGPASS invalid\r\n"], "a password alone is written redis://:PASSWORD@HOST"),
        (":hidden@{0}", [b"-ERR invalid password\r\n"], "refuses the user name or password"),
        (
            ":hidden@{0}",
            [b"-ERR Client sent AUTH, but no password is set\r\n"],
            "does not take a user name or password",
        ),
        (":hidden@{0}", [b"-ERR unknown command 'AUTH', with args: 'hidden'\r\n"], "does not take a user name"),
        ("{0}", [b"-NOAUTH Authentication required.\r\n"], "wants a password and none is given"),
        ("{0}/5", [b"-NOAUTH Authentication required.\r\n"], "wants a password"),
        ("{0}/5", [b"-ERR SELECT is not allowed in cluster mode\r\n"], "database 5 of .*not allowed in cluster mode"),
        ("{0}?client_name=x", [b"-ERR unknown subcommand\r\n"], "refuses client_name .*remove it"),
        ("{0}", [b"HTTP/1.1 400 Bad Request\r\n\r\n"], "is no Redis"),
    ],
)
def test_the_fault_of_a_url_is_a_config_error(url: str, answers: list[bytes], message: str) -> None:
    """What a server refuses of the URL raises ConfigError: setting, part and remedy, and no password."""
    with fake(saying(*answers)) as (server, _), pytest.raises(ConfigError, match=message) as raised:
        prove(parse_address("redis://" + url.format(f"127.0.0.1:{server.port}")), 5)
    assert str(raised.value).startswith("url: ")
    assert "hidden" not in str(raised.value)


def test_a_user_who_may_not_ping(own_server: Server) -> None:
    """NOPERM in reply to PING proves login, database and path."""
    with own_server.client() as admin:
        admin.execute_command("ACL", "SETUSER", "u", "on", ">pw", "~*", "+get")
    prove(parse_address(f"redis://u:pw@127.0.0.1:{own_server.port}"), 5)


def test_a_server_that_closes_is_asked_for_tls_without_a_password() -> None:
    """After a closed connection the second look sends nothing but the beginning of TLS."""
    received: list[bytes] = []
    every = threading.Lock()

    def talk(accepted: socket.socket) -> None:
        with every:
            received.append(accepted.recv(65536))

    with fake(talk) as (server, _), pytest.raises(UnavailableError, match="closed the connection"):
        prove(parse_address(f"redis://:hidden@127.0.0.1:{server.port}"), 5)
    assert [b"hidden" in data for data in received] == [True, False]
    assert received[1].startswith(b"\x16\x03")


def test_refused_and_absent(tmp_path: Path) -> None:
    """A port where nothing listens, a socket that is not there and a name that has no address are unavailable."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        for url in (f"redis://127.0.0.1:{port}", f"unix://{tmp_path}/no.sock", "redis://name.invalid"):
            with pytest.raises(UnavailableError, match=r"url: .*cannot be reached"):
                prove(parse_address(url), 5)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Warnings of the package."""
    with caplog.at_level(logging.WARNING, logger="distprefix"):
        yield caplog


@pytest.mark.parametrize("is_silent", [False, True])
def test_a_cold_server_that_is_away_is_one_warning(
    own_server: Server, third: Server, warnings: pytest.LogCaptureFixture, is_silent: bool
) -> None:
    """The cache opens, warm payloads work, and one warning names cold_url; later the cold server is used."""
    if is_silent:
        third.freeze()
    else:
        third.kill()
    tokens = list(range(64))
    config = _config(own_server, cold_url=third.url, payload_timeout_s=1.0, cold_codec="raw")
    with PrefixCacheOptimizer(config) as cache:
        said = [record.getMessage() for record in warnings.records]
        assert len(said) == 1
        assert f"cold_url: {third.url} cannot be reached" in said[0]
        assert cache.store(tokens, [b"x" * 100] * 4) == 4
        assert cache.load(tokens).chunks == 4
        if is_silent:
            third.thaw()
        else:
            third.restart()
        assert cache.demote(0) == 4
        assert cache.load(tokens).chunks == 4


def test_a_tree_that_is_away_fails_the_opening(own_server: Server) -> None:
    """Without the server of the tree a cache does not open, and the error is UnavailableError."""
    own_server.kill()
    with pytest.raises(UnavailableError, match=r"url: .*cannot be reached"):
        PrefixCacheOptimizer(_config(own_server))


def test_a_client_in_place_of_a_url_is_not_proven(own_server: Server) -> None:
    """A cache on a client that was passed in does not connect to its url."""
    with own_server.client() as client:
        config = PrefixCacheConfig(url="redis://127.0.0.1:1", worker_id="w", lookup_timeout_s=20.0)
        with PrefixCacheOptimizer(config, client=redis.Redis(port=own_server.port)) as cache:
            cache.cache_prefix(list(range(64)))
        assert client.dbsize()
