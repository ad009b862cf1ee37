"""Secrets in settings and files: no message has them, and files that others may write are refused."""

from __future__ import annotations

import logging
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distprefix import PrefixCacheConfig
from distprefix.errors import ConfigError
from distprefix.secret_files import read_secret

HIDDEN = "S3cr3tPw"
SECRETS = [spec for spec in PrefixCacheConfig.__dataclass_fields__.values() if not spec.repr]


def _refused(call: Callable[[], object]) -> str:
    """All that a refusal says: its message, those that it stands for, and the traceback."""
    with pytest.raises(ConfigError) as caught:
        call()
    parts: list[str] = ["".join(traceback.format_exception(caught.value))]
    chain: BaseException | None = caught.value
    while chain is not None:
        parts += [str(chain), repr(chain), repr(vars(chain))]
        chain = chain.__cause__ or chain.__context__
    return "\n".join(parts)


def _private(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


def test_secret_settings_are_known() -> None:
    """URLs, salt and keys are secrets: no text of the settings has them."""
    assert {"url", "cold_url", "salt", "encryption_keys"} <= {spec.name for spec in SECRETS}
    config = PrefixCacheConfig(url=f"redis://u:{HIDDEN}@h", salt=HIDDEN, cold_url=f"redis://u:{HIDDEN}@h")
    assert HIDDEN not in repr(config) + str(config)


@pytest.mark.parametrize("name", [spec.name for spec in SECRETS])
@pytest.mark.parametrize("value", [[HIDDEN], {"key": HIDDEN}, HIDDEN.encode(), True])
def test_a_secret_of_the_wrong_type_is_not_quoted(name: str, value: Any) -> None:
    """A message about a secret names the setting and the type, and not the value."""
    said = _refused(lambda: PrefixCacheConfig.from_mapping({name: value}))
    assert f"{name} is of type {type(value).__name__}: it must be text" in said
    assert HIDDEN not in said


def test_a_url_in_the_wrong_setting_shows_no_password() -> None:
    """What looks like a URL is shown without a password, whichever setting it was given to."""
    url = f"redis://u:{HIDDEN}@h"
    for call in (
        lambda: PrefixCacheConfig(namespace=url),
        lambda: PrefixCacheConfig.from_mapping({"chunk_size": url}),
        lambda: PrefixCacheConfig.from_env({"DISTPREFIX_RANK": url}),
    ):
        said = _refused(call)
        assert "redis://***@h" in said
        assert HIDDEN not in said


@pytest.mark.parametrize(
    "text",
    [
        f"salt = {HIDDEN}",
        f'url = "redis://u:{HIDDEN}@h',
        f'salt = "{HIDDEN}"\nsalt = "{HIDDEN}"',
        f'"{HIDDEN}" = 1\n"{HIDDEN}" = 2',
        f"[{HIDDEN}]\n[{HIDDEN}]",
        f'distprefix = "{HIDDEN}"',
        f'salt = "\\{HIDDEN}"',
        f'salt = "{HIDDEN}\x01"',
        f'chunk_size = {"9" * 5000}\nsalt = "{HIDDEN}"',
        f'salt = "{HIDDEN}"\nx = {"[" * 5000}',
        f"salt = 2026-99-99T{HIDDEN}",
    ],
)
def test_a_broken_file_is_not_quoted(tmp_path: Path, text: str) -> None:
    """A TOML file that cannot be read is told by its name and the place, with nothing of what it holds."""
    path = _private(tmp_path / "node.toml", text)
    said = _refused(lambda: PrefixCacheConfig.from_toml(path))
    assert "node.toml" in said
    assert HIDDEN not in said
    path.write_bytes(f'salt = "{HIDDEN}'.encode() + b'\xff"')
    said = _refused(lambda: PrefixCacheConfig.from_toml(path))
    assert "no UTF-8" in said
    assert HIDDEN not in said


def test_a_url_leaves_no_cause_that_quotes_it() -> None:
    """The refusal of a URL has no context from which a password comes out."""
    for place in ("h:abc", "h/x", "[bad", "h?db=x"):
        said = _refused(lambda place=place: PrefixCacheConfig(url=f"redis://u:{HIDDEN}@{place}"))
        assert HIDDEN not in said


WITH_SECRETS = (f'salt = "{HIDDEN}"', f'cold_url = "redis://:{HIDDEN}@h"', f'encryption_keys = "1:{"ab" * 16}"')


@pytest.mark.parametrize("text", WITH_SECRETS)
@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, text: str, mode: int) -> None:
    """Whoever may write a file with secrets may choose them: the message says what to do."""
    path = _private(tmp_path / "node.toml", text, mode)
    with pytest.raises(ConfigError, match=r"others may write it \(mode 6..\): chmod 600"):
        PrefixCacheConfig.from_toml(path)


