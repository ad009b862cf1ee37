"""Preparing a server for users that may not load scripts: the scripts, a namespace, and the users themselves."""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import redis
from redis.exceptions import NoPermissionError

from distprefix.config import PrefixCacheConfig
from distprefix.errors import ConfigError
from distprefix.redis.client import Client
from distprefix.redis.keys import Keys
from distprefix.redis.namespace import attach
from distprefix.redis.rights import User
from distprefix.redis.scripts import SCRIPTS, load_script

__all__ = [
    "apply_users",
    "create_namespace",
    "is_default_open",
    "load_scripts",
    "new_password",
    "read_passwords",
    "write_passwords",
    "write_private",
]

_TIMEOUT_S = 5.0
_PASSWORD_BYTES = 24


def load_scripts(client: redis.Redis) -> int:
    """Load the scripts that the server does not know, and return how many that were. A call, and one for each.

    A server keeps them until it restarts, fails over, or is told SCRIPT FLUSH. Raises ConfigError for a user that may
    not load them, and what redis-py raises.
    """
    wanted = [load_script(name) for name in SCRIPTS]
    try:
        known: Any = client.script_exists(*(script.sha for script in wanted))
        missing = [script for script, there in zip(wanted, known, strict=True) if not there]
        for script in missing:
            client.script_load(script.body)
    except NoPermissionError as error:
        raise ConfigError(f"this user may not load scripts: log in as an operator or administrator ({error})") from None
    return len(missing)


def create_namespace(client: redis.Redis, config: PrefixCacheConfig) -> None:
    """Make a namespace, or compare with what it was made with. As many calls as `attach` says.

    Raises NamespaceError and names every difference.
    """
    attach(Client(client), Keys(config.namespace), config, time.monotonic() + _TIMEOUT_S)


def apply_users(client: redis.Redis, users: Iterable[User]) -> bool:
    """Set the users, and have the server keep them. Returns whether it can: it has an ACL file. A call for each user.

    Users of the same names are replaced. Raises what redis-py raises.
    """
    for user in users:
        client.execute_command("ACL", "SETUSER", user.name, *user.rules)
    try:
        client.execute_command("ACL", "SAVE")
    except redis.ResponseError as error:
        if "not configured" not in str(error):
            raise
        return False
    return True


def is_default_open(client: redis.Redis) -> bool:
    """Whether anybody may do anything without a password: the user ``default`` is as servers come. One call."""
    found: Any = client.execute_command("ACL", "GETUSER", "default")
    flags: Any = (found if isinstance(found, dict) else dict(zip(found[::2], found[1::2], strict=True)))[b"flags"]
    return {b"on", b"nopass"} <= set(flags)


def new_password() -> str:
    """A password that nobody guesses; its letters need no quoting in URLs, shells and environment files."""
    return secrets.token_urlsafe(_PASSWORD_BYTES)


def read_passwords(path: Path) -> dict[str, str]:
    """The variables of an environment file, none where there is no such file. Raises ConfigError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    pairs = (line.partition("=") for line in lines if "=" in line and not line.lstrip().startswith("#"))
    return {name.strip(): value.strip() for name, _, value in pairs}


def write_passwords(path: Path, passwords: Mapping[str, str]) -> None:
    """Add variables to an environment file that only its owner may read. Raises ConfigError."""
    try:
        before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    write_private(path, [*before, *(f"{name}={value}" for name, value in passwords.items())])


def write_private(path: Path, lines: Sequence[str]) -> None:
    """Replace a file, in one step, by one that only its owner may read. Raises ConfigError."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        part.unlink(missing_ok=True)
        with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in lines)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ConfigError(f"{path} cannot be written: {error}") from error
