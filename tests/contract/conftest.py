"""Servers that tests of the tiers use."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import cache

import pytest

from distprefix.redis import client, integrity, scripts
from distprefix.tiers import envelope, store
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


PART_BYTES = 512


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> int:
    """Parts of long payloads have so few bytes, here and in the scripts. Returns how many."""
    real = scripts.load_script

    @cache
    def load(name: str, *, with_flags: bool = True) -> scripts.Script:
        script = real(name, with_flags=with_flags)
        body = script.body.replace("8388608", str(PART_BYTES))
        sha = hashlib.sha1(body.encode(), usedforsecurity=False).hexdigest()
        return script._replace(body=body, sha=sha)

    monkeypatch.setattr(client, "load_script", load)
    for module in (store, envelope, integrity):
        monkeypatch.setattr(module, "PART_BYTES", PART_BYTES)
    monkeypatch.setattr(store, "_MAX_DIGEST_BYTES", PART_BYTES)
    return PART_BYTES
