"""PrefixCacheConfig: from keyword arguments, the environment (DISTPREFIX_*) or TOML, checked at once."""

from __future__ import annotations

import os
import re
import socket
import tomllib
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, cast, get_type_hints

from distprefix.errors import ConfigError, NamespaceError
from distprefix.hashing import HASH_ALGORITHMS
from distprefix.identity import Identity, parts_of_text
from distprefix.redis.address import embedded_name, parse_address, without_password
from distprefix.redis.scripts import policy_names
from distprefix.secret_files import check_private, read_private, read_secret
from distprefix.tiers.codecs import CODECS

__all__ = [
    "SHORTEST_LEASE_S",
    "PrefixCacheConfig",
    "check_name",
    "settings_of_environment",
    "settings_of_toml",
]

SHORTEST_LEASE_S = 3.0
"""Readers look at the ends of leases every second, and a lease is renewed three times before it ends."""
_SHORTEST_SECRET = 16
_ENV_PREFIX = "DISTPREFIX_"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixCacheConfig:
    """Settings of a cache. A wrong value raises ConfigError and names the field, the value and what is allowed."""

    max_cached_sequences: int = 10_000
    """Leaves of the shared tree: prompts that no other one extends. Also how many published prefixes this process can
    still name by their hash (`update_prefix_state`)."""
    min_prefix_length: int = 1
    """Shorter matches (tokens) count as misses, shorter prompts are not published."""
    max_prefix_length: int | None = None
    """Leading tokens of a prompt that are looked up and published; None: all of them. What a limit cuts is counted."""
    enable_prewarm: bool = True
    prewarm_threshold: int = 3
    """Hits that make a node a candidate for pre-warming."""
    hot_threshold: int = 10
    """Hits that make a node hot: L1 evicts it last, and the shared tree after all that was used within
    `cold_timeout_s` before it."""
    cold_timeout_s: float = 300.0
    """How long payloads are idle before they become cold. Also how much longer than others a hot node stays."""
    eviction_batch_size: int = 100
    """Leaves that one eviction call takes at most."""
    l2_max_chunks: int | None = None
    """Chunks that the shared tree may hold; None for any number."""
    l2_max_bytes: int | None = None
    """Bytes that it may take in Redis, by its own estimate; None for any number."""
    high_watermark: float = 0.95
    """Share of a budget above which a publish evicts, ..."""
    low_watermark: float = 0.9
    """... down to this share."""
    policy: str = "lru"
    """Order of eviction, the same for all who share the namespace: a file in lua/policies, as lru or cost."""
    server_max_bytes: int | None = None
    """Memory that the whole server may use, all namespaces and whatever else it holds; None: its maxmemory, if it has
    one. Above `high_watermark` of it the namespaces that are furthest over their shares give up what they have over."""
    share: float = 1.0
    """This namespace's weight among those of its tenant, and its tenant's among all, where the server is full: as the
    process says that makes the namespace."""
    namespace_ttl_s: float = 604_800.0
    """How long this namespace stays on the server when no process uses it, likewise; 0: for ever."""
    maintain_interval_s: float = 0.0
    """How often a background thread looks after the budgets; 0: only publishes do."""
    url: str | None = field(default=None, repr=False)
    """redis://, rediss://, valkey://, valkeys://, unix:// or embedded://NAME; None starts a private server."""
    namespace: str = "default"
    """What makes KV interchangeable has a namespace of its own: one model, KV layout, tokenizer, tenant."""
    worker_id: str = ""
    """Who holds what this process publishes; default: host name and process id. Give one that survives a restart: only
    then does the restart void what was published before."""
    rank: int = 0
    medium: str = "gpu"
    """What this worker's KV lies in: the holder is ``worker_id/rank@medium``."""
    worker_lease_s: float = 0.0
    """How long others count on what this process published after it was last heard of, at least 3 seconds; 0: until a
    newer process has its worker_id. `register_worker` gives a lease later."""
    model: str = ""
    """Which model, and the next settings the rest of what its KV depends on: attaching to a namespace of anything else
    is refused, and chunk hashes differ. Engine plug-ins fill in what their engine tells."""
    weights: str = ""
    """A revision, or a digest of the files."""
    tokenizer: str = ""
    lora: str = ""
    dtype: str = ""
    layout: str = ""
    """Layers, heads, order of the dimensions."""
    engine: str = ""
    """With its version as far as the layout depends on it."""
    ranks: str = ""
    """Parallel coordinates of this rank, as ``tp 0/2``."""
    hashing: str = ""
    """Algorithm and seed of the engine's own block hashes, where these name chunks."""
    fingerprint: str = ""
    """Whatever else the KV depends on."""
    chunk_size: int = 16
    """Tokens in a chunk (vLLM: block)."""
    hash_algorithm: str = "blake2b"
    """How chunks are named, always under a key: blake2b; sha256, a tenth slower; or xxh3_128, three times faster, under
    which prompts can be forged, for namespaces all of whose tenants are trusted."""
    secret: str = field(default="", repr=False)
    """What the keys of chunk hashes are derived from, the same wherever the namespace is used: 16 characters or more.
    Empty: the namespace makes a random one, which those who may use it read from Redis."""
    salt: str = field(default="", repr=False)
    """A tenant's secret, which the keys of chunk hashes are derived from as well: processes with another salt share
    nothing. Engine plug-ins give each salt a namespace."""
    request_salt: str = field(default="", repr=False)
    """A further salt that tenants choose themselves, as LMCache's cache salt."""
    max_run: int = 256
    shards: int = 1
    lookup_timeout_s: float = 0.05
    publish_timeout_s: float = 0.2
    l1_max_bytes: int = 256 * 1024 * 1024
    max_own_chunks: int = 1_000_000
    """Chunks whose block ids this process remembers; beyond, the prompt published longest ago is taken back."""
    l1_ttl_s: float = 30.0
    """How long L1 trusts a reply of Redis, unless the feed revokes it. When the log was not read for two
    `feed_interval_s`, at least a second: a second."""
    feed_interval_s: float = 0.1
    """How often the shard's log is read for what L1 must forget, in the background. 0: never."""
    staleness_sample: float = 0.001
    """Share of the look-ups answered by L1 that are checked against Redis in the background."""
    speculate: bool = False
    """After a hit, bring what most likely follows into L1, in the background."""
    prewarm_on_start: bool = False
    """Fill L1 with the hottest prefixes of the namespace before the cache opens."""
    prewarm_time_s: float = 2.0
    """The longest that this may take."""
    prewarm_max_bytes: int = 64 * 1024 * 1024
    """The most of L1 that it may fill."""
    payload_codec: str = "raw"
    """How warm payloads are stored: raw, or a codec of `distprefix.tiers.codecs`."""
    cold_codec: str = "zstd"
    """How cold ones are."""
    cold_url: str | None = field(default=None, repr=False)
    """Where cold payloads lie, any server that speaks Redis; None: in the same one. All who share the namespace
    give the same."""
    cold_max_bytes: int | None = None
    """Bytes that cold payloads may take; None for any number."""
    demote_interval_s: float = 0.0
    """How often the background makes cold what was idle for `cold_timeout_s`; 0: only `demote()` does."""
    payload_timeout_s: float = 10.0
    """The longest that storing or loading the payloads of one call may take."""
    encryption_keys: str = field(default="", repr=False)
    """Payloads are encrypted with the first of these, and opened with any: ``id:hex,id:hex``. Empty: not encrypted."""
    max_payload_bytes: int = 512 * 1024 * 1024
    """The longest payload of a chunk in this namespace: what claims to be longer is damaged, and no memory is given to
    it. What a chunk of the model takes is a good value."""
    l1_payload_bytes: int = 0
    """Payloads that this process keeps in memory. 0: none."""
    touch_interval_s: float = 1.0
    """How often hits that L1 answered are told to Redis, in the background. 0: only by `flush()`."""
    breaker_failures: int = 3
    """Failures in a row that stop this process from asking Redis for a while."""
    breaker_reset_s: float = 1.0
    """How long, at first; doubles with every failed probe, up to 5 s."""
    strict: bool = False
    """Raise on the request path when Redis fails, instead of counting a miss. For tests."""

    def __post_init__(self) -> None:
        for spec in fields(self):
            self._check_type(spec.name, _TYPES[spec.name])
        for name, low, high in _RANGES:
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"{name} is {value!r}: it must lie between {low:.15g} and {high:.15g}")
        self._check_order()
        if self.hash_algorithm not in HASH_ALGORITHMS:
            allowed = " or ".join(map(repr, HASH_ALGORITHMS))
            raise ConfigError(f"hash_algorithm is {self.hash_algorithm!r}: it must be {allowed}")
        if 0 < len(self.secret) < _SHORTEST_SECRET:
            raise ConfigError(
                f"secret has {len(self.secret)} characters: it must have {_SHORTEST_SECRET} at least; "
                "python3 -c 'import secrets; print(secrets.token_hex(32))' prints a good one"
            )
        if self.policy not in policy_names():
            raise ConfigError(f"policy is {self.policy!r}: it must be {' or '.join(map(repr, policy_names()))}")
        self._check_words()

    def _check_words(self) -> None:
        codecs = [codec.name for codec in CODECS]
        for name in ("payload_codec", "cold_codec"):
            if getattr(self, name) not in codecs:
                raise ConfigError(f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(codecs)}")
        for name in ("namespace", "worker_id", "medium"):
            if getattr(self, name) or name != "worker_id":
                check_name(name, getattr(self, name))
        if self.url is not None and embedded_name(self.url) is None:
            parse_address(self.url, "url")
        if self.cold_url is not None:
            parse_address(self.cold_url, "cold_url")

    def with_worker_id(self) -> PrefixCacheConfig:
        """These settings with a worker id: the one given, else host name and id of the process that asks."""
        if self.worker_id:
            return self
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname())[:48] or "host"
        return replace(self, worker_id=f"{host}-{os.getpid()}")

    @property
    def identity(self) -> Identity:
        """What the KV of this cache depends on, besides tokens."""
        return Identity(
            engine=self.engine,
            model=self.model,
            weights=self.weights,
            dtype=self.dtype,
            layout=self.layout,
            chunk_size=self.chunk_size,
            ranks=self.ranks,
            hashing=self.hashing,
            salt=self.salt,
            request_salt=self.request_salt,
            tokenizer=self.tokenizer,
            lora=self.lora,
            other=self.fingerprint,
        )

    @property
    def member(self) -> str:
        """This rank of the worker: epochs and leases are its own."""
        return f"{self.worker_id}/{self.rank}"

    @property
    def holder(self) -> str:
        """The name that coverage of this process is kept under."""
        return f"{self.member}@{self.medium}"

    @classmethod
    def from_descriptor(
        cls, namespace: str, found: Mapping[str, str], base: Mapping[str, Any], **overrides: Any
    ) -> PrefixCacheConfig:
        """The settings that a namespace was made with, by its descriptor, over those of `base`; `overrides` win."""
        settings: dict[str, Any] = {**base, "namespace": namespace}
        for name, value in parts_of_text(found.get("identity", "")).items():
            if name in _IDENTITY:  # anybody may have written the descriptor: no url, no key is taken from it
                settings["fingerprint" if name == "other" else name] = value
        settings |= {name: found[name] for name in ("hash_algorithm", "policy") if name in found}
        for name in ("chunk_size", "max_run", "shards"):
            if name in found:
                settings[name] = _count_in(namespace, name, found[name])
        return cls.from_mapping({**settings, **overrides})

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> PrefixCacheConfig:
        """Settings by name; an unknown name raises and says which there are."""
        unknown = sorted(set(values) - set(_TYPES))
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}: there are {', '.join(sorted(_TYPES))}")
        return cls(**values)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, **overrides: Any) -> PrefixCacheConfig:
        """DISTPREFIX_URL, DISTPREFIX_CHUNK_SIZE, ...; keyword arguments win. What is None by default is left out.

        A secret may be in a file that DISTPREFIX_URL_FILE, DISTPREFIX_SALT_FILE, ... names. Raises ConfigError.
        """
        return cls.from_mapping({**settings_of_environment(env), **overrides})

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> PrefixCacheConfig:
        """The table [distprefix] of a TOML file, or its top level when it has no such table.

        Raises ConfigError, also for a file with secrets that others may write; one that they may read is a warning.
        """
        return cls.from_mapping({**settings_of_toml(path), **overrides})

    def _check_order(self) -> None:
        if self.max_prefix_length is not None and self.min_prefix_length > self.max_prefix_length:
            raise ConfigError(
                f"min_prefix_length is {self.min_prefix_length}: it must not be above "
                f"max_prefix_length ({self.max_prefix_length})"
            )
        if 0 < self.worker_lease_s < SHORTEST_LEASE_S:
            raise ConfigError(
                f"worker_lease_s is {self.worker_lease_s}: it must be 0, or at least {SHORTEST_LEASE_S:g} seconds"
            )
        if self.low_watermark > self.high_watermark:
            raise ConfigError(
                f"low_watermark is {self.low_watermark}: it must not be above high_watermark ({self.high_watermark})"
            )

    def _check_type(self, name: str, allowed: tuple[type, ...]) -> None:
        value = getattr(self, name)
        if isinstance(value, bool) and bool not in allowed:
            raise ConfigError(f"{name} is {_shown(name, value)}: it must be {_describe(allowed)}")
        if float in allowed and isinstance(value, int):
            object.__setattr__(self, name, float(value))
        elif not isinstance(value, allowed):
            raise ConfigError(f"{name} is {_shown(name, value)}: it must be {_describe(allowed)}")


