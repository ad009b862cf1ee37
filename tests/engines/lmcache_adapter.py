"""LMCache's own factory, keys and memory objects, doing as they are told on stdin.

Run by the Python of an environment with LMCache, as install_lmcache.sh makes one, with this repository on PYTHONPATH.
Every line on stdin is an order and gets one line on stdout, both JSON: ``{"do": NAME, ...}``, see the functions of
`ORDERS`; what fails is answered with ``{"error": ...}``. What is opened here under two names is as apart as two servers
are.
"""

# pyright: basic, reportMissingImports=false
from __future__ import annotations

import os
import select
import time
from typing import Any

import lmcache
import torch
from lmcache.v1.distributed.api import MemoryLayoutDesc, ObjectKey
from lmcache.v1.distributed.l2_adapters import create_l2_adapter
from lmcache.v1.distributed.l2_adapters.base import L2AdapterInterface
from lmcache.v1.distributed.l2_adapters.config import get_l2_adapter_config_class
from lmcache.v1.memory_management import MemoryObjMetadata, TensorMemoryObj

from tests.engines.serve import parameters, said, serve

SHAPE = torch.Size([2, 2, 16, 8])
PLUGIN = {"type": "plugin", "module_path": "distprefix.engines.lmcache", "class_name": "DistPrefixL2Adapter"}


adapters: dict[str, Any] = {}


def open_(name: str, params: dict[str, Any]) -> dict[str, Any]:
    """An adapter of LMCache's factory, from the JSON of its command line."""
    plugin = get_l2_adapter_config_class("plugin").from_dict({**PLUGIN, "adapter_params": params})
    adapter = create_l2_adapter(plugin)
    adapters[name] = adapter
    fds = {adapter.get_store_event_fd(), adapter.get_lookup_and_lock_event_fd(), adapter.get_load_event_fd()}
    return {"fds": len(fds), "type": type(adapter).__name__}


def _keys(hashes: list[str], key: dict[str, Any] | None) -> list[ObjectKey]:
    made = {"model_name": "tiny", "kv_rank": 0x01000100, **(key or {})}
    return [ObjectKey(bytes.fromhex(each), **made) for each in hashes]


def _object(seed: int | None) -> TensorMemoryObj:
    size = SHAPE.numel() * 2
    raw = torch.zeros(size, dtype=torch.uint8)
    if seed is not None:
        raw.copy_(torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)))
    meta = MemoryObjMetadata(SHAPE, torch.bfloat16, 0, size, 1, shapes=[SHAPE], dtypes=[torch.bfloat16])
    return TensorMemoryObj(raw, meta, None)


