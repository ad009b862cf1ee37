"""Settings: defaults, where they come from, and how wrong ones are told."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from distprefix import DistPrefixError, PrefixCacheConfig
from distprefix.errors import ConfigError, NamespaceError

WRONG: list[tuple[str, Any, str]] = [
    ("max_cached_sequences", 0, "between 1 and"),
    ("min_prefix_length", -1, "between 1 and"),
    ("max_prefix_length", 2.5, "a whole number"),
    ("enable_prewarm", 1, "True or False"),
    ("prewarm_threshold", 0, "between 1 and"),
    ("hot_threshold", True, "a whole number"),
    ("cold_timeout_s", -1.0, "between 0 and"),
    ("cold_timeout_s", float("nan"), "between 0 and"),
    ("eviction_batch_size", 10_001, "between 1 and 10000"),
    ("url", 7, "text or None"),
    ("url", "http://there", "redis://, rediss://, valkey://, valkeys://, unix:// (url also with embedded://NAME)"),
    ("namespace", "", "1 to 64 letters"),
    ("namespace", "a{b}", "letters, digits, dots, hyphens, underscores"),
    ("namespace", None, "text"),
    ("worker_id", "a/b", "1 to 64 letters"),
    ("worker_lease_s", 1.0, "0, or at least 3 seconds"),
    ("rank", -1, "between 0 and 65536"),
    ("medium", "g@pu", "1 to 64 letters"),
    ("fingerprint", 5, "text"),
    ("chunk_size", 0, "between 1 and 65536"),
    ("chunk_size", "16", "a whole number"),
    ("hash_algorithm", "md5", "'blake2b' or 'sha256' or 'xxh3_128'"),
    ("salt", b"bytes", "text"),
    ("request_salt", 1, "text"),
    ("model", 5, "text"),
    ("weights", 5, "text"),
    ("tokenizer", 5, "text"),
    ("lora", None, "text"),
    ("dtype", 5, "text"),
    ("layout", 5, "text"),
    ("engine", 5, "text"),
    ("ranks", 5, "text"),
    ("hashing", 5, "text"),
    ("secret", 5, "text"),
    ("max_payload_bytes", 0, "between 1 and"),
    ("server_max_bytes", 0, "between 1 and"),
    ("share", 0.0, "between 0.001 and"),
    ("namespace_ttl_s", -1.0, "between 0 and"),
    ("max_run", 257, "between 1 and 256"),
    ("shards", 2, "between 1 and 1"),
    ("lookup_timeout_s", 0.0, "between 0.001 and 60"),
    ("publish_timeout_s", "fast", "a number"),
    ("l1_max_bytes", -1, "between 0 and"),
    ("l2_max_chunks", 0, "between 1 and"),
    ("l2_max_bytes", 0, "between 1 and"),
    ("high_watermark", 1.5, "between 0.01 and 1"),
    ("low_watermark", 0.0, "between 0.01 and 1"),
    ("policy", "random", "'cost' or 'lru'"),
    ("maintain_interval_s", -1.0, "between 0 and"),
    ("feed_interval_s", -1.0, "between 0 and"),
    ("staleness_sample", 2.0, "between 0 and 1"),
    ("speculate", 1, "True or False"),
    ("prewarm_on_start", 1, "True or False"),
    ("prewarm_time_s", -1.0, "between 0 and"),
    ("prewarm_max_bytes", -1, "between 0 and"),
    ("max_own_chunks", 0, "between 1 and"),
    ("l1_ttl_s", -0.1, "between 0 and"),
    ("touch_interval_s", 3601.0, "between 0 and 3600"),
    ("breaker_failures", 0, "between 1 and 10000"),
    ("breaker_reset_s", 0.0, "between 0.001 and 3600"),
    ("strict", "yes", "True or False"),
    ("payload_codec", "gzip", "one of raw, zstd"),
    ("cold_codec", "", "one of raw, zstd"),
    ("cold_url", "embedded://x", "url only"),
    ("cold_max_bytes", 0, "between 1"),
    ("demote_interval_s", -1.0, "between 0"),
    ("payload_timeout_s", 0.0, "between 0.001"),
    ("encryption_keys", 7, "text"),
    ("l1_payload_bytes", -1, "between 0"),
]


@pytest.mark.parametrize(("name", "value", "allowed"), WRONG)
def test_a_wrong_value_is_told_with_what_is_allowed(name: str, value: Any, allowed: str) -> None:
    """A wrong value raises at once and names the field, the value and what is allowed; of a secret only its type."""
    with pytest.raises(ConfigError) as caught:
        PrefixCacheConfig(**{name: value})
    is_hidden = not PrefixCacheConfig.__dataclass_fields__[name].repr and not isinstance(value, str)
    shown = f"of type {type(value).__name__}" if is_hidden else repr(value)
    assert str(caught.value).startswith(f"{name} is {shown}: ")
    assert allowed in str(caught.value)
    assert isinstance(caught.value, DistPrefixError)


def test_every_setting_has_a_wrong_value_here() -> None:
    """The list of wrong values leaves no setting out."""
    assert {name for name, *_ in WRONG} == {field.name for field in dataclasses.fields(PrefixCacheConfig)}


def test_bounds_must_be_in_order() -> None:
    """A least prefix longer than the longest is refused."""
    with pytest.raises(ConfigError, match=r"min_prefix_length is 10: it must not be above max_prefix_length \(9\)"):
        PrefixCacheConfig(min_prefix_length=10, max_prefix_length=9)
    assert PrefixCacheConfig(min_prefix_length=10, max_prefix_length=None).min_prefix_length == 10


def test_a_limit_of_prompts_is_set_or_left_out(tmp_path: Path) -> None:
    """A limit comes from a variable or a TOML file; where the setting is left out there is none."""
    file = tmp_path / "a.toml"
    for text, limit in (("max_prefix_length = 100", 100), ("", None)):
        file.write_text(f"[distprefix]\n{text}\n")
        assert PrefixCacheConfig.from_toml(file).max_prefix_length == limit
    assert PrefixCacheConfig.from_env({"DISTPREFIX_MAX_PREFIX_LENGTH": "100"}).max_prefix_length == 100
    assert PrefixCacheConfig.from_env({}).max_prefix_length is None


def test_defaults_are_the_original_ones() -> None:
    """The original's fields keep their defaults, the new ones have those that the requirements give."""
    config = PrefixCacheConfig()
    assert (config.max_cached_sequences, config.min_prefix_length, config.max_prefix_length) == (10_000, 1, None)
    assert (config.enable_prewarm, config.prewarm_threshold, config.hot_threshold) == (True, 3, 10)
    assert (config.cold_timeout_s, config.eviction_batch_size) == (300.0, 100)
    assert (config.chunk_size, config.hash_algorithm, config.max_run, config.shards) == (16, "blake2b", 256, 1)
    assert (config.lookup_timeout_s, config.publish_timeout_s, config.strict) == (0.05, 0.2, False)
    assert config.worker_id == ""
    assert config.with_worker_id().worker_id.endswith(f"-{os.getpid()}")
    assert PrefixCacheConfig(worker_id="pod-3", rank=2, medium="cpu").holder == "pod-3/2@cpu"


