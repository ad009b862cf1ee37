"""Calls to Redis: one connection each, one deadline, no hidden retries; every failure is one of ours.

redis-py's own defaults re-send up to ten times and can hold a caller for a minute; here a call ends with its deadline.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Generator
from typing import Any, Protocol, TypeVar, cast

import redis
from redis.backoff import NoBackoff
from redis.connection import Connection, DefaultParser, UnixDomainSocketConnection
from redis.exceptions import BusyLoadingError, NoScriptError, OutOfMemoryError
from redis.retry import Retry

from distprefix import errors
from distprefix.operations import Call
from distprefix.redis.address import KEEPALIVE, Address, address_of
from distprefix.redis.breaker import Breaker
from distprefix.redis.scripts import load_script
from distprefix.redis.tls import Tls

__all__ = ["Client", "connect", "new_breaker", "run"]

T = TypeVar("T")
_log = logging.getLogger("distprefix")
_FRESH_S = 0.5
"""A connection used so recently is taken to be open still."""
_HEALED = ("DPGONE", "DPNOPARENT")
"""Codes after which the caller puts things right by itself."""
_CODES: dict[str, type[errors.ScriptError]] = {
    "DPSCHEMA": errors.SchemaError,
    "DPGONE": errors.NotAttachedError,
    "DPNOPARENT": errors.NoParentError,
    "DPSTALE": errors.StaleEpochError,
    "DPDAMAGED": errors.DamagedNodeError,
    "DPFENCED": errors.FencedError,
}


# What fakeredis says: it loads a script with a #!lua line, fails to run it, and has no EVALSHA_RO.
_NO_FLAGS = re.compile(r"near '#'|unknown command .?evalsha_ro", re.IGNORECASE)


class _NoFlagsError(Exception):
    """The server knows no ``#!lua`` line."""


_current = threading.local()
_forks = 0
"""How many forks lie between this process and the first one: asking the system who we are takes longer."""


def _count_fork() -> None:
    global _forks  # noqa: PLW0603 - one number a process
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class _Parser(cast("Any", DefaultParser)):  # pyright: ignore[reportUntypedBaseClass]
    """Reads until the deadline of the thread's call: redis-py's time-outs begin anew with every byte that comes."""

    def read_from_socket(self, *args: Any, **options: Any) -> Any:
        deadline: float | None = getattr(_current, "deadline", None)
        if deadline is None:
            return super().read_from_socket(*args, **options)
        left = deadline - time.monotonic()
        if left <= 0:
            raise redis.TimeoutError("the deadline passed")
        return super().read_from_socket(timeout=left, raise_on_timeout=options.get("raise_on_timeout", True))


class _Connection(Protocol):
    def send_command(self, *args: Any) -> None: ...
    def read_response(self, *, timeout: float) -> Any: ...
    def disconnect(self) -> None: ...


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