def settings_of_environment(env: Mapping[str, str] | None = None, only: Container[str] | None = None) -> dict[str, Any]:
    """The settings that DISTPREFIX_* give, and no others. Raises ConfigError for a value of another kind.

    `only`: names of the settings that are wanted; variables for others are not looked at.
    """
    values: dict[str, Any] = {}
    for key, text in (os.environ if env is None else env).items():
        if key.startswith(_ENV_PREFIX):
            name = key.removeprefix(_ENV_PREFIX).lower()
            secret = name.removesuffix("_file")
            if only is not None and name not in only and secret not in only:
                continue
            if name != secret and secret in _SECRETS:
                values.setdefault(secret, read_secret(text, key))
            else:
                values[name] = _parse(name, text) if name in _TYPES else text
    return values


def settings_of_toml(path: str | Path) -> dict[str, Any]:
    """The settings that a TOML file gives, and no others. Raises ConfigError for a file that cannot be read."""
    data, status = read_private(path)
    table = _parse_toml(data, path)
    chosen: Any = table.get("distprefix", table)
    if not isinstance(chosen, dict):
        raise ConfigError(f"distprefix in {path} is no table: write [distprefix] above the settings")
    values = cast("dict[str, Any]", chosen)
    if any(_is_secret(name, value) for name, value in values.items()):
        check_private(path, status)
    return values