def test_whole_numbers_serve_as_numbers() -> None:
    """Times may be whole numbers; they become floats."""
    value = PrefixCacheConfig(l1_ttl_s=2).l1_ttl_s
    assert (value, type(value)) == (2.0, float)


def test_from_the_environment() -> None:
    """DISTPREFIX_* are read by type, keyword arguments win, other variables are nobody's business."""
    env = {
        "DISTPREFIX_URL": "redis://there:1",
        "DISTPREFIX_CHUNK_SIZE": "32",
        "DISTPREFIX_L1_TTL_S": "0.5",
        "DISTPREFIX_STRICT": "Yes",
        "DISTPREFIX_ENABLE_PREWARM": "off",
        "DISTPREFIX_NAMESPACE": "a",
        "PATH": "/bin",
    }
    config = PrefixCacheConfig.from_env(env, namespace="b")
    assert (config.url, config.chunk_size, config.l1_ttl_s) == ("redis://there:1", 32, 0.5)
    assert (config.strict, config.enable_prewarm, config.namespace) == (True, False, "b")


def test_the_environment_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mapping the process's own environment is read."""
    monkeypatch.setenv("DISTPREFIX_MAX_RUN", "17")
    assert PrefixCacheConfig.from_env().max_run == 17


@pytest.mark.parametrize(
    ("name", "text", "allowed"),
    [
        ("CHUNK_SIZE", "many", "a whole number"),
        ("STRICT", "perhaps", "True or False"),
        ("L1_TTL_S", "", "a number"),
        ("MAX_PREFIX_LENGTH", "None", "a whole number; for None, leave it out"),
    ],
)
def test_wrong_text_in_the_environment(name: str, text: str, allowed: str) -> None:
    """Text that cannot be read names the variable, the text and what is allowed."""
    with pytest.raises(ConfigError, match=f"DISTPREFIX_{name} is '{text}': it must be {allowed}"):
        PrefixCacheConfig.from_env({f"DISTPREFIX_{name}": text})