def connect(where: Address | str, timeout_s: float) -> redis.Redis:
    """A redis-py client that never retries and never waits longer than `timeout_s` for one read. Does not connect.

    Raises ConfigError for a URL that is none.
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
        "parser_class": _Parser,
        "legacy_responses": False,
        "decode_responses": False,
        "maint_notifications_config": None,
        "driver_info": None,
    }
    if address.path:
        options |= {"connection_class": UnixDomainSocketConnection, "path": address.path}
    else:
        options |= {"host": address.host, "port": address.port}
        options |= {"socket_keepalive": True, "socket_keepalive_options": KEEPALIVE}
    if address.tls is not None:
        options |= {"connection_class": _TlsConnection, "tls": address.tls}
    return redis.Redis.from_pool(redis.ConnectionPool(**options))


def run(
    operation: Generator[Call, Any, T], client: Client, meta: str, deadline: float, sent: list[str] | None = None
) -> T:
    """Drive an operation over a blocking client until `deadline` (time.monotonic); `sent` gets the scripts called."""
    reply: Any = None
    while True:
        try:
            call = operation.send(reply)
        except StopIteration as done:
            return cast("T", done.value)
        except errors.DamagedNodeError:
            client.failures["DPDAMAGED"] += 1
            raise
        if sent is not None:
            sent.append(call.script)
        reply = client.call(call.script, meta, call.args, deadline)


class Client:
    """Script and plain calls over a redis-py connection pool, behind a breaker. Thread-safe."""

    def __init__(self, redis_client: redis.Redis, breaker: Breaker, failures: Counter[str]) -> None:
        self.redis = redis_client
        self.breaker = breaker
        self.failures = failures
        """Failed calls by reason."""
        self.calls = 0
        """Calls sent."""
        self._with_flags = True
        self._count = threading.Lock()
        self._forks = _forks
        self._idle: list[tuple[Any, float]] = []
        """Connections taken from the pool and when they were used last; the last used is the last here."""

    def call(self, script: str, meta: str, args: tuple[Any, ...], deadline: float) -> Any:
        """Run a script by EVALSHA (EVALSHA_RO when it only reads); loads it where the server does not know it.

        Raises UnavailableError when there is no usable answer by `deadline`, or the error that the script's code names.
        """
        loaded = load_script(script, with_flags=self._with_flags)
        command = "EVALSHA_RO" if loaded.reads_only and self._with_flags else "EVALSHA"
        try:
            return self.command(command, loaded.sha, 1, meta, *args, deadline=deadline)
        except NoScriptError:
            try:
                self.command("SCRIPT LOAD", loaded.body, deadline=deadline)
                return self.command(command, loaded.sha, 1, meta, *args, deadline=deadline)
            except NoScriptError as error:
                raise self._failure("no script", "the server forgets its scripts as fast as they load") from error
            except _NoFlagsError:
                self._with_flags = False
        except _NoFlagsError:
            self._with_flags = False
        return self.call(script, meta, args, deadline)

    def command(self, *args: Any, deadline: float) -> Any:
        """Send one command and read its reply by `deadline`."""
        if not self.breaker.allow():
            raise self._failure("breaker open", "Redis failed repeatedly and is left alone for a moment")
        left = deadline - time.monotonic()
        if left <= 0:
            raise self._failure("deadline", "the deadline passed before Redis could be asked")
        _current.deadline = deadline
        try:
            connection = self._take()
        except (redis.RedisError, OSError) as error:
            _current.deadline = None
            raise self._failure("connect", f"cannot connect: {error}", broke=True) from error
        healthy = False
        try:
            with self._count:
                self.calls += 1
            connection.send_command(*_split(args))
            reply = connection.read_response(timeout=max(0.001, deadline - time.monotonic()))
            healthy = True
        except NoScriptError:
            healthy = True
            self.breaker.succeed()  # or a probe of a server that came back empty would end here
            raise
        except redis.ResponseError as error:
            healthy = True
            if self._with_flags and _NO_FLAGS.search(str(error)):
                raise _NoFlagsError from error
            raise self._refused(error) from error
        except (redis.TimeoutError, TimeoutError) as error:
            raise self._failure("timeout", f"no answer in time: {error}", broke=True) from error
        except (redis.RedisError, OSError) as error:
            raise self._failure("connection", f"the connection failed: {error}", broke=True) from error
        finally:
            _current.deadline = None
            self._put_back(connection, healthy=healthy)
        self.breaker.succeed()
        return reply

    def close(self) -> None:
        """Close every connection."""
        self._empty()
        self.redis.close()

    def _take(self) -> _Connection:
        """A connection. One that rested for long goes through the pool, which looks whether it still is open."""
        if self._forks != _forks:
            raise errors.ForkedProcessError
        try:
            connection, used = self._idle.pop()
        except IndexError:
            return cast("_Connection", self.redis.connection_pool.get_connection())
        if time.monotonic() - used < _FRESH_S:
            return connection
        self.redis.connection_pool.release(connection)
        return cast("_Connection", self.redis.connection_pool.get_connection())

    def _put_back(self, connection: Any, *, healthy: bool) -> None:
        """Keep it for the next call: the pool's own book-keeping takes half as long as a look-up."""
        if healthy:
            self._idle.append((connection, time.monotonic()))
            return
        connection.disconnect()
        self.redis.connection_pool.release(connection)
        self._empty()  # they lead to the same server

    def _empty(self) -> None:
        while self._idle:
            with contextlib.suppress(IndexError):
                self.redis.connection_pool.release(self._idle.pop()[0])

    def _break(self) -> None:
        opened = self.breaker.opened
        self.breaker.fail()
        if self.breaker.opened != opened:
            _log.warning("Redis failed repeatedly and is left alone for a while: %s", dict(self.failures))

    def _failure(self, reason: str, message: str, *, broke: bool = False) -> errors.UnavailableError:
        self.failures[reason] += 1
        if broke:
            self._break()
        return errors.UnavailableError(message)

    def _refused(self, error: redis.ResponseError) -> errors.DistPrefixError:
        code = str(error).split(" ", 1)[0]
        if code in _CODES:
            self.breaker.succeed()
            if code not in _HEALED:
                self.failures[code] += 1
            return _CODES[code](str(error))
        if isinstance(error, OutOfMemoryError) or code in ("OOM", "-OOM") or "OOM" in str(error)[:80]:
            self.breaker.succeed()
            return self._failure(
                "out of memory", "Redis is at maxmemory: nothing more is published until there is room"
            )
        if isinstance(error, BusyLoadingError) or code in ("BUSY", "LOADING", "CLUSTERDOWN"):
            return self._failure(code.lower(), str(error), broke=True)
        self.failures["refused"] += 1
        if code in ("ERR", "WRONGTYPE"):  # one damaged key says nothing of the server
            self.breaker.succeed()
        else:
            self._break()
        return errors.ScriptError(f"the server refused the call: {error}")


def _split(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """redis-py packs a command of two words only when it gets two words."""
    return ("SCRIPT", "LOAD", *args[1:]) if args[0] == "SCRIPT LOAD" else args


def new_breaker(failures: int, reset_s: float) -> Breaker:
    """A breaker on the real clock with probes spread by a quarter."""
    spread = random.Random()  # noqa: S311 - not for secrets
    return Breaker(failures, reset_s, time.monotonic, lambda: spread.uniform(0.75, 1.25))
