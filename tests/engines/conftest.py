"""Engines and servers for the tests of engines that share KV."""

from __future__ import annotations

import itertools
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.engines.process import FOLDER, PYTHON, EngineProcess, make_model
from tests.engines.sharing import BLOCKS, Open
from tests.servers import Server, find_server


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights."""
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with two KV cache groups: sliding windows and full attention by turns."""
    return _make(tmp_path_factory.mktemp("hybrid"), "hybrid")


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights with sliding windows only, in one KV cache group."""
    return _make(tmp_path_factory.mktemp("windowed"), "windowed")


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[EngineProcess]:
    """An engine that shares nothing; to be waited for."""
    engine = EngineProcess(model, tmp_path_factory.mktemp("plain") / "log", "--blocks", str(BLOCKS))
    engine.start()
    yield engine
    engine.kill()


@pytest.fixture
def server() -> Iterator[Server]:
    """A server of the test's own."""
    server = Server(find_server("valkey-9.1")).start()
    yield server
    server.stop()


@pytest.fixture
def engines(tmp_path: Path, model: Path) -> Iterator[Open]:
    """Opens engines, any number at a time: they begin side by side, and are to be waited for."""
    numbers = itertools.count()
    with ExitStack() as stack:

        def begin(*options: str, of: Path = model) -> EngineProcess:
            log = tmp_path / f"engine-{next(numbers)}.log"
            engine = EngineProcess(of, log, "--blocks", str(BLOCKS), *options)
            stack.callback(engine.end)
            engine.begin()
            return engine

        yield begin


def _make(folder: Path, kind: str) -> Path:
    subprocess.run([PYTHON, str(FOLDER / "make_model.py"), str(folder), kind], check=True, capture_output=True)
    return folder
