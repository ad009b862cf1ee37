"""One description of a connection, parsed from a URL and used by both paths: redis-py's calls and the data sockets."""

from __future__ import annotations

import re
import socket
import ssl
from dataclasses import dataclass, field
from urllib.parse import unquote, unquote_plus

from distprefix.errors import ConfigError
from distprefix.redis.tls import TLS_OPTIONS, Tls, TlsSetupError, read_tls

__all__ = ["KEEPALIVE", "Address", "address_of", "embedded_name", "parse_address", "without_password"]

_TCP_OPTIONS = (
    ("TCP_KEEPIDLE", 15),
    ("TCP_KEEPALIVE", 15),  # what macOS calls the first
    ("TCP_KEEPINTVL", 5),
    ("TCP_KEEPCNT", 3),
    ("TCP_USER_TIMEOUT", 30_000),
)
KEEPALIVE: dict[int, int] = {getattr(socket, name): value for name, value in _TCP_OPTIONS if hasattr(socket, name)}
"""Options of TCP sockets on both paths: a peer that is silently gone is noticed within 30 s. Seconds, then ms."""

_TLS_SCHEMES = ("rediss", "valkeys")
_SCHEMES = ("redis", "rediss", "valkey", "valkeys", "unix")
_OPTIONS = ("username", "password", "db", "client_name", "protocol")
_TIMES = "use lookup_timeout_s, publish_timeout_s and payload_timeout_s of PrefixCacheConfig"
_BYTES = "remove it, replies are always bytes"
_ONCE = "remove it, no call is sent twice"
_ALWAYS = "remove it, TCP keepalive is always on"
_REFUSED = {
    "socket_timeout": _TIMES,
    "socket_connect_timeout": _TIMES,
    "timeout": _TIMES,
    "retry": _ONCE,
    "retry_on_timeout": _ONCE,
    "retry_on_error": _ONCE,
    "decode_responses": _BYTES,
    "encoding": _BYTES,
    "encoding_errors": _BYTES,
    "legacy_responses": _BYTES,
    "socket_keepalive": _ALWAYS,
    "socket_keepalive_options": _ALWAYS,
    "health_check_interval": "remove it, connections are checked before they are used again",
    "max_connections": "remove it, connections open as calls need them",
    "ssl": "use rediss:// for TLS",
}
"""What other clients take in a URL, and what to do instead."""
_SHOWN = {*_OPTIONS, *TLS_OPTIONS, *_REFUSED} - {"password", "ssl_password"}
"""Options whose values are no secret."""
_QUOTE = "quote special characters of user name and password: @ as %40, : as %3A, / as %2F, ? as %3F, # as %23"
_MAX_DATABASE = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a server is and how to log in, validated. As text it shows neither user name nor password."""

    host: str = "localhost"
    port: int = 6379
    path: str = ""
    """A Unix socket; host and port do not matter then."""
    username: str = field(default="", repr=False)
    password: str = field(default="", repr=False)
    database: int = 0
    client_name: str = ""
    protocol: int = 3
    """RESP version of redis-py's calls. The data sockets always speak 2."""
    tls: Tls | None = None

    def __str__(self) -> str:
        database = f"/{self.database}" if self.database else ""
        if self.path:
            return f"unix://{self.path}" + (f"?db={self.database}" if self.database else "")
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.tls else 'redis'}://{host}:{self.port}{database}"

    @property
    def target(self) -> tuple[str, int] | str:
        """What a socket connects to."""
        return self.path or (self.host, self.port)

    def tls_context(self) -> ssl.SSLContext | None:
        """A context from the files as they are now, None without TLS. Raises TlsSetupError, an OSError."""
        return self.tls.context() if self.tls is not None else None

    def check_tls(self, setting: str = "url") -> None:
        """Raise ConfigError, naming setting and option, when TLS files are missing or unusable. Reads the files."""
        try:
            self.tls_context()
        except TlsSetupError as error:
            raise ConfigError(f"{setting}: {error}") from error

    def greeting(self) -> list[tuple[bytes, ...]]:
        """The commands that begin a data connection: AUTH, SELECT and CLIENT SETNAME, as far as they are needed."""
        commands: list[tuple[bytes, ...]] = []
        if self.username or (self.password and self.protocol == 3):  # as HELLO does on the other path
            commands.append((b"AUTH", (self.username or "default").encode(), self.password.encode()))
        elif self.password:
            commands.append((b"AUTH", self.password.encode()))
        if self.database:
            commands.append((b"SELECT", b"%d" % self.database))
        if self.client_name:
            commands.append((b"CLIENT", b"SETNAME", self.client_name.encode()))
        return commands


