"""What an engine's weights are: the hub's revision, or a digest of every byte, computed once for each file."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any, cast

from distprefix.identity import Identity

__all__ = ["Identity", "await_weights", "is_pending", "weights_of", "weights_soon"]

_PATTERNS = ("config.json", "*.safetensors", "*.bin", "*.pt", "*.gguf")
_PENDING = "not yet digested: "
_POLL_S = 0.1
_PIECE = 8 * 1024 * 1024
_AT_ONCE_BYTES = 64 * 1024 * 1024
"""A tenth of a second: so much is digested while an engine starts."""
_MAX_REMEMBERED = 4096
"""Digests that the file keeps, of the files digested last."""


def weights_of(model: str, revision: str | None = None) -> str:
    """The revision of a model of the hub, or a digest of all bytes of a folder's files: two fine-tunes differ in it.

    Reads what no process of this user has digested before, as long as path, size, time of change and inode are the
    same: a second or two for each GB. A folder of the hub's cache is named by its commit, and nothing is read.
    """
    return await_weights(weights_soon(model, revision, at_once=0), lambda: False)


def weights_soon(model: str, revision: str | None = None, *, at_once: int = _AT_ONCE_BYTES) -> str:
    """As `weights_of` where that takes no time; else what `await_weights` makes the digest of."""
    folder = Path(model)
    if not folder.is_dir():
        return revision or "main"
    folder = folder.resolve()
    commit = re.fullmatch(r"[0-9a-f]{40}", folder.name)
    if commit and folder.parent.name == "snapshots":
        return commit[0]
    remembered = _remembered()
    unknown = sum(path.stat().st_size for path in _files_of(folder) if _stamp(path) not in remembered)
    pending = f"{_PENDING}{folder}"
    return pending if unknown > at_once else await_weights(pending, lambda: False)


def is_pending(weights: str) -> bool:
    """Whether `await_weights` has to be asked for the digest."""
    return weights.startswith(_PENDING)


def await_weights(weights: str, is_cancelled: Callable[[], bool]) -> str:
    """The digest of what `weights_soon` left for later; other weights as they are. Empty when cancelled.

    Processes that ask at the same time read the files once: one reads, the others wait.
    """
    if not is_pending(weights):
        return weights
    folder = Path(weights.removeprefix(_PENDING))
    total = hashlib.sha256()
    with _locked(is_cancelled):
        remembered = _remembered()
        for path in _files_of(folder):
            stamp = _stamp(path)
            if stamp not in remembered:
                digest = _digest_of(path, is_cancelled)
                if digest is None:
                    return ""
                remembered[stamp] = digest
                _remember(remembered)
            total.update(f"{path.name}\n{remembered[stamp]}\n".encode())
    return total.hexdigest()[:32]


def _files_of(folder: Path) -> list[Path]:
    return [path for pattern in _PATTERNS for path in sorted(folder.glob(pattern))]


def _stamp(path: Path) -> str:
    """What changes when a file does."""
    found = path.stat()
    return f"{path.resolve()} {found.st_size} {found.st_mtime_ns} {found.st_ctime_ns} {found.st_dev} {found.st_ino}"


def _digest_of(path: Path, is_cancelled: Callable[[], bool]) -> str | None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            if is_cancelled():
                return None
    return digest.hexdigest()


# What was digested before, in a file of this user's


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "distprefix"


def _remembered() -> dict[str, str]:
    """Digests by stamp; none where the file is not there, damaged, or another user's or could be written by one."""
    path = _folder() / "weights.json"
    try:
        found = path.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            return {}
        kept: Any = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    if not isinstance(kept, dict):
        return {}
    return {stamp: digest for stamp, digest in cast("dict[str, Any]", kept).items() if isinstance(digest, str)}


def _remember(digests: dict[str, str]) -> None:
    """Best effort: where there is no home, the files are read again by the next process."""
    newest = dict(list(digests.items())[-_MAX_REMEMBERED:])
    with contextlib.suppress(OSError):
        _folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=_folder(), prefix="weights-")
        try:
            with os.fdopen(handle, "w") as file:
                json.dump(newest, file)
            Path(name).replace(_folder() / "weights.json")
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _locked(is_cancelled: Callable[[], bool]) -> Generator[None]:
    """Whoever else digests weights on this machine is awaited, unless there is no folder to say so in."""
    try:
        _folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(_folder() / "weights.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        yield
        return
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if is_cancelled():
                    break
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(handle)