@pytest.mark.parametrize("text", WITH_SECRETS)
def test_a_file_that_others_may_read_is_warned_of(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    """Readable by others is a warning that names the file, readable by its owner only is none."""
    path = _private(tmp_path / "node.toml", text, 0o644)
    with caplog.at_level(logging.WARNING, "distprefix"):
        PrefixCacheConfig.from_toml(path)
    (record,) = caplog.records
    assert "node.toml holds secrets and others may read it (mode 644): chmod 600" in record.getMessage()
    caplog.clear()
    path.chmod(0o600)
    PrefixCacheConfig.from_toml(path)
    assert not caplog.records


def test_a_file_without_secrets_is_anybodys(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Settings without a password, salt or key may lie open."""
    path = _private(tmp_path / "node.toml", 'url = "redis://h:1/2"\nsalt = ""\nchunk_size = 8', 0o666)
    assert PrefixCacheConfig.from_toml(path).chunk_size == 8
    assert not caplog.records


def test_links_and_folders_are_looked_at(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A link of ours is followed to its file; a folder in which all may replace the file is refused."""
    folder = tmp_path / "open"
    folder.mkdir()
    target = _private(folder / "secret", HIDDEN)
    link = tmp_path / "link"
    link.symlink_to(target)
    assert read_secret(link, "--url") == HIDDEN
    target.chmod(0o640)
    assert read_secret(link, "--url") == HIDDEN
    assert "others may read it" in caplog.text
    target.chmod(0o600)
    folder.chmod(0o777)
    with pytest.raises(ConfigError, match="others may replace it"):
        read_secret(link, "--url")
    folder.chmod(0o1777)  # sticky, as /tmp: only owners replace
    assert read_secret(link, "--url") == HIDDEN


def test_a_file_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that belongs to neither this user nor root could be changed by its owner."""
    path = _private(tmp_path / "secret", HIDDEN)
    owner = path.stat().st_uid
    if owner == 0:
        os.chown(path, 12_345, -1)
    else:
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    with pytest.raises(ConfigError, match="belongs to user"):
        read_secret(path, "--url")


@pytest.mark.parametrize("data", [b"", b"\n", b"one\ntwo", b"\xff"])
def test_a_secret_is_one_line(tmp_path: Path, data: bytes) -> None:
    """A file of several lines, of none or of no text is refused without being quoted."""
    path = _private(tmp_path / "secret", "")
    path.write_bytes(data)
    assert "must hold one line of text" in _refused(lambda: read_secret(path, "--url"))
    path.write_bytes(f"{HIDDEN}\r\n".encode())
    assert read_secret(path, "--url") == HIDDEN


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    """What is not there, is a folder or is endless is told by name and reason."""
    for path, reason in (
        (tmp_path / "absent", "No such file"),
        (tmp_path, "Is a directory"),
        (Path("/dev/zero"), "more than 1,048,576 bytes"),
        (Path("a\0b"), "no such name"),
    ):
        assert reason in _refused(lambda path=path: read_secret(path, "--url"))


def test_secrets_from_files_that_variables_name(tmp_path: Path) -> None:
    """DISTPREFIX_URL_FILE and the like name files that hold a secret; the variable that has it itself wins."""
    url = _private(tmp_path / "url", f"redis://u:{HIDDEN}@h\n")
    salt = _private(tmp_path / "salt", HIDDEN)
    env = {"DISTPREFIX_URL_FILE": str(url), "DISTPREFIX_SALT_FILE": str(salt)}
    config = PrefixCacheConfig.from_env(env)
    assert (config.url, config.salt) == (f"redis://u:{HIDDEN}@h", HIDDEN)
    for both in ({**env, "DISTPREFIX_SALT": "other"}, {"DISTPREFIX_SALT": "other", **env}):
        assert PrefixCacheConfig.from_env(both).salt == "other"
    with pytest.raises(ConfigError, match="unknown setting 'chunk_size_file'"):
        PrefixCacheConfig.from_env({"DISTPREFIX_CHUNK_SIZE_FILE": str(url)})
    salt.chmod(0o666)
    with pytest.raises(ConfigError, match="chmod 600"):
        PrefixCacheConfig.from_env(env)
