"""What each kind of user may do on a server, as rules of ACL SETUSER. Pure.

A user has the commands that its kind needs and the keys of its namespaces, nothing else: a test takes each right away
in turn and sees that something fails for the lack of it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import StrEnum

from distprefix.errors import ConfigError
from distprefix.redis.keys import PROBE, REGISTRY, Keys

__all__ = ["Role", "User", "check_pattern", "commands_of", "hash_password", "keys_of", "rules_of"]


class Role(StrEnum):
    """What a user is for."""

    WORKER = "worker"
    """Engines, ingesters and programs with a cache: read and write their namespaces."""
    READER = "reader"
    """Routers: read where prefixes are, no payloads, and write nothing."""
    INSPECTOR = "inspector"
    """People: read the structure of namespaces, neither payloads nor secrets, and write nothing."""
    OPERATOR = "operator"
    """Who maintains, audits, purges and provisions: all namespaces of the server, and loads scripts."""
    ADMIN = "admin"
    """Who administers the server: everything."""


_WORKER = (
    *("del", "evalsha", "evalsha_ro", "exists", "expire", "get", "getrange", "hdel", "hget"),
    *("hgetall", "hincrby", "hkeys", "hlen", "hmget", "hscan", "hset", "hstrlen", "info", "persist", "ping", "pttl"),
    *("role", "sadd", "set", "sismember", "srandmember", "srem", "strlen", "time", "type", "unlink", "xadd", "xlen"),
    *("xrange", "xrevrange", "zadd", "zcard", "zmscore", "zrange", "zrem", "zremrangebyrank", "zrevrange", "zscore"),
)
_READER = (
    *("evalsha_ro", "exists", "get", "hget", "hgetall", "hkeys", "hlen", "hmget", "hscan", "ping", "time"),
    *("xrange", "xrevrange", "zmscore", "zrange", "zrevrange"),
)
_INSPECTOR = (
    *("evalsha_ro", "exists", "get", "hget", "hgetall", "hkeys", "hlen", "hmget", "hscan", "hstrlen", "info"),
    *("memory|usage", "object|encoding", "ping", "pttl", "scan", "time", "type", "xinfo|stream", "xlen", "xrange"),
    *("xrevrange", "zcard", "zmscore", "zrange", "zrevrange", "zscore"),
)
_OPERATOR = (*_WORKER, "hvals", "scan", "script|exists", "script|load", "smembers")
_COMMANDS = {Role.WORKER: _WORKER, Role.READER: _READER, Role.INSPECTOR: _INSPECTOR, Role.OPERATOR: _OPERATOR}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_PATTERN = re.compile(r"[A-Za-z0-9._-]{1,64}|[A-Za-z0-9._-]{0,63}\*")


def check_pattern(namespace: str) -> None:
    """Raise ConfigError unless this is a namespace, or how the names of several begin, with ``*`` at its end."""
    if not _PATTERN.fullmatch(namespace):
        raise ConfigError(
            f"namespace is {namespace!r}: 1 to 64 letters, digits, dots, hyphens, underscores are allowed, and a * at "
            "the end for all namespaces that begin so"
        )


def hash_password(password: str) -> str:
    """A password as an ACL file has it: its SHA-256, which logs nobody in."""
    return hashlib.sha256(password.encode()).hexdigest()


def commands_of(role: Role) -> tuple[str, ...]:
    """The commands that a user of this kind may send, and that scripts may call for it."""
    return ("@all",) if role is Role.ADMIN else _COMMANDS[role]


def keys_of(role: Role, namespaces: tuple[str, ...]) -> tuple[str, ...]:
    """Patterns of the keys that it may use, as rules; those with a command of their own in parentheses.

    A namespace with a ``*`` at its end is one that workers make, so that they may write its secret.
    """
    if role is Role.ADMIN:
        return ("~*", "&*")
    if role is Role.OPERATOR:
        return ("~dp:*", f"~{Keys('*').secret}")
    rules: list[str] = []
    for namespace in namespaces:
        check_pattern(namespace)
        keys = Keys(namespace)
        if role is Role.WORKER:
            rules += [f"~{keys.descriptor}", f"~{keys.members()}", f"~{keys.base}*"]
            rules.append(f"{'~' if namespace.endswith('*') else '%R~'}{keys.secret}")
        elif role is Role.READER:
            rules += [f"%R~{key}" for key in _read_by_routers(keys)]
        else:
            rules += [f"%R~{key}" for key in _structure(keys)]
    if role is Role.WORKER:
        rules += [f"(%W~{PROBE} -@all +unlink)", f"(~{REGISTRY} -@all +evalsha +zadd)"]
    return tuple(rules)


def rules_of(role: Role, namespaces: tuple[str, ...]) -> tuple[str, ...]:
    """All that a user of this kind may do in these namespaces, as rules of ACL SETUSER."""
    keys = keys_of(role, namespaces)
    plain = [rule for rule in keys if not rule.startswith("(")]
    selectors = [rule for rule in keys if rule.startswith("(")]
    if role is Role.ADMIN:
        return (*plain, "+@all")
    commands = [f"+{command}" for command in commands_of(role)]
    return ("resetkeys", *plain, "resetchannels", "-@all", *commands, *selectors)


@dataclass(frozen=True, slots=True)
class User:
    """A user of a server. Raises ConfigError for a name that an ACL file cannot have."""

    name: str
    role: Role
    namespaces: tuple[str, ...]
    password_hash: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name) or self.name == "default":
            raise ConfigError(
                f"the {self.role} user is {self.name!r}: 1 to 64 letters, digits, dots, hyphens, underscores are "
                "allowed, and default is the server's own"
            )

    @property
    def rules(self) -> tuple[str, ...]:
        """What ACL SETUSER takes after the name."""
        return ("reset", "on", f"#{self.password_hash}", *rules_of(self.role, self.namespaces))

    @property
    def line(self) -> str:
        """The user as a line of an ACL file."""
        return " ".join(("user", self.name, *self.rules[1:]))


def _read_by_routers(keys: Keys) -> tuple[str, ...]:
    """Keys that say which worker holds what."""
    roster = (keys.epochs, keys.workers, keys.version, keys.changes, keys.member("*"), keys.metrics)
    tree = (keys.meta, keys.hot, keys.log, keys.node("*"), keys.junction("*"), keys.stream("*"))
    return keys.descriptor, keys.secret, *roster, *tree


def _structure(keys: Keys) -> tuple[str, ...]:
    """Keys that hold neither payloads nor a secret. Patterns cannot say "all but", so each kind is named."""
    roster = (keys.epochs, keys.workers, keys.version, keys.changes, keys.member("*"), keys.metrics)
    locks = (keys.voided, keys.swept, keys.sweeping, keys.forgetting)
    lists = (keys.meta, keys.leaves, keys.log, keys.holders, keys.hot, keys.writers)
    cold = (keys.trash, keys.kept, keys.unsettled)
    kinds = (keys.node("*"), keys.junction("*"), keys.stream("*"), keys.claim("*"), keys.moving("*"))
    return keys.descriptor, *roster, *locks, *lists, *cold, *kinds
