"""Calls to Redis: one connection each, one deadline, no hidden retries; every failure is one of ours.

redis-py's own defaults re-send up to ten times and can hold a caller for a minute; here a call ends with its deadline.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any, Protocol, TypeVar, cast

import redis
from redis.exceptions import (
    AuthenticationError,
    BusyLoadingError,
    MasterDownError,
    NoScriptError,
    ReadOnlyError,
)

from distprefix import errors
from distprefix.damage import Damage
from distprefix.operations import Call, Damaged
from distprefix.redis.breaker import Breaker, Breakers, new_breakers
from distprefix.redis.causes import cause_of_code
from distprefix.redis.connections import current
from distprefix.redis.endpoint import Endpoint, ReplicaError
from distprefix.redis.scripts import Script, load_script

__all__ = ["Caller", "Client", "run"]

T = TypeVar("T")
_log = logging.getLogger("distprefix")
_FRESH_S = 0.5
"""A connection used so recently is taken to be open still."""
_STALE_S = 10.0
"""A connection that rested for so long is asked whether it still leads anywhere: a balancer may have forgotten it."""
_PROBE_S = 0.05
"""The longest that such a question may take, at most a third of the caller's deadline."""
_PATIENCE_S = 2.0
"""A call with more time than this is not left to a connection that may lead nowhere: ..."""
_ANSWER_S = 1.0
"""... after so long without an answer it is sent again, once, over a new connection."""
_LOST_S = 1.0
"""How long after the deadline of its call a connection is taken to be lost."""
_OVER = float("-inf")
_ANSWER_ITEMS = 4
"""Of a script's reply, before the number of damaged places."""
_READS = frozenset({"EVALSHA_RO", "EXISTS", "GET", "HGET", "HGETALL", "PING", "ROLE", "SISMEMBER", "SRANDMEMBER"})
_HEALED = ("DPGONE", "DPNOPARENT", "DPAGAIN")
"""Codes after which the caller puts things right by itself."""
_CODES: dict[str, type[errors.ScriptError]] = {
    "DPSCHEMA": errors.SchemaError,
    "DPGONE": errors.NotAttachedError,
    "DPNOPARENT": errors.NoParentError,
    "DPSTALE": errors.StaleEpochError,
    "DPDAMAGED": errors.DamagedNodeError,
    "DPFENCED": errors.FencedError,
    "DPLOST": errors.LostHistoryError,
    "DPAGAIN": errors.OrphansError,
}


_CAUSES: tuple[tuple[type[Exception], str], ...] = (
    (ReplicaError, "replica"),
    (ReadOnlyError, "readonly"),
    (MasterDownError, "masterdown"),
    (BusyLoadingError, "loading"),
    (AuthenticationError, "auth"),
)

_NOT_SERVING = (ReadOnlyError, MasterDownError, BusyLoadingError)
"""Answers after which a connection may lead to the wrong server."""
_MISSING_WARNING_S = 60.0
"""How often at most the log says that the server lacks scripts."""
_MAY_NOT_LOAD = re.compile(r"NOPERM|no permissions|unknown (sub)?command", re.IGNORECASE)
# What fakeredis says: it loads a script with a #!lua line, fails to run it, and has no EVALSHA_RO.
_NO_FLAGS = re.compile(r"near '#'|unknown command .?evalsha_ro", re.IGNORECASE)


class _SilentError(Exception):
    """A connection has not brought an answer for so long that it may lead nowhere."""


class _NoFlagsError(Exception):
    """The server knows no ``#!lua`` line."""


_forks = 0
"""How many forks lie between this process and the first one: asking the system who we are takes longer."""


def _count_fork() -> None:
    global _forks  # noqa: PLW0603 - one number a process
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class _Connection(Protocol):
    def send_command(self, *args: Any) -> None: ...
    def read_response(self, *, timeout: float) -> Any: ...
    def disconnect(self) -> None: ...


class Caller(Protocol):
    """Who calls: a member whose writes the shard counts, and that looks whether it still has them."""

    def before_call(self) -> tuple[bytes, Any]:
        """The first argument of a call that is sent now, and what to compare its reply with."""
        ...

    def after_call(self, before: Any, generation: bytes, had: int, has: int) -> None:
        """Take note of which history a reply is."""
        ...


