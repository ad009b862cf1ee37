"""Files with secrets: who else may read or write them, and one secret from a file of its own."""

from __future__ import annotations

import logging
import os
import stat
from pathlib import Path

from distprefix.errors import ConfigError

__all__ = ["check_private", "read_private", "read_secret"]

_log = logging.getLogger("distprefix")
_LONGEST_FILE = 1024 * 1024
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_READ = stat.S_IRGRP | stat.S_IROTH


def read_secret(path: str | Path, setting: str) -> str:
    """The secret that a file holds, without the end of its line. Raises ConfigError as `check_private` does."""
    data, status = read_private(path)
    check_private(path, status)
    try:
        secret = data.decode().rstrip("\r\n")
    except UnicodeDecodeError:
        secret = ""
    if not secret or "\n" in secret:
        raise ConfigError(f"{setting}: {path} must hold one line of text, and nothing else")
    return secret


def read_private(path: str | Path) -> tuple[bytes, os.stat_result]:
    """The bytes of a file, and whose it was when they were read. Raises ConfigError where it cannot be read."""
    reason = ""
    try:
        with Path(path).open("rb") as file:
            status = os.fstat(file.fileno())
            data = file.read(_LONGEST_FILE + 1)
            if len(data) <= _LONGEST_FILE:
                return data, status
            reason = f"it has more than {_LONGEST_FILE:,} bytes"
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it has no such name"
    raise ConfigError(f"cannot read {path}: {reason}")


def check_private(path: str | Path, status: os.stat_result) -> None:
    """Raise ConfigError where others than this user and root could have written a file; log where they could read it.

    `status` is the file's own; a link to it, and the folders that hold both, are looked at here. What is no regular
    file, as a pipe, is nobody else's.
    """
    if not stat.S_ISREG(status.st_mode):
        return
    mine = (0, os.getuid())
    if status.st_uid not in mine:
        raise ConfigError(
            f"{path} holds secrets and belongs to user {status.st_uid}, who could change it: chown it to the user "
            "that runs this process, and chmod 600"
        )
    if status.st_mode & _OTHERS_WRITE:
        raise ConfigError(f"{path} holds secrets and others may write it (mode {_mode(status)}): chmod 600 {path}")
    for each in {Path(path), Path(os.path.realpath(path))}:
        link = each.lstat()
        if link.st_uid not in mine:
            raise ConfigError(f"{each} leads to a file with secrets and belongs to user {link.st_uid}: use your own")
        folder = each.absolute().parent.stat()
        is_open = folder.st_mode & stat.S_IWOTH and not folder.st_mode & stat.S_ISVTX
        if is_open or folder.st_uid not in mine:
            raise ConfigError(
                f"{each} holds secrets and others may replace it: its folder must belong to this user or root, and "
                f"not be writable by all (chmod o-w {each.parent})"
            )
    if status.st_mode & _OTHERS_READ:
        _log.warning("%s holds secrets and others may read it (mode %s): chmod 600 it", path, _mode(status))


def _mode(status: os.stat_result) -> str:
    return f"{stat.S_IMODE(status.st_mode):o}"
