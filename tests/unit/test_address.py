"""URLs: what each describes, what is refused and how, and that no message has a password."""

from __future__ import annotations

import socket
import ssl
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distprefix import PrefixCacheConfig
from distprefix.errors import ConfigError
from distprefix.redis.address import KEEPALIVE, Address, address_of, embedded_name, parse_address, without_password
from distprefix.redis.connections import connect

PASSWORD = "p@ss/w:rd#?&%+ é"
QUOTED = quote(PASSWORD, safe="")

GOOD: list[tuple[str, dict[str, Any]]] = [
    ("redis://", {}),
    ("redis://h", {"host": "h"}),
    ("redis://h:1", {"host": "h", "port": 1}),
    ("redis://h:", {"host": "h"}),
    ("redis://:7000", {"port": 7000}),
    ("redis:///2", {"database": 2}),
    ("redis://h/", {"host": "h"}),
    ("redis://h/3/", {"host": "h", "database": 3}),
    ("redis://h/%33", {"host": "h", "database": 3}),
    ("redis://h?db=3", {"host": "h", "database": 3}),
    ("redis://h/3?db=3", {"host": "h", "database": 3}),
    ("  redis://h\n", {"host": "h"}),
    ("REDIS://H.Example", {"host": "h.example"}),
    ("valkey://h", {"host": "h"}),
    ("redis://[::1]:7/1", {"host": "::1", "port": 7, "database": 1}),
    ("redis://[fe80::1%25eth0]", {"host": "fe80::1%eth0"}),
    ("redis://u:p@h", {"host": "h", "username": "u", "password": "p"}),
    ("redis://:p@h", {"host": "h", "password": "p"}),
    ("redis://u@h", {"host": "h", "username": "u"}),
    ("redis://u:@h", {"host": "h", "username": "u"}),
    ("redis://@h", {"host": "h"}),
    ("redis://a%3Ab:p@h", {"host": "h", "username": "a:b", "password": "p"}),
    (f"redis://u:{QUOTED}@h", {"host": "h", "username": "u", "password": PASSWORD}),
    (f"redis://u:{QUOTED.replace('%2B', '+')}@h", {"host": "h", "username": "u", "password": PASSWORD}),
    ("redis://u:p@ss@h", {"host": "h", "username": "u", "password": "p@ss"}),
    (f"redis://h?username=u&password={QUOTED}", {"host": "h", "username": "u", "password": PASSWORD}),
    ("redis://h?password=a+b%20c@d", {"host": "h", "password": "a b c@d"}),
    ("redis://u@h?username=u&password=p", {"host": "h", "username": "u", "password": "p"}),
    ("redis://h?client_name=kv-1&protocol=2", {"host": "h", "client_name": "kv-1", "protocol": 2}),
    ("unix:///run/r.sock", {"path": "/run/r.sock"}),
    ("unix:///a%20b.sock?db=2", {"path": "/a b.sock", "database": 2}),
    ("unix://u:p@/r.sock", {"path": "/r.sock", "username": "u", "password": "p"}),
    ("unix:///r.sock?password=p", {"path": "/r.sock", "password": "p"}),
]
HIDDEN = "S3CR3T"
BAD: list[tuple[str, str]] = [
    ("", "no scheme"),
    ("127.0.0.1:6379", "no scheme: it must begin with one of redis://"),
    (f"u:{HIDDEN}@h:1", "no scheme"),
    ("http://h", "begin with one of redis://, rediss://, valkey://, valkeys://, unix://"),
    (f"http://u:{HIDDEN}@h", "begin with"),
    ("redis+sentinel://a:26379/m", "Sentinel is not asked: name the primary"),
    ("redis+cluster://a", "Cluster is not supported"),
    ("embedded://x", "allowed for url only"),
    ("redis://h:port", "port must be a number"),
    ("redis://h:0", "port"),
    ("redis://h:99999", "port"),
    ("redis://h:\uff11", "port"),
    (f"redis://:{HIDDEN}", "port"),
    (f"redis://:{HIDDEN}/x@h", "quote special characters"),
    (f"redis://:{HIDDEN}?x@h", "quote special characters"),
    (f"redis://:{HIDDEN}#x@h", "quote special characters"),
    (f"redis://:1/{HIDDEN}@h", "quote special characters"),
    (f"redis://:1?{HIDDEN}=1@h", "quote special characters"),
    (f"redis://u:1?{HIDDEN}=1@h", "option is not known"),
    ("redis://h?password=a#b", "'#' that is not quoted"),
    ("redis://::1:6379", "IPv6 address in brackets"),
    ("redis://[::1", "IPv6"),
    ("redis://a b", "one name or address"),
    ("redis://a:1,b:2", "colons|port"),
    ("redis://h/abc", "database is 'abc': it must be a number from 0"),
    ("redis://h/-1", "database is '-1'"),
    ("redis://h/1/2", "database"),
    ("redis://h/1_0", "database"),
    ("redis://h?db=x", "database is 'x'"),
    ("redis://h/99999999999", "database"),
    ("redis://h/0?db=1", "0 in the path and 1 as db"),
    ("redis://h?db=1&db=2", "db is given twice"),
    ("redis://h?db=", "db has no value"),
    ("redis://h?db", "NAME=VALUE"),
    (f"redis://u@h?username=v&password={HIDDEN}", "user name before the host and the one in the query differ"),
    (f"redis://:a@h?password={HIDDEN}", "password before the host"),
    ("redis://h?socket_timeout=5", "lookup_timeout_s, publish_timeout_s and payload_timeout_s of PrefixCacheConfig"),
    ("redis://h?socket_timeout=abc", "the option socket_timeout is not used"),
    ("redis://h?socket_connect_timeout=5", "lookup_timeout_s"),
    ("redis://h?timeout=5", "the option timeout"),
    ("redis://h?decode_responses=true", "the option decode_responses is not used: remove it"),
    ("redis://h?health_check_interval=30", "health_check_interval"),
    ("redis://h?retry_on_timeout=True", "no call is sent twice"),
    ("redis://h?max_connections=1", "max_connections"),
    ("redis://h?ssl=true", "rediss://"),
    (f"redis://h?passwd={HIDDEN}", "option passwd is not known: remove it, there are username, password, db"),
    ("redis://h?protocol=4", "protocol is '4': it must be 2 or 3"),
    ("redis://h?client_name=a+b", "client_name is 'a b'"),
    ("redis://h?ssl_ca_certs=x", "ssl_ca_certs is for TLS: begin with rediss://"),
    ("redis://h/\udcff", "UTF-8"),
    ("unix://", "names no socket"),
    ("unix:///", "names no socket"),
    ("unix://r.sock", "three slashes"),
    ("unix:///a%00b", "control characters"),
    ("rediss://h?ssl_cert_reqs=perhaps", "ssl_cert_reqs is 'perhaps': it must be none, optional, required"),
    ("rediss://h?ssl_check_hostname=maybe", "ssl_check_hostname is 'maybe'"),
    ("rediss://h?ssl_min_version=770", "ssl_min_version is '770': it must be TLSv1.2 or TLSv1.3"),
    ("rediss://h?ssl_keyfile=x", "ssl_keyfile is given without ssl_certfile"),
    (f"rediss://h?ssl_password={HIDDEN}", "ssl_password is given without ssl_certfile"),
    (f"rediss://h?ssl_password={HIDDEN}&ssl_ca=x", "option ssl_ca is not known"),
]


