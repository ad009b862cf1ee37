"""Connections of redis-py as the control path needs them: reads that end with the call's deadline, TLS, a greeting."""

from __future__ import annotations

import threading
import time
from functools import partial
from typing import Any, cast

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, DefaultParser, UnixDomainSocketConnection
from redis.retry import Retry

from distprefix.printable import printable
from distprefix.redis.address import KEEPALIVE, Address, address_of
from distprefix.redis.causes import without_echo
from distprefix.redis.endpoint import IDENTITY, Endpoint, read_identity
from distprefix.redis.tls import Tls

__all__ = ["Parser", "connect", "current"]

_LONGEST_ERROR = 1000

current = threading.local()
"""`deadline`: when the call of this thread has to be done (time.monotonic)."""


class Parser(cast("Any", DefaultParser)):  # pyright: ignore[reportUntypedBaseClass]
    """Reads until the deadline of the thread's call: redis-py's time-outs begin anew with every byte that comes.

    What a server says in place of a reply is escaped: it ends in logs and on terminals.
    """

    @classmethod
    def parse_error(cls, response: str) -> Any:
        """The exception for a reply that is an error."""
        return super().parse_error(printable(response, _LONGEST_ERROR))

    def read_from_socket(self, *args: Any, **options: Any) -> Any:
        """Receive, for as long as the thread's call has left; for redis-py's own time-out where none runs."""
        deadline: float | None = getattr(current, "deadline", None)
        if deadline is None:
            return super().read_from_socket(*args, **options)
        left = deadline - time.monotonic()
        if left <= 0:
            raise redis.TimeoutError("the deadline passed")
        return super().read_from_socket(timeout=left, raise_on_timeout=options.get("raise_on_timeout", True))


class _TlsConnection(Connection):
    """A connection with the TLS context that the data path has: renewed certificates are read when it connects."""

    def __init__(self, *, tls: Tls, **options: Any) -> None:
        super().__init__(**options)
        self._tls = tls

    def _connect(self) -> Any:
        plain: Any = super()._connect()
        try:
            return self._tls.context().wrap_socket(plain, server_hostname=self.host)
        except BaseException:
            plain.close()
            raise


def connect(where: Address | str, timeout_s: float, endpoint: Endpoint | None = None) -> redis.Redis:
    """A redis-py client that never retries and never waits longer than `timeout_s` for one read. Does not connect.

    With an `endpoint` each new connection is asked what it leads to, and a replica is refused. Raises ConfigError for a
    URL that is none.
    """
    address = address_of(where)
    options: dict[str, Any] = {
        "db": address.database,
        "username": address.username or None,
        "password": address.password or None,
        "client_name": address.client_name or None,
        "protocol": address.protocol,
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "retry": Retry(NoBackoff(), 0),
        "parser_class": Parser,
        "legacy_responses": False,
        "decode_responses": False,
        "maint_notifications_config": None,
        "driver_info": None,
        "redis_connect_func": _greet if endpoint is None else partial(_admit, endpoint),
    }
    if address.path:
        options |= {"connection_class": UnixDomainSocketConnection, "path": address.path}
    else:
        options |= {"host": address.host, "port": address.port}
        options |= {"socket_keepalive": True, "socket_keepalive_options": KEEPALIVE}
    if address.tls is not None:
        options |= {"connection_class": _TlsConnection, "tls": address.tls}
    return redis.Redis.from_pool(redis.ConnectionPool(**options))


def _greet(connection: Any) -> None:
    """Log in. An error that repeats the password is raised without it, and without the one that it stands for."""
    refusal: redis.RedisError | None = None
    try:
        connection.on_connect()
    except redis.RedisError as error:
        refusal = error
    if refusal is None:
        return
    text = str(refusal)
    shown = without_echo(text, connection.password or "")
    raise refusal if shown == text else type(refusal)(shown)


def _admit(endpoint: Endpoint, connection: Any) -> None:
    """Greet the server and ask what it is. Two commands, one round trip."""
    try:
        _greet(connection)
        for command in IDENTITY:
            connection.send_command(*command)
        replies: list[Any] = []
        for _ in IDENTITY:
            try:
                replies.append(connection.read_response())
            except redis.ResponseError:  # not permitted, or renamed
                replies.append(None)
        endpoint.admit(read_identity(*replies))
    except BaseException:
        connection.disconnect()  # the pool would hand it out again as it is
        raise
