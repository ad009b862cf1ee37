"""Attaching: what differs is refused by name, what was flushed heals, namespaces do not mix."""

from __future__ import annotations

from typing import Any

import pytest

from distprefix import PrefixCacheConfig, PrefixCacheOptimizer
from distprefix.errors import (
    ConfigError,
    DistPrefixError,
    NamespaceError,
    NotAttachedError,
    SchemaError,
    UnavailableError,
)
from tests.contract.test_find import prompt
from tests.servers import Backend, Server


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("chunk_size", 8),
        ("hash_algorithm", "sha256"),
        ("fingerprint", "other-model/fp8"),
        ("max_run", 16),
    ],
)
def test_other_settings_are_refused_by_name(any_server: Backend, setting: str, value: Any) -> None:
    """Attaching with a setting other than the namespace was made with names the setting and both values."""
    made = any_server.open("w1")
    with pytest.raises(NamespaceError) as caught:
        any_server.open("w2", **{setting: value})
    for word in (setting, repr(str(value)), repr(str(getattr(made.config, setting))), made.config.namespace):
        assert word in str(caught.value)


def test_another_salt_is_refused_and_never_stored(any_server: Backend) -> None:
    """A namespace belongs to one salt; Redis keeps only a check of it."""
    any_server.open("w1", salt="open sesame").cache_prefix(prompt(3))
    with pytest.raises(NamespaceError, match="another secret or salt"):
        any_server.open("w2", salt="barley")
    assert b"sesame" not in repr(any_server.admin.hgetall(any_server.keys.descriptor)).encode()
    assert any_server.open("w3", salt="open sesame").find_longest_cache_hit(prompt(3)).hit


def test_another_schema_is_refused(any_server: Backend) -> None:
    """A descriptor or a shard of another schema is refused at attach, and by every script later."""
    cache = any_server.open("w1")
    any_server.admin.hset(any_server.keys.meta, "schema", "99")
    with pytest.raises(NamespaceError, match="99"):
        any_server.open("w2")
    with pytest.raises(SchemaError, match="99"):
        cache.cache_prefix(prompt(3))
    with pytest.raises(SchemaError, match="99"):
        cache.find_longest_cache_hit(prompt(3))
    any_server.admin.hset(any_server.keys.descriptor, "schema", "77")
    with pytest.raises(NamespaceError, match="77"):
        any_server.open("w3")


@pytest.mark.parametrize("key", ["descriptor", "meta", "epochs"])
def test_a_foreign_key_stops_attaching(any_server: Backend, key: str) -> None:
    """A string where the namespace's own keys belong gives a clear error at attach, and is left alone."""
    name = getattr(any_server.keys, key)
    any_server.admin.set(name, "foreign")
    with pytest.raises(DistPrefixError, match="WRONGTYPE"):
        any_server.open()
    assert any_server.admin.get(name) == b"foreign"


def test_namespaces_do_not_mix(any_server: Backend) -> None:
    """What one namespace has is not in another on the same server."""
    any_server.open("w1").cache_prefix(prompt(3))
    other = any_server.open("w1", namespace=any_server.namespace + "-other")
    assert not other.find_longest_cache_hit(prompt(3)).hit
    other.clear()
    assert any_server.open("w2").find_longest_cache_hit(prompt(3)).hit


def test_a_flush_heals(any_server: Backend) -> None:
    """After everything is gone from Redis look-ups miss, and the next publish attaches again under a higher epoch."""
    cache = any_server.open("w1", l1_ttl_s=0, strict=False)
    cache.cache_prefix(prompt(6), range(6))
    epoch = cache.get_metrics()["epoch"]
    names: Any = any_server.admin.scan_iter(match=f"dp:*{any_server.namespace}*")
    any_server.admin.delete(*names)
    assert not any_server.open("w9", namespace=any_server.namespace + "-x").find_longest_cache_hit(prompt(6)).hit
    assert not cache.find_longest_cache_hit(prompt(6)).hit
    cache.cache_prefix(prompt(6), range(6))
    assert cache.get_metrics()["epoch"] > epoch
    assert any_server.open("w2").find_longest_cache_hit(prompt(6)).matched_chunks == 6
    assert cache.find_longest_cache_hit(prompt(6)).block_ids == tuple(range(6))
    assert cache.get_metrics()["publishes_dropped"] == 0
    assert cache.check_integrity().ok


def test_a_flush_is_noticed_in_the_background(any_server: Backend) -> None:
    """The periodic refresh attaches again by itself, so that a worker that only reads comes back too."""
    cache = any_server.open("w1")
    names: Any = any_server.admin.scan_iter(match=f"dp:*{any_server.namespace}*")
    any_server.admin.delete(*names)
    with pytest.raises(NotAttachedError):
        cache.find_longest_cache_hit(prompt(6))
    cache.flush()
    assert not cache.find_longest_cache_hit(prompt(6)).hit


def test_epochs_grow_with_every_opening(any_server: Backend) -> None:
    """Each opening of one worker id has a higher epoch than the one before, and none is below the server's time."""
    began: Any = any_server.admin.time()
    epochs = [any_server.open("w1").get_metrics()["epoch"] for _ in range(4)]
    assert epochs == sorted(set(epochs))
    assert epochs[0] >= began[0] * 1000


def test_a_url_that_is_not_redis(own_server: Server) -> None:
    """A port where something else listens, or nothing, and a scheme that is none give errors that name the problem."""
    own_server.kill()
    with pytest.raises(UnavailableError, match="connect"):
        PrefixCacheOptimizer(PrefixCacheConfig(url=own_server.url))
    with pytest.raises(ConfigError, match="redis://"):
        PrefixCacheConfig(url="http://127.0.0.1:80")
