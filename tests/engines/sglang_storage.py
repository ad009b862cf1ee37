"""SGLang's own factory, storage interface and host memory on a CPU, doing as they are told on stdin.

Run by the Python of the environment that install_sglang.sh makes, with this repository on PYTHONPATH. Every line on
stdin is an order and gets one line on stdout, both JSON: ``{"do": NAME, ...}``, see the functions of `ORDERS`; what
fails is answered with ``{"error": ...}``. What is opened here under two names is as apart as two servers are.
"""

# pyright: basic, reportMissingImports=false
# ruff: noqa: PLC0415, F401 - imports take long or need what prepare() does; whoever ordered is to know errors
from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
import time
import types
from pathlib import Path
from typing import Any

from tests.engines.serve import parameters, said, serve

PAGE = 4
LAYERS = 2


def prepare() -> None:
    """Let SGLang's modules be imported where its GPU libraries and torchvision are not."""
    root = Path(str(importlib.metadata.distribution("sglang").locate_file("sglang")))
    for name in ("sglang", "sglang.srt", "sglang.srt.mem_cache"):
        module: Any = types.ModuleType(name)
        module.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = module
    if importlib.util.find_spec("torchvision") is None:
        from transformers.utils import import_utils

        import_utils.is_torchvision_available()  # it remembers that there is none
        import transformers.image_utils

        modes = types.SimpleNamespace(BICUBIC="bicubic")
        for name in ("torchvision", "torchvision.transforms", "torchvision.transforms.functional"):
            module = types.ModuleType(name)
            module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
            module.__path__ = []
            module.InterpolationMode, module.__version__ = modes, "0.0.0"
            sys.modules[name] = module
        modules: dict[str, Any] = sys.modules
        modules["torchvision"].transforms = modules["torchvision.transforms"]
        modules["torchvision.transforms"].functional = modules["torchvision.transforms.functional"]


storages: dict[str, Any] = {}
pools: dict[tuple[str, str], Any] = {}


def _sizes(pages: int) -> dict[str, Any]:
    sizes = {"device_capacity_tokens": PAGE, "start_layer": 0, "end_layer": LAYERS, "host_token_capacity": pages * PAGE}
    return {**sizes, "pin_memory": False}


