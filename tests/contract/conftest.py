"""Servers that tests of the tiers use."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.servers import Backend, Server, find_server


@pytest.fixture
def third() -> Iterator[Server]:
    """A server for cold payloads that the test may stop."""
    server = Server(find_server("valkey-9.1")).start()
    yield server
    server.stop()


@pytest.fixture
def own(own_server: Server) -> Iterator[Backend]:
    """Caches on a server that the test may stop."""
    backend = Backend("own", own_server.client(), "t", url=own_server.url)
    yield backend
    own_server.thaw()
    backend.close()