@pytest.mark.parametrize(("url", "parts"), GOOD)
def test_a_url_describes_a_connection(url: str, parts: dict[str, Any]) -> None:
    """Host, port, socket, user, password, database, name and protocol are read from their places."""
    assert parse_address(url) == Address(**parts)


@pytest.mark.parametrize(("url", "message"), BAD)
def test_a_wrong_url_is_refused_with_the_part_and_the_remedy(url: str, message: str) -> None:
    """ConfigError begins with the setting, names the part at fault, and has no password."""
    with pytest.raises(ConfigError, match=message) as raised:
        parse_address(url, "cold_url")
    assert str(raised.value).startswith("cold_url is ")
    assert HIDDEN not in str(raised.value)
    assert (raised.value.__cause__, raised.value.__context__) == (None, None)  # either would quote the URL


@pytest.mark.parametrize("scheme", ["rediss", "valkeys", "VALKEYS"])
def test_tls_options_are_read(scheme: str) -> None:
    """Rediss and valkeys take every TLS option, and switches in the usual spellings."""
    files = "ssl_ca_certs=a&ssl_ca_path=b&ssl_ca_data=c&ssl_certfile=d&ssl_keyfile=e&ssl_password=f"
    address = parse_address(f"{scheme}://h?{files}&ssl_ciphers=g%2Bh")
    assert address.tls is not None
    assert address.port == 6379
    tls = address.tls
    assert (tls.ca_certs, tls.ca_path, tls.ca_data, tls.certfile, tls.keyfile) == ("a", "b", "c", "d", "e")
    assert (tls.password, tls.ciphers, tls.cert_reqs, tls.check_hostname) == ("f", "g+h", "required", True)
    for text, version in (("771", "TLSv1_2"), ("TLSv1.2", "TLSv1_2"), ("772", "TLSv1_3"), ("tlsv1.3", "TLSv1_3")):
        tls = parse_address(f"{scheme}://h?ssl_min_version={text}&ssl_check_hostname=No&ssl_cert_reqs=optional").tls
        assert tls is not None
        assert (tls.min_version, tls.check_hostname, tls.cert_reqs) == (ssl.TLSVersion[version], False, "optional")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ssl_ca_certs={0}/no", "ssl_ca_certs is '.*/no': No such file"),
        ("ssl_ca_certs={0}/empty", "ssl_ca_certs is"),
        ("ssl_ca_path={0}/no", "ssl_ca_path is '.*': there is no such folder"),
        ("ssl_ca_data=no", "ssl_ca_data cannot be used"),
        ("ssl_certfile={0}/no", "ssl_certfile is '.*/no': No such file"),
        ("ssl_certfile={0}/empty&ssl_keyfile={0}/no", "ssl_keyfile is '.*/no': No such file"),
        ("ssl_certfile={0}/empty&ssl_keyfile={0}/empty", "ssl_certfile and ssl_keyfile are"),
        ("ssl_ciphers=NONESUCH", "ssl_ciphers is 'NONESUCH'"),
    ],
)
def test_unusable_tls_files_are_refused_at_the_opening(tmp_path: Path, options: str, message: str) -> None:
    """A URL with files that are missing or unusable parses; before a connection the option is named."""
    (tmp_path / "empty").touch()
    address = parse_address(f"rediss://h?{options.format(tmp_path)}")
    with pytest.raises(ConfigError, match=f"cold_url: {message}"):
        address.check_tls("cold_url")


