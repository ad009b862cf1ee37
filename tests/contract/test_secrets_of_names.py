"""The secret behind chunk hashes: made once, shared by who may use the namespace, never needed by nobody else."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from distprefix import PrefixCacheConfig
from distprefix.errors import ConfigError, NamespaceError
from tests.contract.test_find import prompt
from tests.servers import Backend

CONFIGURED = "a secret of this cluster"


def secret_of(backend: Backend) -> bytes | None:
    """The random secret that the namespace has in Redis."""
    found: Any = backend.admin.hget(backend.keys.secret, "secret")
    return found


def test_a_namespace_makes_a_random_secret_once(any_server: Backend) -> None:
    """The first process makes 32 random bytes; those that come later read them and share names."""
    any_server.open("w1").cache_prefix(prompt(5))
    secret = secret_of(any_server)
    assert secret is not None
    assert len(bytes.fromhex(secret.decode())) == 32
    assert any_server.open("w2").find_longest_cache_hit(prompt(5)).matched_chunks == 5
    assert secret_of(any_server) == secret
    other = any_server.open("w1", namespace=any_server.namespace + "-other")
    assert other.chain_of(prompt(5)) != any_server.opened[0].chain_of(prompt(5))


def test_processes_that_begin_at_once_agree(real_server: Backend) -> None:
    """Of many that make the namespace at the same time all have one secret, and find what each published."""
    with ThreadPoolExecutor(8) as pool:
        caches = list(pool.map(real_server.open, [f"w{n}" for n in range(8)]))
    caches[0].cache_prefix(prompt(5))
    assert {cache.find_longest_cache_hit(prompt(5)).matched_chunks for cache in caches} == {5}


def test_a_configured_secret_is_not_in_redis(any_server: Backend) -> None:
    """With a secret of the configuration the namespace makes none, and another one is refused."""
    any_server.open("w1", secret=CONFIGURED).cache_prefix(prompt(5))
    assert secret_of(any_server) is None
    assert any_server.open("w2", secret=CONFIGURED).find_longest_cache_hit(prompt(5)).matched_chunks == 5
    with pytest.raises(NamespaceError, match="another secret or salt"):
        any_server.open("w3", secret=CONFIGURED + "!")
    with pytest.raises(NamespaceError, match="DISTPREFIX_SECRET"):
        any_server.open("w4")
    assert secret_of(any_server) is None


def test_a_lost_secret_is_said(any_server: Backend) -> None:
    """Without the secret that a namespace was made with nobody invents another one."""
    any_server.open("w1").cache_prefix(prompt(5))
    any_server.admin.delete(any_server.keys.secret)
    with pytest.raises(NamespaceError, match="distprefix purge"):
        any_server.open("w2")


@pytest.mark.parametrize("damage", ["short", "string"])
def test_a_damaged_secret_is_said(any_server: Backend, damage: str) -> None:
    """A secret that another hand wrote, or a key of another type, gives a clear error at attach."""
    any_server.open("w1")
    any_server.admin.delete(any_server.keys.secret)
    if damage == "short":
        any_server.admin.hset(any_server.keys.secret, "secret", "abc")
    else:
        any_server.admin.set(any_server.keys.secret, "abc")
    with pytest.raises(NamespaceError, match=r"holds no secret|cannot be read"):
        any_server.open("w2")


def test_a_worker_brings_the_secret_back_after_a_flush(any_server: Backend) -> None:
    """The process that attaches again after a flush restores the secret: names stay as they were."""
    cache = any_server.open("w1", strict=False)
    cache.cache_prefix(prompt(5), range(5))
    before = secret_of(any_server)
    for pattern in (f"dp*{any_server.namespace}*",):
        any_server.admin.delete(*any_server.admin.scan_iter(match=pattern, count=1000))  # pyright: ignore[reportGeneralTypeIssues]
    cache.cache_prefix(prompt(5), range(5))
    assert secret_of(any_server) == before
    assert any_server.open("w2").find_longest_cache_hit(prompt(5)).matched_chunks == 5
    assert cache.get_metrics()["rekeyed"] == 0


def test_a_namespace_made_anew_by_another_is_followed(any_server: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """Where another process made the namespace first, the old names are forgotten, which is counted and said."""
    cache = any_server.open("w1", strict=False)
    cache.cache_prefix(prompt(5), range(5))
    old = cache.chain_of(prompt(5))
    any_server.admin.delete(*any_server.admin.scan_iter(match=f"dp*{any_server.namespace}*", count=1000))  # pyright: ignore[reportGeneralTypeIssues]
    other = any_server.open("w2")
    other.cache_prefix(prompt(5))
    with caplog.at_level(logging.WARNING, "distprefix"):
        cache.flush()
        assert cache.find_longest_cache_hit(prompt(5)).matched_chunks == 5
    assert cache.get_metrics()["rekeyed"] == 1
    assert "another secret" in caplog.text
    assert cache.chain_of(prompt(5)) == other.chain_of(prompt(5)) != old
    assert cache.get_computed_blocks(prompt(5)) == []
    cache.cache_prefix(prompt(5), range(5))
    assert {holder.name for holder in other.find_longest_cache_hit(prompt(7)).holders} >= {"w2/0@gpu"}
    assert cache.check_integrity().ok


def test_short_secrets_are_refused() -> None:
    """A secret that can be guessed is refused, and not shown."""
    with pytest.raises(ConfigError, match="16 at least") as caught:
        PrefixCacheConfig(secret="hunter2")
    assert "hunter2" not in str(caught.value)


def test_fast_hashes_are_warned_of(any_server: Backend, caplog: pytest.LogCaptureFixture) -> None:
    """Who chooses xxh3_128 is told what it does not hold."""
    with caplog.at_level(logging.WARNING, "distprefix"):
        any_server.open("w1")
        assert "xxh3_128" not in caplog.text
        any_server.open("w1", namespace=any_server.namespace + "-fast", hash_algorithm="xxh3_128")
    assert "no cryptographic hash" in caplog.text
