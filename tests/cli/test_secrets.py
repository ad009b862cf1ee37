"""Passwords on the command line: other ways in than an option, and nothing that is printed has them."""

from __future__ import annotations

import socketserver
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from typer.testing import CliRunner

from distprefix.cli.app import app
from distprefix.errors import DistPrefixError, UnavailableError
from distprefix.redis.client import Client
from distprefix.redis.connections import connect
from distprefix.redis.data import DataPool
from distprefix.redis.endpoint import Endpoint
from tests.servers import Backend

HIDDEN = "S3cr3tPw"


def _run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str]:
    names = ("DISTPREFIX_URL", "DISTPREFIX_URL_FILE", "DISTPREFIX_COLD_URL")
    run = CliRunner().invoke(app, arguments, env={**dict.fromkeys(names), **(env or {})})
    assert run.exception is None or isinstance(run.exception, SystemExit)
    return run.exit_code, run.output


def _private(path: Path, text: str) -> str:
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


def test_a_url_comes_from_a_file(real_server: Backend, tmp_path: Path) -> None:
    """--url @FILE, DISTPREFIX_URL=@FILE and DISTPREFIX_URL_FILE lead to the same server as the URL itself."""
    real_server.open("w1").cache_prefix(list(range(8)))
    path = _private(tmp_path / "url", f"{real_server.url}\n")
    command = ("stats", "--namespace", real_server.namespace)
    assert _run(*command, "--url", f"@{path}")[0] == 0
    assert _run(*command, env={"DISTPREFIX_URL": f"@{path}"})[0] == 0
    assert _run(*command, env={"DISTPREFIX_URL_FILE": path})[0] == 0
    assert _run(*command, env={"DISTPREFIX_URL": real_server.url or ""})[0] == 0


def test_a_salt_comes_from_a_file(real_server: Backend, tmp_path: Path) -> None:
    """Lookup reads the namespace's salt and the request's from files."""
    worker = real_server.open("w1", salt=HIDDEN)
    worker.cache_prefix(worker.chain_of(list(range(8)), cache_salt="mine"))
    prompt = _private(tmp_path / "prompt", " ".join(map(str, range(8))))
    salt = _private(tmp_path / "salt", HIDDEN)
    mine = _private(tmp_path / "mine", "mine")
    command = ("lookup", prompt, "--url", real_server.url or "", "--namespace", real_server.namespace)
    code, output = _run(*command, "--salt-file", salt, "--cache-salt-file", mine)
    assert (code, "8 of 8 tokens" in output) == (0, True)
    assert _run(*command, "--cache-salt-file", mine, env={"DISTPREFIX_SALT_FILE": salt})[0] == 0
    assert _run(*command, "--salt-file", salt)[0] == 1


@pytest.mark.parametrize("option", ["--url", "--cold-url"])
def test_a_file_that_others_may_write_is_refused(tmp_path: Path, option: str) -> None:
    """The command ends with exit code 2 and says what to do; a file that is not there is told by name."""
    path = Path(_private(tmp_path / "url", f"redis://u:{HIDDEN}@h"))
    path.chmod(0o622)
    code, output = _run("maintain", "--repair", option, f"@{path}")
    assert (code, "chmod 600" in output) == (2, True)
    code, output = _run("maintain", "--repair", option, f"@{tmp_path}/absent")
    assert (code, "No such file" in output) == (2, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("stats", f"redis://u:{HIDDEN}@h"),
        (f"redis://u:{HIDDEN}@h", "stats"),
        ("stats", "more", f"redis://u:{HIDDEN} x@h", "more"),
        ("stats", f"u:{HIDDEN}@h"),
        ("stats", f"--ulr=redis://u:{HIDDEN}@h"),
        ("maintain", "--batch", f"redis://u:{HIDDEN}@h"),
        ("lookup", "-", f"redis://h?password={HIDDEN}"),
        ("stats", "--url", f"redis://u:{HIDDEN}@h:port"),
        ("stats", "--url", f"redis://u:{HIDDEN}@127.0.0.1:1"),
    ],
)
def test_a_url_in_the_wrong_place_shows_no_password(arguments: tuple[str, ...]) -> None:
    """What is said of an argument that makes no sense there hides its password."""
    code, output = _run(*arguments)
    assert code in (2, 3)
    assert output
    assert HIDDEN not in output


class _Echo(socketserver.StreamRequestHandler):
    """A server of long ago, or one that spies: it answers with what it was sent, as they do with unknown commands."""

    def handle(self) -> None:
        """Answer whatever comes with an error that repeats it."""
        while line := self.rfile.readline():
            words = [self.rfile.read(int(self.rfile.readline()[1:]) + 2)[:-2] for _ in range(int(line[1:]))]
            quoted = b"`, `".join(words[1:])
            self.wfile.write(
                b"-ERR unknown command `%s`, with args beginning with: `%s`\x1b[2J\r\n" % (words[0], quoted)
            )


@pytest.fixture
def echo() -> Iterator[str]:
    """The URL of such a server, with a password."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"redis://user:{HIDDEN}@127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.parametrize("endpoint", [None, Endpoint()])
@pytest.mark.parametrize("protocol", ["2", "3"])
def test_a_server_that_repeats_the_password(echo: str, protocol: str, endpoint: Endpoint | None) -> None:
    """Neither a refusal, nor what it stands for, nor a traceback has a password that the server sent back."""
    url = f"{echo}?protocol={protocol}"
    client = connect(url, 5.0, endpoint)
    pool = DataPool(url, timeout_s=5.0, endpoint=endpoint)
    for call in (
        client.ping,
        lambda: Client(client).command("PING", deadline=time.monotonic() + 5),
        lambda: pool.delete(["x"], time.monotonic() + 5),
    ):
        with pytest.raises((redis.RedisError, UnavailableError)) as caught:
            call()
        said = "".join(traceback.format_exception(caught.value))
        assert "not shown" in said
        assert HIDDEN not in said
        assert "\x1b" not in said
    client.close()
    pool.close()


def test_what_a_server_answers_is_escaped(echo: str) -> None:
    """An error that a server answers with is one printable line, on both paths and in all that it is raised from."""
    url = echo.replace(f"user:{HIDDEN}@", "") + "?protocol=2"
    client = connect(url, 5.0)
    pool = DataPool(url, timeout_s=5.0)
    for call in (
        client.ping,
        lambda: Client(client).command("PING", deadline=time.monotonic() + 5),
        lambda: pool.delete(["x"], time.monotonic() + 5),
    ):
        with pytest.raises((redis.RedisError, DistPrefixError)) as caught:
            call()
        assert r"\x1b[2J" in str(caught.value)
        assert "\x1b" not in "".join(traceback.format_exception(caught.value))
    client.close()
    pool.close()


def test_clients_show_no_password(echo: str) -> None:
    """The text of a client and of its pool, as a debugger or a log shows it, has no password."""
    with connect(echo, 1.0) as client:
        assert HIDDEN not in repr(client) + repr(client.connection_pool)