def test_the_greeting_of_a_data_connection() -> None:
    """AUTH, SELECT and CLIENT SETNAME are sent as they are needed; a user without password gets an empty one."""
    assert parse_address("redis://h").greeting() == []
    assert parse_address("redis://u@h").greeting() == [(b"AUTH", b"u", b"")]
    assert parse_address("redis://:p@h").greeting() == [(b"AUTH", b"default", b"p")]
    assert parse_address("redis://:p@h?protocol=2").greeting() == [(b"AUTH", b"p")]
    assert parse_address("redis://u:%C3%A9@h/3?client_name=n").greeting() == [
        (b"AUTH", b"u", "é".encode()),
        (b"SELECT", b"3"),
        (b"CLIENT", b"SETNAME", b"n"),
    ]


def test_an_address_shows_no_credentials() -> None:
    """As text an address is where the server is; user name and password appear in neither of its forms."""
    address = parse_address(f"rediss://who:{HIDDEN}@[::1]:7/3?ssl_certfile=c&ssl_password={HIDDEN}")
    assert str(address) == "rediss://[::1]:7/3"
    assert HIDDEN not in repr(address)
    assert "who" not in repr(address)
    assert str(parse_address("unix:///s?db=2&username=u")) == "unix:///s?db=2"
    assert address_of(address) is address