def run(
    operation: Generator[Call, Any, T],
    client: Client,
    meta: str,
    deadline: float,
    sent: list[str] | None = None,
    caller: Caller | None = None,
    between: Callable[[], object] | None = None,
) -> T:
    """Drive an operation over a blocking client until `deadline` (time.monotonic); `sent` gets the scripts called.

    `between` is called after each reply: a long operation may have something to keep alive.
    """
    reply: Any = None
    failed: errors.UnavailableError | None = None
    while True:
        try:
            call = operation.send(reply) if failed is None else operation.throw(failed)
        except StopIteration as done:
            return cast("T", done.value)
        except errors.DamagedNodeError:
            client.failures["DPDAMAGED"] += 1
            client.damage.note()
            raise
        failed = None
        if isinstance(call, Damaged):
            client.failures["DPDAMAGED"] += 1  # the reply makes no sense in part
            client.damage.note(call.args[0])
            reply = None
            continue
        if sent is not None:
            sent.append(call.script)
        args = call.args
        before: Any = None
        if caller is not None:
            header, before = caller.before_call()
            args = (header, *args[1:])
        try:
            reply, generation, had, has = client.call(call.script, meta, args, deadline)
        except errors.UnavailableError as error:
            failed = error  # for the operation to say what counts of what came before
            continue
        if caller is not None:
            caller.after_call(before, generation, had, has)
        if between is not None:
            between()


