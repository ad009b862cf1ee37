"""`distprefix provision`: prepare a server so that workers need no right to load scripts."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import redis
import typer

from distprefix.cli.common import EXIT_USAGE, Url, errors, opened
from distprefix.cli.output import fail, say, write_lines
from distprefix.config import PrefixCacheConfig
from distprefix.errors import ConfigError
from distprefix.redis.provision import (
    apply_users,
    create_namespace,
    is_default_open,
    load_scripts,
    new_password,
    read_passwords,
    write_passwords,
    write_private,
)
from distprefix.redis.rights import Role, User, check_pattern, hash_password

__all__ = ["provision"]

_SETTING = "DISTPREFIX_"
_Lines = list[str]


def provision(
    url: Url = None,
    namespace: Annotated[
        list[str] | None,
        typer.Option(help="A namespace to make, or NAME* for all that begin so. May be given again."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A TOML file with the namespaces' settings; default: DISTPREFIX_*.")
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the namespaces."),
    ] = None,
    worker_user: Annotated[str | None, typer.Option(help="A user for workers: reads and writes them.")] = None,
    reader_user: Annotated[str | None, typer.Option(help="One for routers: reads all but payloads.")] = None,
    inspector_user: Annotated[
        str | None, typer.Option(help="One for people: reads all but payloads and secrets.")
    ] = None,
    operator_user: Annotated[
        str | None, typer.Option(help="One that maintains every namespace and loads scripts.")
    ] = None,
    admin_user: Annotated[str | None, typer.Option(help="One that may do everything.")] = None,
    passwords_file: Annotated[
        Path | None, typer.Option(help="Where passwords are read from, and new ones are kept; mode 600.")
    ] = None,
    acl_file: Annotated[
        Path | None, typer.Option(help="Write the users to this ACL file, mode 600; default: to standard output.")
    ] = None,
    apply: Annotated[bool, typer.Option("--apply", help="Set the users on the server and have it save them.")] = False,
    users_only: Annotated[
        bool, typer.Option("--users-only", help="Make users alone, for a server that is yet to start.")
    ] = False,
    scripts_only: Annotated[
        bool, typer.Option("--scripts-only", help="Load scripts alone, as after each start of the server.")
    ] = False,
    every: Annotated[
        float | None, typer.Option(min=0.1, help="Load missing scripts every so many seconds, until stopped.")
    ] = None,
) -> None:
    """Load the scripts, make namespaces, and make users that may do no more than they need.

    A user's password is the environment's DP_WORKER_PASSWORD, DP_READER_PASSWORD and so on, else that of
    --passwords-file, else a new one. New ones go to --passwords-file, or are shown once on standard error.
    """
    names = {
        Role.WORKER: worker_user,
        Role.READER: reader_user,
        Role.INSPECTOR: inspector_user,
        Role.OPERATOR: operator_user,
        Role.ADMIN: admin_user,
    }
    wanted = {role: name for role, name in names.items() if name is not None}
    spaces = tuple(namespace or ())
    with errors():
        _check(url, spaces, wanted, users_only=users_only, scripts_only=scripts_only, apply=apply)
        users, shown = _users(wanted, spaces, passwords_file)
        if users and acl_file is None and not apply:
            write_lines(_acl_file(users))
        if acl_file is not None:
            write_private(acl_file, _acl_file(users))
            say(f"{acl_file}: {len(users)} users; the server reads it at its start, or with ACL LOAD")
        if not users_only:
            with opened(url) as (client, where):
                _prepare(client, where, spaces, config, setting or (), users if apply else ())
                _show(shown)
                _keep(client, every)
            return
        _show(shown)


def _check(
    url: str | None,
    spaces: Sequence[str],
    wanted: dict[Role, str],
    *,
    users_only: bool,
    scripts_only: bool,
    apply: bool,
) -> None:
    """End the command where its options do not go together."""
    if users_only and (scripts_only or apply or not wanted):
        fail("--users-only makes users: name one (--worker-user), without --scripts-only and --apply", EXIT_USAGE)
    if scripts_only and (wanted or spaces):
        fail("--scripts-only loads scripts alone: leave out namespaces and users", EXIT_USAGE)
    if url is None and not users_only:
        fail("name the server with --url or DISTPREFIX_URL, or pass --users-only", EXIT_USAGE)
    if apply and not wanted:
        fail("--apply sets users: name one, as with --worker-user", EXIT_USAGE)
    for each in spaces:
        check_pattern(each)
    limited = [role for role in wanted if role not in (Role.OPERATOR, Role.ADMIN)]
    if limited and not spaces:
        fail(f"which namespaces is the {limited[0]} user for? Name them with --namespace", EXIT_USAGE)
    if len(set(wanted.values())) < len(wanted):
        fail("two users have the same name: each kind needs one of its own", EXIT_USAGE)


def _users(
    wanted: dict[Role, str], spaces: tuple[str, ...], passwords_file: Path | None
) -> tuple[list[User], dict[str, str]]:
    """The users, and the passwords that were made up and are in no file: they have to be shown."""
    kept = read_passwords(passwords_file) if passwords_file is not None else {}
    made: dict[str, str] = {}
    users: list[User] = []
    for role, name in wanted.items():
        variable = f"DP_{role.upper()}_PASSWORD"
        password = os.environ.get(variable) or kept.get(variable)
        if not password:
            password = new_password()
            made[variable] = password
        users.append(User(name, role, spaces, hash_password(password)))
    if passwords_file is None:
        return users, made
    if made:
        write_passwords(passwords_file, made)
        say(f"{passwords_file}: {', '.join(made)}")
    return users, {}


def _acl_file(users: Sequence[User]) -> _Lines:
    """An ACL file; who gives no name may do nothing."""
    return ["user default off", *(user.line for user in users)]


def _prepare(
    client: redis.Redis,
    url: str,
    spaces: Sequence[str],
    config: Path | None,
    settings: Sequence[str],
    users: Sequence[User],
) -> None:
    loaded = load_scripts(client)
    say(f"scripts: {loaded} loaded; load them again after each start of the server (--scripts-only, --every)")
    for space in spaces:
        if not space.endswith("*"):
            create_namespace(client, _config(url, space, config, settings))
            say(f"namespace {space}: it is there")
    if not users:
        return
    is_saved = apply_users(client, users)
    say(f"users: {', '.join(user.name for user in users)} set")
    if not is_saved:
        say("note: the server has no ACL file, its users end with it: give it an aclfile, or pass --acl-file")
    if is_default_open(client):
        say("note: user default may still do everything without a password: make an admin user and switch it off")


def _config(url: str, namespace: str, path: Path | None, settings: Sequence[str]) -> PrefixCacheConfig:
    """Settings of a namespace: those given, over those of the file or the environment."""
    env: dict[str, str] = {}
    for each in settings:
        name, mark, value = each.partition("=")
        if not mark:
            raise ConfigError(f"--set is {each!r}: write NAME=VALUE, as chunk_size=16")
        env[f"{_SETTING}{name.strip().upper()}"] = value.strip()
    if path is None:
        return PrefixCacheConfig.from_env({**os.environ, **env}, url=url, namespace=namespace)
    given = PrefixCacheConfig.from_env(env)
    over = {name.removeprefix(_SETTING).lower() for name in env}
    return PrefixCacheConfig.from_toml(
        path, **{name: getattr(given, name) for name in over}, url=url, namespace=namespace
    )


def _keep(client: redis.Redis, every: float | None) -> None:
    """Load scripts that the server has come to lack, and go on while it is away."""
    while every is not None:
        time.sleep(every)
        try:
            loaded = load_scripts(client)
        except (redis.ConnectionError, redis.TimeoutError) as error:
            say(f"the server does not answer: {error}")
            continue
        if loaded:
            say(f"scripts: {loaded} loaded again")


def _show(passwords: dict[str, str]) -> None:
    """Show new passwords, once."""
    if passwords:
        say("new passwords, shown only now:")
    for name, value in passwords.items():
        say(f"  {name}={value}")
