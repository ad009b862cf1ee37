"""SGLang's HiCache in Redis: a storage backend for ``--hicache-storage-backend dynamic``; docs/sglang.md tells how."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportUnknownParameterType=false

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any, TypeVar

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage, PoolTransferResult

from distprefix.config import PrefixCacheConfig
from distprefix.engines.identity import Identity
from distprefix.engines.sglang_pages import Page, bytes_of, launched_with
from distprefix.engines.sglang_pools import KV, HostPools, Stats
from distprefix.engines.store import config_for
from distprefix.errors import ConfigError

__all__ = ["DistPrefixStorage"]

T = TypeVar("T")
_log = logging.getLogger("distprefix")
_PREFIX_KEYS = "hicache_storage_pass_prefix_keys"
_SGLANG = (
    *("backend_name", "module_path", "class_name", "interface_v1", "tp_lcm_size", "file_storage_path", _PREFIX_KEYS),
    *("prefetch_threshold", "prefetch_timeout_base", "prefetch_timeout_per_ki_token"),
)
"""Keys of the extra config that are SGLang's own."""
_PAYLOAD_TIMEOUT_S = 5.0
"""SGLang's threads wait for transfers, of up to 128 pages; a request waits no longer than SGLang's own limits say."""


class DistPrefixStorage(HiCacheStorage):
    """Pages of SGLang's host memory in Redis, for every server whose KV is the same. Thread-safe.

    Raises ConfigError when it is made, for settings that are wrong; later it never raises: what cannot be had is a
    miss, and counted. Opens when the host memory is registered, which tells what the pages are.
    """

    def __init__(self, storage_config: Any, kwargs: dict[str, Any] | None = None) -> None:  # noqa: ARG002 - SGLang's
        extra = dict(storage_config.extra_config or {})
        settings = {key: value for key, value in extra.items() if key not in _SGLANG}
        checked = config_for(Identity(chunk_size=0), settings)
        if checked.url is None:
            raise ConfigError("url is missing: name the Redis that the servers share in the extra config")
        if checked.payload_timeout_s == PrefixCacheConfig().payload_timeout_s:
            settings.setdefault("payload_timeout_s", _PAYLOAD_TIMEOUT_S)
        self._host = HostPools(storage_config, settings)
        self._check_launch(extra)

    def register_mem_pool_host(self, mem_pool_host: Any) -> None:
        """The host memory of the KV itself: what it is tells the namespace, which is opened now."""
        super().register_mem_pool_host(mem_pool_host)
        self.register_mem_host_pool_v2(mem_pool_host, KV)

    def register_mem_host_pool_v2(self, host_pool: Any, host_pool_name: Any) -> None:
        """Another pool, as of an indexer or a state; its pages have a namespace of their own."""
        super().register_mem_host_pool_v2(host_pool, host_pool_name)
        self._quietly(lambda: self._host.register(str(host_pool_name), host_pool), None)

    # Look up

    def exists(self, key: str) -> bool:
        """Whether a page can be loaded, with all before it."""
        return self.batch_exists([key]) == 1

    def batch_exists(self, keys: list[str], extra_info: Any | None = None) -> int:
        """How many leading pages can be loaded. One Redis call."""
        return self._quietly(lambda: self._host.find(KV, keys, extra_info), 0)

    def batch_exists_v2(
        self, keys: list[str], pool_transfers: list[Any] | None = None, extra_info: Any | None = None
    ) -> PoolTransferResult:
        """As `batch_exists`, as far as every pool has what it must have. One Redis call a pool, see `find_each`."""

        def work() -> PoolTransferResult:
            found = self._host.find(KV, keys, extra_info)
            hits, restorable = ({KV: found} if found else {}), list(range(1, found + 1))
            for transfer in pool_transfers or []:
                if not restorable:
                    break
                able = self._host.able(transfer, keys[:found], extra_info)
                if able:
                    hits[transfer.name] = max(able)
                if transfer.hit_policy != "block_groups":  # which never limits the KV's hit
                    restorable = [pages for pages in restorable if pages in able]
            return PoolTransferResult(restorable[-1] if restorable else 0, hits, restorable)

        return self._quietly(work, PoolTransferResult.empty())

    # Load and store

    def batch_get_v1(self, keys: list[str], host_indices: Any, extra_info: Any | None = None) -> list[bool]:
        """Load pages into the host memory; from the first that is not good, none."""
        return self._quietly(lambda: self._host.load(KV, keys, host_indices, extra_info), [False] * len(keys))

    def batch_set_v1(self, keys: list[str], host_indices: Any, extra_info: Any | None = None) -> list[bool]:
        """Store pages from the host memory; behind one that is not there, none is stored."""
        return self._quietly(lambda: self._host.store(KV, keys, host_indices, extra_info), [False] * len(keys))

    def batch_get_v2(self, transfers: list[Any], extra_info: Any | None = None) -> dict[str, list[bool]]:
        """As `batch_get_v1`, for several pools."""
        return self._each_transfer(transfers, extra_info, self._host.load)

    def batch_set_v2(self, transfers: list[Any], extra_info: Any | None = None) -> dict[str, list[bool]]:
        """As `batch_set_v1`, for several pools."""
        return self._each_transfer(transfers, extra_info, self._host.store)

    def get(self, key: str, target_location: Any | None = None, target_sizes: Any | None = None) -> Any | None:
        """Load a page into a tensor. The tensor, or None."""
        return self.batch_get([key], [target_location], target_sizes)[0]

    def batch_get(
        self,
        keys: list[str],
        target_locations: Any | None = None,
        target_sizes: Any | None = None,  # noqa: ARG002 - SGLang's signature
    ) -> list[Any | None]:
        """Load pages, one after the other in a prompt, into tensors. Each tensor, or None."""
        tensors: list[Any] = list(target_locations or [])

        def work() -> list[Any | None]:
            pages = [Page([bytes_of(tensor)]) for tensor in tensors]
            good = self._host.transfer_in(KV, keys, pages, None)
            return [tensor if is_good else None for tensor, is_good in zip(tensors, good, strict=True)]

        if len(tensors) != len(keys) or any(tensor is None or not tensor.is_contiguous() for tensor in tensors):
            return [None] * len(keys)
        return self._quietly(work, [None] * len(keys))

    def set(
        self, key: str, value: Any | None = None, target_location: Any | None = None, target_sizes: Any | None = None
    ) -> bool:
        """Store a tensor as a page. Whether it is there then."""
        return self.batch_set([key], [value], target_location, target_sizes)

    def batch_set(
        self,
        keys: list[str],
        values: Any | None = None,
        target_locations: Any | None = None,  # noqa: ARG002 - SGLang's signature
        target_sizes: Any | None = None,  # noqa: ARG002
    ) -> bool:
        """Store tensors as pages, one after the other in a prompt. Whether all are there then."""

        def work() -> bool:
            tensors = [value.contiguous() for value in values or []]
            return len(tensors) == len(keys) and all(
                self._host.transfer_out(KV, keys, [Page([bytes_of(tensor)]) for tensor in tensors], None)
            )

        return self._quietly(work, otherwise=False)

    # Look after it

    def clear(self) -> bool:
        """Empty the namespaces of all pools, for everybody. Whether that was done."""
        return self._quietly(self._host.clear, otherwise=False)

    def get_stats(self) -> Stats:
        """What happened; SGLang asks in every step, so no Redis call. Counts of several pools are added up."""
        return self._host.stats()

    def close(self) -> None:
        """Finish what was begun, and close. May be called again."""
        self._quietly(self._host.close, None)

    def _check_launch(self, extra: dict[str, Any]) -> None:
        """Say at the start what of SGLang's options makes this slow, or of little use."""
        if not extra.get("interface_v1"):
            _log.warning(
                '"interface_v1" is not 1 in the extra config: SGLang copies every page once more, and tells less'
            )
        # SGLang takes this one out of what it hands us, so it is read where SGLang has it
        launched = launched_with("memory", "hicache_storage_backend_extra_config")
        if isinstance(launched, str) and launched.startswith("{") and not json.loads(launched).get(_PREFIX_KEYS):
            self._host.say_no_prefix_keys()

    def _each_transfer(
        self, transfers: list[Any], extra_info: Any, work: Callable[..., list[bool]]
    ) -> dict[str, list[bool]]:
        results: dict[str, list[bool]] = {}
        for transfer in transfers:
            keys = list(transfer.keys or [])
            results[transfer.name] = self._quietly(
                lambda transfer=transfer, keys=keys: work(
                    str(transfer.name), keys, transfer.host_indices, extra_info, transfer.hit_policy
                ),
                [False] * len(keys),
            )
        return results

    def _quietly(self, work: Callable[[], T], otherwise: T) -> T:
        """What came of it; SGLang's threads must go on, whatever we met."""
        try:
            return work()
        except Exception:  # noqa: BLE001 - see above
            self._host.count("errors", 1)
            _log.exception("an operation of SGLang's storage failed")
            return otherwise