def _wait(fd: int, ask: Any) -> Any:
    """What a task gives, once its event has told of it."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if poller.poll(1000):
            os.read(fd, 8)
            done = ask()
            if done is not None:
                return done
    raise TimeoutError("no event in a minute")


def store(name: str, hashes: list[str], seeds: list[int], key: dict[str, Any] | None = None) -> dict[str, Any]:
    """Store objects whose bytes are random by their seeds."""
    adapter, began = adapters[name], time.perf_counter()
    task = adapter.submit_store_task(_keys(hashes, key), [_object(seed) for seed in seeds])
    submitted = time.perf_counter() - began
    done = _wait(adapter.get_store_event_fd(), lambda: adapter.pop_completed_store_tasks() or None)[task]
    spent = time.perf_counter() - began
    return {"good": done.is_successful(), "bytes": done.bytes_transferred(), "s": spent, "submit_s": submitted}


def look_up(name: str, hashes: list[str], key: dict[str, Any] | None = None, layout: bool = True) -> dict[str, Any]:
    """Look up and lock keys."""
    adapter, keys, began = adapters[name], _keys(hashes, key), time.perf_counter()
    described = {keys[0].object_group_id: MemoryLayoutDesc([SHAPE], [torch.bfloat16])} if layout else {}
    task = adapter.submit_lookup_and_lock_task(keys, described)
    submitted = time.perf_counter() - began
    fd = adapter.get_lookup_and_lock_event_fd()
    bits = _wait(fd, lambda: adapter.query_lookup_and_lock_result(task))
    spent, again = time.perf_counter() - began, adapter.query_lookup_and_lock_result(task)
    found = [bits.test(i) for i in range(len(keys))]
    return {"found": found, "again": again, "s": spent, "submit_s": submitted}


def unlock(name: str, hashes: list[str], key: dict[str, Any] | None = None) -> dict[str, Any]:
    """Give keys back."""
    adapters[name].submit_unlock(_keys(hashes, key))
    return {}


def load(name: str, hashes: list[str], seeds: list[int], key: dict[str, Any] | None = None) -> dict[str, Any]:
    """Load keys, and hold their bytes against what the seeds make."""
    adapter, objects, began = adapters[name], [_object(None) for _ in hashes], time.perf_counter()
    task = adapter.submit_load_task(_keys(hashes, key), objects)
    bits = _wait(adapter.get_load_event_fd(), lambda: adapter.query_load_result(task))
    same = [torch.equal(each.raw_data, _object(seed).raw_data) for each, seed in zip(objects, seeds, strict=True)]
    return {"good": [bits.test(i) for i in range(len(hashes))], "same": same, "s": time.perf_counter() - began}


def managers(params: dict[str, Any], count: int, ranks: int) -> dict[str, Any]:  # noqa: C901 - one story
    """Two whole storage managers, one after the other: the first is given a prompt's KV, the second is asked for it."""
    from lmcache.v1.distributed.api import GroupedObjectKeys, PrefetchTaskSpec  # noqa: PLC0415 - for this only
    from lmcache.v1.distributed.config import (  # noqa: PLC0415
        EvictionConfig,
        L1ManagerConfig,
        L1MemoryManagerConfig,
        StorageManagerConfig,
    )
    from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig  # noqa: PLC0415
    from lmcache.v1.distributed.storage_manager import StorageManager  # noqa: PLC0415

    def make() -> Any:
        plugin = get_l2_adapter_config_class("plugin").from_dict({**PLUGIN, "adapter_params": params})
        memory = L1MemoryManagerConfig(64 << 20, use_lazy=False, shm_name="")
        eviction = EvictionConfig("LRU")
        return StorageManager(StorageManagerConfig(L1ManagerConfig(memory), eviction, L2AdaptersConfig([plugin])))

    layout = MemoryLayoutDesc([SHAPE], [torch.bfloat16])
    hashes = [bytes([i]) * 32 for i in range(count)]
    rows = [[ObjectKey(each, "tiny", rank) for each in hashes] for rank in range(ranks)]
    spec = PrefetchTaskSpec([GroupedObjectKeys(row, 0, layout) for row in rows])

    def prefetch(manager: Any) -> int:
        handle = manager.submit_prefetch_task(spec)
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            result = manager.query_prefetch_status(handle)
            if result is not None:
                return sum(row.popcount() for row in result.hit_cells)
            time.sleep(0.005)
        raise TimeoutError("no prefetch in half a minute")

    first = make()
    before = prefetch(first)
    for number, row in enumerate(rows):
        for i, item in enumerate(first.reserve_write(row, layout).values()):
            item.raw_data[: item.get_size()].copy_(_object(100 * number + i).raw_data)
        first.finish_write(row)
    (_, adapter), *_ = first.l2_adapters()
    deadline = time.monotonic() + 30
    while adapter.report_status().get("stored", 0) < count * ranks and time.monotonic() < deadline:
        time.sleep(0.02)
    first.close()
    second = make()
    after, same = prefetch(second), True
    for number, row in enumerate(rows):
        with second.read_prefetched_results(row) as items:
            for i, item in enumerate(items or [None] * count):
                wanted = _object(100 * number + i).raw_data
                same = same and item is not None and torch.equal(item.raw_data[: item.get_size()], wanted)
        second.finish_read_prefetched(row)
    (_, adapter), *_ = second.l2_adapters()
    deadline = time.monotonic() + 10
    while adapter.report_status()["locked_key_count"] and time.monotonic() < deadline:
        time.sleep(0.02)
    locked = adapter.report_status()["locked_key_count"]
    second.close()
    return {"before": before, "after": after, "same": same, "locked": locked}


def status(name: str) -> dict[str, Any]:
    """What report_status and get_usage give."""
    usage = adapters[name].get_usage()
    return {**adapters[name].report_status(), "usage": usage.total_bytes_used}


def close(name: str) -> dict[str, Any]:
    """Close an adapter."""
    adapters.pop(name).close()
    return {}


def interface() -> dict[str, Any]:
    """LMCache's abstract class, as it is installed: its methods' parameters, and which are abstract; and ours."""
    from distprefix.engines.lmcache import DistPrefixL2Adapter  # noqa: PLC0415 - this is not the package of that name

    abstract = sorted(L2AdapterInterface.__abstractmethods__)
    ours, theirs = parameters(DistPrefixL2Adapter), parameters(L2AdapterInterface)
    return {"from": lmcache.__name__, "abstract": abstract, "methods": theirs, "ours": ours}


ORDERS = {
    "close": close,
    "interface": interface,
    "load": load,
    "look_up": look_up,
    "managers": managers,
    "open": open_,
    "said": said,
    "status": status,
    "store": store,
    "unlock": unlock,
}


if __name__ == "__main__":
    serve(ORDERS)