def parse_address(url: str, setting: str = "url") -> Address:
    """The address that a URL describes. Reads no file and resolves no name.

    Raises ConfigError that names `setting`, the part at fault and the remedy. No message has the password.
    """
    url = url.strip()
    reason = ""
    try:
        return _parse(url)
    except ValueError as error:
        reason = str(error)
    raise ConfigError(f"{setting} is {without_password(url)!r}: {reason}")  # here it has no context that quotes the URL


def address_of(where: Address | str) -> Address:
    """An address as it is, or the one that a URL describes."""
    return parse_address(where) if isinstance(where, str) else where


def embedded_name(url: str) -> str | None:
    """NAME of embedded://NAME, which may be empty; None for any other URL."""
    scheme, mark, name = url.strip().partition("://")
    return name if mark and scheme.lower() == "embedded" else None


def without_password(url: str) -> str:
    """A URL, well formed or not, as it may be shown: user info, odd ports and values of odd options are hidden."""
    scheme, mark, rest = url.strip().partition("://")
    if not mark or not _is_scheme(scheme):
        scheme, mark, rest = "", "", url.strip()
    before, at, rest = rest.rpartition("@")
    del before  # all of it, for a password may have any character
    place, asked, query = rest.partition("?")
    shown = re.sub(r"^(\[[^\]/]*\]|[^:/]*):(?!\d*(/|$)).*$", r"\1:***", place, flags=re.DOTALL)
    if "#" in shown:
        shown = shown.partition("#")[0] + "#***"
    options = "&".join(_shown_option(option) for option in query.split("&"))
    return f"{scheme}{mark}{'***@' if at else ''}{shown}{asked}{options if asked else ''}"


def _shown_option(option: str) -> str:
    name, mark, _ = option.partition("=")
    if mark and unquote_plus(name) in _SHOWN and "#" not in option:
        return option
    return f"{name}=***" if mark and re.fullmatch(r"\w{1,40}", name) else "***"


def _is_scheme(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z][A-Za-z0-9+.-]*", text) is not None


def _parse(url: str) -> Address:
    """Raises ValueError without a password in its message."""
    scheme, mark, rest = url.partition("://")
    scheme = scheme.lower()
    _check_scheme(scheme, has_mark=bool(mark))
    if not _is_utf8(url):
        raise ValueError("it has characters that are not UTF-8: quote them")
    if "#" in rest:
        raise ValueError(f"it has a '#' that is not quoted; {_QUOTE}")
    place, _, query = rest.partition("?")
    place, slash, path = place.partition("/")
    userinfo, at, place = place.rpartition("@")
    if "@" in path or (not at and place.startswith(":") and "@" in query):
        raise ValueError(f"its user name or password has a character that is not quoted; {_QUOTE}")
    options = _read_options(query, is_safe=bool(at) or "@" not in query)
    username, _, password = userinfo.partition(":")
    username = _only("user name", unquote(username), options.get("username", ""))
    password = _only("password", unquote(password), options.get("password", ""))
    tls = _read_tls(scheme, options)
    is_socket = scheme == "unix"
    socket_path = _read_socket(place, slash + path) if is_socket else ""
    host, port = _read_host("" if is_socket else place)
    return Address(
        host=host,
        port=port,
        path=socket_path,
        username=username,
        password=password,
        database=_read_database("" if is_socket else path, options.get("db")),
        client_name=_read_client_name(options.get("client_name", "")),
        protocol=_read_protocol(options.get("protocol", "3")),
        tls=tls,
    )