def test_unknown_settings_are_told(tmp_path: Path) -> None:
    """An unknown name raises and lists those there are, from every source."""
    file = tmp_path / "a.toml"
    file.write_text("chunksize = 3")
    for read in (
        lambda: PrefixCacheConfig.from_env({"DISTPREFIX_CHUNKSIZE": "3"}),
        lambda: PrefixCacheConfig.from_mapping({"chunksize": 3}),
        lambda: PrefixCacheConfig.from_toml(file),
    ):
        with pytest.raises(ConfigError, match=r"unknown setting 'chunksize': there are .*chunk_size, .*worker_id"):
            read()


def test_from_toml(tmp_path: Path) -> None:
    """A table [distprefix], or the top level, is read; keyword arguments win."""
    whole, table = tmp_path / "whole.toml", tmp_path / "table.toml"
    whole.write_text('chunk_size = 8\nnamespace = "a"\nstrict = true')
    table.write_text('title = "mine"\n[distprefix]\nchunk_size = 8\nl1_ttl_s = 3')
    assert PrefixCacheConfig.from_toml(whole, namespace="b").namespace == "b"
    assert PrefixCacheConfig.from_toml(str(table)).l1_ttl_s == 3.0
    whole.write_text("chunk_size = ")
    for path in (whole, tmp_path / "none.toml"):
        with pytest.raises(ConfigError, match=f"cannot read .*{path.name}"):
            PrefixCacheConfig.from_toml(path)


def test_settings_do_not_change() -> None:
    """A configuration is frozen."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        PrefixCacheConfig().chunk_size = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_a_descriptor_gives_no_address_and_no_key() -> None:
    """What anybody may write into Redis sets parts of an identity, no address and no key."""
    parts = {"model": "m", "other": "o", "url": "redis://evil", "cold_url": "redis://evil", "salt": "x", "secret": "y"}
    found = {"identity": json.dumps(parts), "chunk_size": "8"}
    config = PrefixCacheConfig.from_descriptor("n", found, {}, url="redis://mine")
    assert (config.model, config.fingerprint, config.chunk_size) == ("m", "o", 8)
    assert (config.url, config.cold_url, config.salt, config.secret) == ("redis://mine", None, "", "")
    for text in ("\u00b2", "", "-1", "9" * 5000):
        with pytest.raises(NamespaceError, match="its chunk_size is"):
            PrefixCacheConfig.from_descriptor("n", {"chunk_size": text}, {})