class Client:
    """Script and plain calls over redis-py connections, behind breakers. Thread-safe.

    Reads and writes have a breaker each: what only one of them meets does not stop the other.
    """

    def __init__(
        self,
        redis_client: redis.Redis,
        breakers: Breakers | None = None,
        failures: Counter[str] | None = None,
        endpoint: Endpoint | None = None,
        damage: Damage | None = None,
    ) -> None:
        self.redis = redis_client
        self.breakers = breakers or new_breakers()
        self.failures = Counter[str]() if failures is None else failures
        """Failed calls by reason."""
        self.endpoint = endpoint or Endpoint()
        self.damage = damage or Damage()
        """What cannot be as it is and was passed over."""
        self.calls = 0
        """Calls sent."""
        self._with_flags = True
        self._closed = False
        self._count = threading.RLock()  # a signal handler may close the cache in the middle of a call
        self._forks = _forks
        self._generation = self.endpoint.generation
        self._idle: list[tuple[Any, float]] = []
        """Connections that rest and when they were used last; the last used is the last here."""
        self._known: dict[Any, float] = {}
        """All connections, and the deadline of the call that each is in; those that are in none are over."""

    def call(self, script: str, meta: str, args: tuple[Any, ...], deadline: float) -> Any:
        """Run a script by EVALSHA (EVALSHA_RO when it only reads); loads it where the server does not know it.

        Raises UnavailableError when there is no usable answer by `deadline`, ScriptsMissingError where the server does
        not know the script and this user may not load it, or the error that the script's code names.
        """
        loaded = load_script(script, with_flags=self._with_flags)
        reads = loaded.reads_only
        command = "EVALSHA_RO" if reads and self._with_flags else "EVALSHA"
        try:
            return self._noted(
                loaded, self.command(command, loaded.sha, 1, meta, *args, deadline=deadline, reads=reads)
            )
        except NoScriptError:
            try:
                self._load(loaded.body, deadline, self.breakers.of(reads=reads))
                reply = self.command(command, loaded.sha, 1, meta, *args, deadline=deadline, reads=reads)
                return self._noted(loaded, reply)
            except NoScriptError as error:
                raise self._failure("no script", "the server forgets its scripts as fast as they load") from error
            except _NoFlagsError:
                self._with_flags = False
        except _NoFlagsError:
            self._with_flags = False
        return self.call(script, meta, args, deadline)

    def _noted(self, script: Script, reply: Any) -> Any:
        """A script's reply without the number of damaged places that it passed over, which is counted."""
        if script.tells_damage and len(reply) > _ANSWER_ITEMS:
            self.damage.note(reply[_ANSWER_ITEMS])
            return reply[:_ANSWER_ITEMS]
        return reply

    def _load(self, body: str, deadline: float, breaker: Breaker) -> None:
        """Load a script. The breaker is not asked: the call that found the script missing may be its probe."""
        try:
            self._send(("SCRIPT LOAD", body), deadline, breaker)
        except _SilentError:
            self._send(("SCRIPT LOAD", body), deadline, breaker, is_repeated=True)

    def command(self, *args: Any, deadline: float, reads: bool | None = None) -> Any:
        """Send one command and read its reply by `deadline`. `reads`: which breaker it is for, by default its own."""
        breaker = self.breakers.of(reads=args[0] in _READS if reads is None else reads)
        if not breaker.allow():
            raise self._failure("breaker open", "Redis failed repeatedly and is left alone for a moment")
        if deadline <= time.monotonic():
            raise self._failure("deadline", "the deadline passed before Redis could be asked")
        try:
            return self._send(args, deadline, breaker)
        except _SilentError:  # scripts and commands may run twice, so it is sent again, over a new connection
            return self._send(args, deadline, breaker, is_repeated=True)

    def _send(self, args: tuple[Any, ...], deadline: float, breaker: Breaker, *, is_repeated: bool = False) -> Any:
        generation = self.endpoint.generation
        until = deadline
        began = ended = time.monotonic()
        connection: Any = None
        healthy = False
        try:
            connection = self._reach(deadline, began)
            if deadline - began > _PATIENCE_S and not is_repeated:
                until = time.monotonic() + _ANSWER_S
            current.deadline = until
            with self._count:
                self.calls += 1
            connection.send_command(*_words(args))
            reply = connection.read_response(timeout=max(0.001, until - time.monotonic()))
            ended = time.monotonic()
            healthy = True
        except NoScriptError:
            healthy = True  # the breaker hears from the call that loads the script
            raise
        except (redis.RedisError, OSError) as error:
            healthy = isinstance(error, redis.ResponseError) and not isinstance(error, _NOT_SERVING)
            if until < deadline and isinstance(error, redis.TimeoutError | TimeoutError):
                self.failures["silent connection"] += 1
                raise _SilentError from error
            if args[0] == "SCRIPT LOAD" and healthy and _MAY_NOT_LOAD.search(str(error)):
                raise self._missing(breaker) from error
            raise self._explained(error, breaker, generation, began) from error
        finally:
            current.deadline = None
            if connection is not None:
                self._known[connection] = _OVER
                if healthy and not self._closed:
                    self._idle.append((connection, ended))  # no signal is looked for before it is there
                else:
                    self._drop(connection)
                    self._end_idle()  # they lead to the same server
        breaker.succeed()
        return reply

    def _reach(self, deadline: float, began: float) -> _Connection:
        try:
            return self._take(deadline)
        except (redis.RedisError, OSError) as error:
            self._break(self.breakers.reads, began)  # what cannot be reached answers neither kind
            self._break(self.breakers.writes, began)
            raise self._failure(_cause_of(error, "connect"), f"cannot connect: {error}") from error

    def _explained(self, error: Exception, breaker: Breaker, generation: int, began: float) -> Exception:
        """Count what ended a call. Returns what is raised for it."""
        if isinstance(error, _NOT_SERVING):
            cause = _cause_of(error, "refused")
            self.endpoint.renew(cause, generation)
            self._break(breaker)
            return self._failure(cause, f"the server does not serve now: {error}")
        if isinstance(error, redis.ResponseError):
            if self._with_flags and _NO_FLAGS.search(str(error)):
                return _NoFlagsError()
            return self._refused(error, breaker)
        self._break(breaker, began)
        if isinstance(error, redis.TimeoutError | TimeoutError):
            return self._failure("timeout", f"no answer in time: {error}")
        return self._failure(_cause_of(error, "connection"), f"the connection failed: {error}")

    def close(self) -> None:
        """Close the connections that rest, and log nothing more; those in use close when their call ends."""
        self._closed = True
        self._end_idle()
        self._drop_lost()

    def _take(self, deadline: float) -> _Connection:
        """A connection. One that rested for long is asked first whether it still is open."""
        if self._forks != _forks:
            raise errors.ForkedProcessError
        if self._generation != self.endpoint.generation:
            self._generation = self.endpoint.generation
            self._end_idle()
        connection: Any = None
        used = 0.0
        with self._count:
            if self._idle:
                connection, used = self._idle.pop()
                self._known[connection] = deadline
        if connection is None:
            return self._new(deadline)
        try:
            rested_s = time.monotonic() - used
            if rested_s < _FRESH_S:
                return connection
            is_open = self._answers(connection, deadline) if rested_s >= _STALE_S else _is_quiet(connection)
        except BaseException:  # interrupted: an answer may still come
            self._known[connection] = _OVER
            self._drop(connection)
            raise
        if is_open:
            return connection
        self._known[connection] = _OVER
        self._drop(connection)
        return self._new(deadline)

    def _new(self, deadline: float) -> _Connection:
        """A new connection, made as the pool makes them; the pool's own book-keeping does not survive interrupts."""
        self._drop_lost()
        pool = self.redis.connection_pool
        connection: Any = pool.connection_class(**pool.connection_kwargs)
        self._known[connection] = deadline
        current.deadline = deadline
        try:
            connection.connect()
        except BaseException:
            self._known[connection] = _OVER
            self._drop(connection)
            raise
        finally:
            current.deadline = None
        return connection

    def _drop(self, connection: Any) -> None:
        """Close a connection, whatever may still come over it."""
        connection.disconnect()
        self._known.pop(connection, None)

    def _drop_lost(self) -> None:
        """Close connections that an interrupt left behind: their call is over, or should be, and they do not rest."""
        late = time.monotonic() - _LOST_S
        with self._count:
            resting = {connection for connection, _ in self._idle}
            lost = [each for each, until in self._known.items() if until < late and each not in resting]
        for connection in lost:
            self._drop(connection)

    def _answers(self, connection: Any, deadline: float) -> bool:
        """Whether a connection that rested for long leads anywhere; if not, none that rests does."""
        now = time.monotonic()
        until = min(now + _PROBE_S, now + (deadline - now) / 3)
        current.deadline = until
        try:
            connection.send_command("PING")
            connection.read_response(timeout=max(0.001, until - time.monotonic()))
        except redis.ResponseError:
            return True
        except (redis.RedisError, OSError):
            self.failures["silent connection"] += 1
            self._end_idle()
            return False
        finally:
            current.deadline = None
        return True

    def _end_idle(self) -> None:
        """Close the connections that rest."""
        while self._idle:
            with contextlib.suppress(IndexError):
                self._drop(self._idle.pop()[0])
        self.redis.connection_pool.disconnect(inuse_connections=False)

    def _break(self, breaker: Breaker, began: float = float("inf")) -> None:
        """Count a failed call; one that took long opens the breaker at once, as the next would cost as much."""
        opened = breaker.opened
        breaker.fail(at_once=time.monotonic() - began > _ANSWER_S)
        if breaker.opened != opened and not self._closed:
            _log.warning("Redis failed repeatedly and is left alone for a while: %s", dict(self.failures))

    def _missing(self, breaker: Breaker) -> errors.ScriptsMissingError:
        """Count that the server lacks scripts which this user may not load, and log it once a minute."""
        self._break(breaker)
        self.failures["no script"] += 1
        error = errors.ScriptsMissingError()
        now = time.monotonic()
        if now - self.endpoint.warned_of_scripts_at >= _MISSING_WARNING_S and not self._closed:
            self.endpoint.warned_of_scripts_at = now
            _log.warning("%s; until then look-ups are misses and publishes are dropped", error)
        return error

    def _failure(self, reason: str, message: str) -> errors.UnavailableError:
        self.failures[reason] += 1
        return errors.UnavailableError(message)

    def _refused(self, error: redis.ResponseError, breaker: Breaker) -> errors.DistPrefixError:
        code = _code_of(error)
        if code in _CODES:
            breaker.succeed()
            if code not in _HEALED:
                self.failures[code] += 1
            if code == "DPDAMAGED" and "twice" not in str(error):  # that is the caller's chain, not the tree
                self.damage.note()
            return _CODES[code](str(error))
        cause = cause_of_code(code)
        if code == "OOM" or "OOM" in str(error)[:80]:
            breaker.succeed()
            full = self._failure(
                "out of memory", "Redis is at maxmemory: nothing more is published until there is room"
            )
            full.is_full = True
            return full
        if code in ("BUSY", "CLUSTERDOWN"):
            self._break(breaker)
            return self._failure(cause, str(error))
        self.failures[cause] += 1
        if code in ("ERR", "WRONGTYPE"):  # one damaged key says nothing of the server
            breaker.succeed()
        else:
            self._break(breaker)
        return errors.ScriptError(f"the server refused the call: {error}")


def _is_quiet(connection: Any) -> bool:
    """Whether a connection is open, and nothing came that has not been asked for."""
    try:
        return not connection.can_read()
    except (redis.RedisError, OSError):
        return False


def _code_of(error: redis.ResponseError) -> str:
    """The first word of the server's reply, which redis-py takes from the message of the codes that it knows."""
    return error.status_code or str(error).split(" ", 1)[0].lstrip("-")


def _words(args: tuple[Any, ...]) -> list[Any]:
    """A command as it is sent: text and bytes only, and two words where redis-py needs two.

    hiredis 3.5 crashes the process when a signal handler raises while it turns a number into text.
    """
    words = ("SCRIPT", "LOAD", *args[1:]) if args[0] == "SCRIPT LOAD" else args
    return [repr(word).encode() if isinstance(word, (int, float)) else word for word in words]


def _cause_of(error: Exception, otherwise: str) -> str:
    """What a failure is counted by."""
    for kind, cause in _CAUSES:
        if isinstance(error, kind):
            return cause
    return otherwise