def _check_scheme(scheme: str, *, has_mark: bool) -> None:
    allowed = ", ".join(f"{name}://" for name in _SCHEMES)
    if not has_mark or not _is_scheme(scheme):
        raise ValueError(f"it has no scheme: it must begin with one of {allowed}, as redis://HOST:PORT/DATABASE")
    if "sentinel" in scheme:
        raise ValueError(
            f"Sentinel is not asked: name the primary, or a service that follows it, with redis:// ({allowed})"
        )
    if "cluster" in scheme:
        raise ValueError(f"a Redis Cluster is not supported: name one standalone server with redis:// ({allowed})")
    if scheme == "embedded":
        raise ValueError(f"an embedded server is allowed for url only: name a server with one of {allowed}")
    if scheme not in _SCHEMES:
        raise ValueError(f"it must begin with one of {allowed} (url also with embedded://NAME)")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_options(query: str, *, is_safe: bool) -> dict[str, str]:
    """Options by name, unquoted. Names are shown only where none can be part of a password."""
    options: dict[str, str] = {}
    for part in query.split("&") if query else ():
        quoted, mark, value = part.partition("=")
        name = unquote_plus(quoted)
        if not mark:
            raise ValueError(f"its query has a part without '=': options are NAME=VALUE; {_QUOTE}")
        if name in _REFUSED:
            raise ValueError(f"the option {name} is not used: {_REFUSED[name]}")
        if name not in _OPTIONS and name not in TLS_OPTIONS:
            shown = f" {name}" if is_safe and re.fullmatch(r"\w{1,40}", name) else ""
            known = ", ".join((*_OPTIONS, *TLS_OPTIONS))
            raise ValueError(f"the option{shown} is not known: remove it, there are {known}")
        if name in options:
            raise ValueError(f"the option {name} is given twice: give it once")
        if not value:
            raise ValueError(f"the option {name} has no value: give one or remove it")
        options[name] = unquote_plus(value)
    return options


def _only(part: str, in_place: str, in_query: str) -> str:
    if in_place and in_query and in_place != in_query:
        raise ValueError(f"the {part} before the host and the one in the query differ: give it once")
    return in_place or in_query


def _read_tls(scheme: str, options: dict[str, str]) -> Tls | None:
    given = {name: value for name, value in options.items() if name in TLS_OPTIONS}
    if scheme in _TLS_SCHEMES:
        return read_tls(given)
    if given:
        raise ValueError(f"the option {min(given)} is for TLS: begin with rediss:// or remove it")
    return None


def _read_socket(host: str, path: str) -> str:
    if host:
        raise ValueError(f"a Unix socket has no host: write unix:///PATH, with three slashes; {_QUOTE}")
    path = unquote(path)
    if not path.strip("/"):
        raise ValueError("it names no socket: write unix:///PATH")
    if not path.isprintable():
        raise ValueError("the path of the socket has control characters: remove them")
    return path


def _read_host(place: str) -> tuple[str, int]:
    if place.startswith("["):
        host, bracket, port = place[1:].partition("]")
        if not bracket or (port and not port.startswith(":")):
            raise ValueError(f"the host is no IPv6 address in brackets, as [::1]:6379; {_QUOTE}")
        port = port[1:]
    else:
        host, _, port = place.rpartition(":") if ":" in place else (place, "", "")
        if ":" in host:
            raise ValueError(f"the host has colons: write an IPv6 address in brackets, as [::1]:6379; {_QUOTE}")
    if port and not (port.isascii() and port.isdigit() and len(port) <= 5 and 0 < int(port) < 65536):
        raise ValueError(f"the port must be a number from 1 to 65535; {_QUOTE}")
    host = unquote(host).lower() or "localhost"
    if not host.isprintable() or re.search(r"[\s,/\[\]]", host):
        raise ValueError("the host has characters that no host name has: give one name or address")
    return host, int(port) if port else 6379


def _read_database(path: str, option: str | None) -> int:
    text = unquote(path.removesuffix("/"))
    for given in (text, option or "0"):
        if given and not (given.isascii() and given.isdigit() and len(given) <= 10 and int(given) <= _MAX_DATABASE):
            raise ValueError(f"the database is {given!r}: it must be a number from 0 on")
    if text and option is not None and int(text) != int(option):
        raise ValueError(f"the database is {text} in the path and {option} as db: give it once")
    return int(text or option or 0)


def _read_client_name(name: str) -> str:
    if not re.fullmatch(r"[!-~]*", name):
        raise ValueError(f"client_name is {name!r}: printable ASCII characters without spaces are allowed")
    return name


def _read_protocol(text: str) -> int:
    if text not in ("2", "3"):
        raise ValueError(f"protocol is {text!r}: it must be 2 or 3")
    return int(text)