def test_redis_py_gets_the_same_description() -> None:
    """The client of the control path has every part of the address, no retries, and the keepalive of data sockets."""
    with connect("redis://u:p@h:7/3?client_name=n&protocol=2", 1.5) as client:
        options: dict[str, Any] = client.connection_pool.connection_kwargs
        wanted = {"host": "h", "port": 7, "db": 3, "username": "u", "password": "p", "client_name": "n"}
        assert {name: options[name] for name in wanted} == wanted
        assert (options["protocol"], options["socket_timeout"], options["socket_connect_timeout"]) == (2, 1.5, 1.5)
        assert options["socket_keepalive_options"] is KEEPALIVE
    with connect("unix:///s", 1) as client:
        assert client.connection_pool.connection_kwargs["path"] == "/s"
        assert client.connection_pool.connection_kwargs["protocol"] == 3


def test_keepalive_notices_a_silent_peer_in_half_a_minute() -> None:
    """Where the platform has the options, a dead peer is noticed after 15 s and three probes, and unacked data too."""
    if hasattr(socket, "TCP_KEEPIDLE"):
        assert KEEPALIVE[socket.TCP_KEEPIDLE] + KEEPALIVE[socket.TCP_KEEPINTVL] * KEEPALIVE[socket.TCP_KEEPCNT] == 30
    if hasattr(socket, "TCP_USER_TIMEOUT"):
        assert KEEPALIVE[socket.TCP_USER_TIMEOUT] == 30_000


def test_settings_are_read_as_addresses() -> None:
    """Both settings are parsed; only url may name an embedded server, in any capitals."""
    PrefixCacheConfig(url="VALKEYS://h/1", cold_url=" unix:///s\n")
    for name in ("embedded://x", "Embedded://x"):
        PrefixCacheConfig(url=name)
        assert embedded_name(name) == "x"
        with pytest.raises(ConfigError, match=r"cold_url is .*for url only"):
            PrefixCacheConfig(cold_url=name)
    assert embedded_name("embedded") is None
    for setting in ("url", "cold_url"):
        with pytest.raises(ConfigError, match=f"{setting} is .*the database is 'x'"):
            PrefixCacheConfig.from_mapping({setting: f"redis://:{HIDDEN}@h/x"})


_places = st.sampled_from(
    [
        "redis://user:{0}@h:1/{1}",
        "redis://:{0}@h/{1}",
        "unix://user:{0}@/s?db={1}",
        "redis://h/{1}?username=user&password={0}",
        "redis://h?password={0}&db={1}",
        "rediss://h/{1}?ssl_certfile=c&ssl_password={0}",
        "http://user:{0}@h/{1}",
        "user:{0}@h/{1}",
        "redis://h/{1}?password={0}&nope=1",
        "redis://user:{0}@h:port/{1}",
    ]
)


@given(_places, st.text(), st.sampled_from(["0", "x", "-1"]), st.booleans())
@example("redis://:{0}@h/{1}", "/?#@", "x", False)
@example("redis://:{0}@h/{1}", "?a=b&c", "0", False)
def test_no_message_has_a_password(place: str, text: str, database: str, is_quoted: bool) -> None:
    """Whatever the password is, quoted or not, neither a refusal nor what may be shown has it; quoted it is read."""
    password = f"{HIDDEN}{text}"
    url = place.format(quote(password, safe="", errors="replace") if is_quoted else password, database)
    assert HIDDEN not in without_password(url)
    found: list[Address] = []
    message = ""
    try:
        found.append(parse_address(url))
    except ConfigError as error:
        message = str(error)
    assert HIDDEN not in message
    for address in found:
        assert HIDDEN not in repr(address) + str(address)
        if is_quoted:
            assert password in (address.password, address.tls.password if address.tls else "")
