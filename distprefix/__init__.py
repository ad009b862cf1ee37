"""One prefix tree for a whole LLM inference cluster: L1 in the process, L2 in Redis."""

from __future__ import annotations

from distprefix.chunking import Chain, pack_extra
from distprefix.config import PrefixCacheConfig
from distprefix.errors import (
    ConfigError,
    DistPrefixError,
    EmbeddedServerError,
    ForkedProcessError,
    InvalidInputError,
    NamespaceError,
    SchemaError,
    ScriptError,
    StaleEpochError,
    UnavailableError,
)
from distprefix.health import Health
from distprefix.model import CacheHitResult, CacheTier, Holder, PrefixEntry
from distprefix.optimizer import PrefixCacheOptimizer
from distprefix.radix import PrefixTree, RadixTreeNode

__all__ = [
    "CacheHitResult",
    "CacheTier",
    "Chain",
    "ConfigError",
    "DistPrefixError",
    "EmbeddedServerError",
    "ForkedProcessError",
    "Health",
    "Holder",
    "InvalidInputError",
    "NamespaceError",
    "PrefixCacheConfig",
    "PrefixCacheOptimizer",
    "PrefixEntry",
    "PrefixTree",
    "RadixTreeNode",
    "SchemaError",
    "ScriptError",
    "StaleEpochError",
    "UnavailableError",
    "__version__",
    "pack_extra",
]

__version__ = "0.1.0"