def _pool(layout: str, pages: int, heads: int) -> Any:
    import torch
    from sglang.srt.mem_cache.device_pool_info import KVBufferLayout, KVBuffers, MHABufferInfo
    from sglang.srt.mem_cache.pool_host.mha import MHATokenToKVPoolHost

    tensors = [torch.zeros(PAGE, heads, 8, dtype=torch.bfloat16) for _ in range(2 * LAYERS)]
    pointers = torch.zeros(LAYERS, dtype=torch.uint64)
    keys, values = tuple(tensors[:LAYERS]), tuple(tensors[LAYERS:])
    addresses = {"k_data_ptrs": pointers, "v_data_ptrs": pointers}
    buffers = KVBuffers(k=keys, v=values, layout=KVBufferLayout.NHD, **addresses)
    info = MHABufferInfo(
        buffers=buffers,
        page_size=PAGE,
        head_num=heads,
        head_dim=8,
        v_head_dim=8,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return MHATokenToKVPoolHost(info, 1.0, 0, PAGE, layout, **_sizes(pages))


def _latent_pool(layout: str, pages: int) -> Any:
    import torch
    from sglang.srt.mem_cache.device_pool_info import MLABufferInfo
    from sglang.srt.mem_cache.pool_host.mla import MLATokenToKVPoolHost

    info = MLABufferInfo(
        buffers=tuple(torch.zeros(PAGE, 1, 24, dtype=torch.bfloat16) for _ in range(LAYERS)),
        data_ptrs=torch.zeros(LAYERS, dtype=torch.uint64),
        layer_indices=tuple(range(LAYERS)),
        device_layer_num=LAYERS,
        page_size=PAGE,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        kv_cache_dim=24,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    return MLATokenToKVPoolHost(info, 1.0, 0, PAGE, layout, target_layer_num=LAYERS, **_sizes(pages))


def open_(
    name: str,
    extra: dict[str, Any],
    layout: str = "page_first",
    pages: int = 16,
    heads: int = 2,
    model: str = "tiny",
    sidecars: tuple[str, ...] = (),
    latent: bool = False,
    **ranks: Any,
) -> dict[str, Any]:
    """A storage of SGLang's factory, with host memory of its own."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageConfig, PoolName
    from sglang.srt.mem_cache.storage.backend_factory import StorageBackendFactory

    where = {"module_path": "distprefix.engines.sglang", "class_name": "DistPrefixStorage"}
    one = {"tp_rank": 0, "tp_size": 1, "pp_rank": 0, "pp_size": 1, "attn_cp_rank": 0, "attn_cp_size": 1}
    config = HiCacheStorageConfig(
        **{**one, "is_mla_model": False, **ranks},
        enable_storage_metrics=True,
        is_page_first_layout=layout == "page_first",
        model_name=model,
        extra_config={"backend_name": "distprefix", **where, "interface_v1": 1, **extra},
    )
    pools[name, "kv"] = _latent_pool(layout, pages) if latent else _pool(layout, pages, heads)
    storage = StorageBackendFactory.create_backend("dynamic", config, pools[name, "kv"])
    storage.register_mem_pool_host(pools[name, "kv"])
    for each in sidecars:
        pools[name, each] = _pool(layout, pages, 1)
        storage.register_mem_host_pool_v2(pools[name, each], PoolName(each))
    storage.on_host_pools_registered()
    storages[name] = storage
    return {"type": type(storage).__name__}


def fill(name: str, seed: int) -> dict[str, Any]:
    """Other bytes in all host memory of a storage."""
    import torch

    torch.manual_seed(seed)
    for (owner, _), pool in pools.items():
        if owner == name:
            pool.kv_buffer.copy_(torch.randn(pool.kv_buffer.shape))
    return {}


def same(one: str, other: str, pages: list[list[int]], pool: str = "kv") -> dict[str, Any]:
    """Whether pages, pair by pair, are the same bytes in two storages' host memory."""
    import torch

    flat = [
        torch.equal(
            pools[one, pool].get_data_page(a * PAGE, flat=True), pools[other, pool].get_data_page(b * PAGE, flat=True)
        )
        for a, b in pages
    ]
    return {"same": flat}


def _extra(prefix: list[str] | None) -> Any:
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorageExtraInfo

    return HiCacheStorageExtraInfo(prefix_keys=prefix)


def _indices(pages: list[int]) -> Any:
    import torch

    return torch.tensor([page * PAGE + at for page in pages for at in range(PAGE)], dtype=torch.int64)


def call(
    name: str, method: str, keys: list[str], pages: list[int] | None = None, prefix: list[str] | None = None
) -> dict[str, Any]:
    """A method of interface v1, and how long it took."""
    arguments = [keys] if pages is None else [keys, _indices(pages)]
    began = time.perf_counter()
    result = getattr(storages[name], method)(*arguments, _extra(prefix))
    return {"result": result, "s": time.perf_counter() - began}


def v2(
    name: str,
    method: str,
    transfers: list[dict[str, Any]],
    keys: list[str] | None = None,
    prefix: list[str] | None = None,
) -> dict[str, Any]:
    """A method of interface v2."""
    from sglang.srt.mem_cache.hicache_storage import PoolHitPolicy, PoolName, PoolTransfer

    made = [
        PoolTransfer(
            name=PoolName(each["pool"]),
            keys=each.get("keys"),
            host_indices=_indices(each["pages"]) if "pages" in each else None,
            hit_policy=PoolHitPolicy(each.get("policy", "all_pages")),
            block_pages=each.get("block_pages", 0),
            group_pages=each.get("group_pages", 0),
        )
        for each in transfers
    ]
    if method == "batch_exists_v2":
        found = storages[name].batch_exists_v2(keys, made, _extra(prefix))
        hits = {PoolName(pool).value: pages for pool, pages in found.extra_pool_hit_pages.items()}
        return {"pages": found.kv_hit_pages, "hits": hits, "restorable": found.restorable_prefix_pages}
    results = getattr(storages[name], method)(made, extra_info=_extra(prefix))
    return {"result": {PoolName(pool).value: good for pool, good in results.items()}}


def generic(name: str, method: str, keys: list[str], pages: list[int]) -> dict[str, Any]:
    """The generic page path, as SGLang's controller takes it without interface_v1."""
    pool, storage = pools[name, "kv"], storages[name]
    if method == "batch_set":
        return {"result": storage.batch_set(keys, [pool.get_data_page(page * PAGE, flat=False) for page in pages])}
    loaded = storage.batch_get(keys, [pool.get_dummy_flat_data_page() for _ in keys])
    for page, data in zip(pages, loaded, strict=True):
        if data is not None:
            pool.set_from_flat_data_page(page * PAGE, data)
    return {"result": [data is not None for data in loaded]}


def stats(name: str) -> dict[str, Any]:
    """What get_stats gives."""
    return vars(storages[name].get_stats())


def clear(name: str) -> dict[str, Any]:
    """Empty it."""
    return {"result": storages[name].clear()}


def close(name: str) -> dict[str, Any]:
    """Close a storage."""
    storages.pop(name).close()
    return {}


def interface() -> dict[str, Any]:
    """SGLang's abstract class, as it is installed: its methods' parameters, and which are abstract; and ours."""
    from sglang.srt.mem_cache.hicache_storage import HiCacheStorage

    from distprefix.engines.sglang import DistPrefixStorage

    version = importlib.metadata.version("sglang")
    abstract = sorted(HiCacheStorage.__abstractmethods__)
    ours, theirs = parameters(DistPrefixStorage), parameters(HiCacheStorage)
    return {"version": version, "abstract": abstract, "methods": theirs, "ours": ours}


EVERY = (call, clear, close, fill, generic, interface, open_, said, same, stats, v2)
ORDERS = {function.__name__.rstrip("_"): function for function in EVERY}


def ready() -> None:
    """Import what takes ten seconds."""
    prepare()
    import sglang.srt.mem_cache.pool_host.mha


if __name__ == "__main__":
    serve(ORDERS, ready)
    for storage in storages.values():
        storage.close()