def check_name(name: str, value: str) -> None:
    """Raise ConfigError when `value` cannot be part of a key."""
    if not _NAME.fullmatch(value):
        raise ConfigError(
            f"{name} is {_shown(name, value)}: 1 to 64 letters, digits, dots, hyphens, underscores are allowed"
        )


def _describe(allowed: tuple[type, ...]) -> str:
    words = {int: "a whole number", float: "a number", str: "text", bool: "True or False", type(None): "None"}
    return " or ".join(words[kind] for kind in allowed)


def _count_in(namespace: str, name: str, text: str) -> int:
    """A number of a descriptor, which anybody may have written."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        raise NamespaceError(f"namespace {namespace!r} is damaged: its {name} is {text[:100]!r}, not a number")
    return int(text)


def _shown(name: str, value: object) -> str:
    """A value as a message may have it: only the type of a secret; what looks like a URL, without a password."""
    if name in _SECRETS:
        return f"of type {type(value).__name__}"
    return repr(without_password(value) if isinstance(value, str) and "://" in value else value)


def _is_secret(name: str, value: object) -> bool:
    """Whether a setting is worth hiding; a URL is where it has a password."""
    is_url = name.endswith("url") and isinstance(value, str)
    return name in _SECRETS and bool(value) and not (is_url and without_password(str(value)) == str(value).strip())


def _parse_toml(data: bytes, path: str | Path) -> dict[str, Any]:
    """Raises ConfigError that says where the file is wrong. Its text and its causes do not quote the file."""
    place = ""
    try:
        return tomllib.loads(data.decode())
    except UnicodeDecodeError as error:
        place = f"byte {error.start} is no UTF-8"
    except RecursionError:
        place = "its values are nested too deeply"
    except ValueError as error:
        found = re.search(r"\(at (line \d+, column \d+|end of document)\)", str(error))
        place = f"look at {found[1]}" if found else "a value makes no sense"
    raise ConfigError(f"cannot read {path}: it is no TOML, {place}; text stands in quotes")


def _parse(name: str, text: str) -> Any:
    allowed = _TYPES[name]
    try:
        if bool in allowed:
            if text.lower() not in _TRUE + _FALSE:
                raise ValueError
            return text.lower() in _TRUE
        return int(text) if int in allowed else float(text) if float in allowed else text
    except ValueError:
        values = tuple(kind for kind in allowed if kind is not type(None))
    hint = "; for None, leave it out" if len(values) < len(allowed) else ""  # raised here without what quotes the text
    raise ConfigError(f"{_ENV_PREFIX}{name.upper()} is {_shown(name, text)}: it must be {_describe(values)}{hint}")


_TYPES: dict[str, tuple[type, ...]] = {
    name: getattr(hint, "__args__", None) or (hint,) for name, hint in get_type_hints(PrefixCacheConfig).items()
}
_IDENTITY = frozenset(spec.name for spec in fields(Identity) if spec.repr and spec.name != "chunk_size")
"""Parts of an identity that a descriptor may give."""
_SECRETS = frozenset(spec.name for spec in fields(PrefixCacheConfig) if not spec.repr)
"""What no message and no text of the settings may show."""
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("max_cached_sequences", 1, 2**31),
    ("min_prefix_length", 1, 2**31),
    ("max_prefix_length", 1, 2**31),
    ("prewarm_threshold", 1, 2**31),
    ("hot_threshold", 1, 2**31),
    ("cold_timeout_s", 0, 1e9),
    ("eviction_batch_size", 1, 10_000),
    ("l2_max_chunks", 1, 2**53),
    ("l2_max_bytes", 1, 2**53),
    ("high_watermark", 0.01, 1),
    ("low_watermark", 0.01, 1),
    ("maintain_interval_s", 0, 3600),
    ("server_max_bytes", 1, 2**53),
    ("share", 0.001, 1e6),
    ("namespace_ttl_s", 0, 1e9),
    ("feed_interval_s", 0, 3600),
    ("staleness_sample", 0, 1),
    ("prewarm_time_s", 0, 3600),
    ("prewarm_max_bytes", 0, 2**50),
    ("rank", 0, 2**16),
    ("worker_lease_s", 0, 86_400),
    ("chunk_size", 1, 65_536),
    ("max_run", 1, 256),
    ("shards", 1, 1),
    ("lookup_timeout_s", 0.001, 60),
    ("publish_timeout_s", 0.001, 60),
    ("l1_max_bytes", 0, 2**50),
    ("max_own_chunks", 1, 2**31),
    ("l1_ttl_s", 0, 1e9),
    ("touch_interval_s", 0, 3600),
    ("payload_timeout_s", 0.001, 3600),
    ("cold_max_bytes", 1, 2**53),
    ("max_payload_bytes", 1, 2**29),
    ("demote_interval_s", 0, 3600),
    ("l1_payload_bytes", 0, 2**50),
    ("breaker_failures", 1, 10_000),
    ("breaker_reset_s", 0.001, 3600),
)
