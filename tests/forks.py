"""Processes without the start-up of an interpreter: a server that has imported what they run forks them."""

from __future__ import annotations

import atexit
import functools
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_MESSAGE_BYTES = 1 << 20
_SERVE = "import sys; sys.path.insert(0, sys.argv[2]); from tests.forks import serve; serve(int(sys.argv[1]))"


def run_function(
    function: str,
    *arguments: str,
    stdin: str = "",
    env: Mapping[str, str] | None = None,
    timeout_s: float = 100.0,
) -> subprocess.CompletedProcess[str]:
    """Run `function` ("module:name") in a process of its own, as `python -c` would; `arguments` are its `sys.argv`.

    On Linux the process is forked from one that has imported the module, which saves the half second of imports.
    """
    environment = dict(os.environ if env is None else env)
    if sys.platform == "linux":
        return _server().run(function, arguments, stdin, environment, timeout_s)
    module, _, name = function.partition(":")
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from {module} import {name}; {name}()"
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=environment,
        check=False,
    )


class _ForkServer:
    """The process that forks; it ends when its socket is closed, which the end of this process does too."""

    def __init__(self) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        # Rich keeps the size that it finds at import; the forked process has its own.
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        environment["OPENBLAS_NUM_THREADS"] = "1"  # a process with threads cannot be forked safely
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE, str(theirs.fileno()), str(ROOT)],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=environment,
            )

    def close(self) -> None:
        """End it."""
        self._control.close()
        self._process.wait(10)

    def run(
        self, function: str, arguments: tuple[str, ...], stdin: str, env: dict[str, str], timeout_s: float
    ) -> subprocess.CompletedProcess[str]:
        """Fork once and wait for the end of the process."""
        order = {"function": function, "arguments": arguments, "env": env, "cwd": str(Path.cwd())}
        with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            given.write(stdin.encode())
            given.seek(0)
            status, theirs = os.pipe()
            with open(status, "rb", buffering=0) as reports:  # noqa: PTH123 - a descriptor
                try:
                    descriptors = [given.fileno(), out.fileno(), err.fileno(), theirs]
                    socket.send_fds(self._control, [json.dumps(order).encode()], descriptors)
                finally:
                    os.close(theirs)
                code = _exit_code(reports, timeout_s)
            if code is None:
                raise subprocess.TimeoutExpired([function, *arguments], timeout_s)
            texts: list[str] = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        return subprocess.CompletedProcess([function, *arguments], code, *texts)


@functools.cache
def _server() -> _ForkServer:
    server = _ForkServer()
    atexit.register(server.close)
    return server


def _exit_code(reports: Any, timeout_s: float) -> int | None:
    """What is reported of the process: first its id, then its exit code; it is killed after `timeout_s`."""
    said = b""
    late = False
    deadline = time.monotonic() + timeout_s
    while said.count(b"\n") < 2:
        if not late:
            late = not select.select([reports], [], [], max(0.0, deadline - time.monotonic()))[0]
        if late and b"\n" in said:
            os.kill(int(said), signal.SIGKILL)
            return None
        more = reports.read(64)  # the id comes as soon as the process exists
        assert more, "the server that forks processes has ended"
        said += more
    return int(said.split()[1])


def serve(descriptor: int) -> None:
    """Fork a process for every order that comes through the socket; return in each of them, or when it is closed."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are not waited for
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    control = socket.socket(fileno=descriptor)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, _MESSAGE_BYTES, 4)
        if not message:
            return
        for each in descriptors:
            os.set_inheritable(each, False)
        order: dict[str, Any] = json.loads(message)
        module, _, name = order["function"].partition(":")
        function: Callable[[], None] = getattr(importlib.import_module(module), name)
        gc.freeze()  # the child's collector leaves shared pages alone
        if os.fork() == 0:
            control.close()
            _become(order, descriptors)
            function()
            return
        for each in descriptors:
            os.close(each)


def _become(order: dict[str, Any], descriptors: list[int]) -> None:
    """Fork once more: the parent reports the exit code of the child, in which this returns."""
    *standard, status = descriptors
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    child = os.fork()
    if child:
        for each in standard:
            os.close(each)
        os.write(status, b"%d\n" % child)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        os.write(status, b"%d\n" % code)
        os._exit(0)
    os.close(status)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, each in enumerate(standard):
        os.dup2(each, number)
        os.close(each)
    os.environ.clear()
    os.environ.update(order["env"])
    os.chdir(order["cwd"])
    sys.argv = ["-c", *order["arguments"]]
