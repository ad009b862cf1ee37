"""vLLM's connector interface, version 1: blocks go to Redis as they are computed, and come from there else.

One payload a block and rank, with all layers. The scheduler asks what is stored while a request waits in the queue;
workers load between steps and copy what each computes, beside it. Redis is never waited for in a step.
"""

# ruff: noqa: ARG002 - the interface names them
# pyright: reportMissingImports=false, reportUntypedBaseClass=false, reportIncompatibleMethodOverride=false

from __future__ import annotations

import logging
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorRole, SupportsHMA

from distprefix.engines.vllm_plugin import log_as_vllm
from distprefix.engines.vllm_scheduler import Scheduler, Step
from distprefix.engines.vllm_worker import Worker

__all__ = ["DistPrefixConnector"]

_log = logging.getLogger("distprefix")
_LAYERWISE = "layerwise"


class DistPrefixConnector(KVConnectorBase_V1, SupportsHMA):
    """What vLLM makes two of: one for the scheduler, one for each worker."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        log_as_vllm()
        transfer = vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy != "recompute":
            # vLLM's default fails the request when a block cannot be loaded; a cache has no right to that.
            transfer.kv_load_failure_policy = "recompute"
        settings = dict(transfer.kv_connector_extra_config)
        self._is_layerwise = bool(settings.pop(_LAYERWISE, False))
        if self._is_layerwise and getattr(vllm_config.parallel_config, "use_ubatching", False):
            self._is_layerwise = False
            _log.warning("KV is not copied layer by layer: micro-batches compute each layer several times a step")
        self._scheduler: Scheduler | None = None
        self._worker: Worker | None = None
        problem = _unsupported(vllm_config, kv_cache_config)
        if problem:
            _log.warning("KV is not shared: %s", problem)
        elif role == KVConnectorRole.SCHEDULER:
            self._scheduler = Scheduler(vllm_config, kv_cache_config, settings)
        else:
            self._worker = Worker(vllm_config, kv_cache_config, settings)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Whether layers have to tell when they are done: a graph of the whole step does not."""
        return bool(extra_config.get(_LAYERWISE, False))

    @property
    def requires_kv_delivery(self) -> bool:
        """A save that is lost is a miss later."""
        return False

    # Scheduler

    def on_new_request(self, request: Any) -> None:
        """Begin to look a request up while it waits in the queue."""
        if self._scheduler is not None:
            self._scheduler.begin(request)

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """How many tokens can be loaded beyond the computed ones; None while that is not known yet."""
        if self._scheduler is None:
            return 0, False
        tokens = self._scheduler.loadable(request, num_computed_tokens)
        return tokens, bool(tokens)

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """A request has the blocks to load into."""
        if self._scheduler is None:
            return
        self._scheduler.admit(request, num_external_tokens)
        if num_external_tokens:
            self._scheduler.load(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        """What workers load and save in this step."""
        return Step() if self._scheduler is None else self._scheduler.step(scheduler_output, self._kv_cache_manager)

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """A request has ended, or was aborted; its blocks may go: what is saved was copied."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """As `request_finished`."""
        if self._scheduler is not None:
            self._scheduler.end(request.request_id)
        return False, None

    # Worker

    def register_kv_caches(self, kv_caches: dict[str, Any]) -> None:
        """Remember where KV lies."""
        if self._worker is not None:
            self._worker.register(kv_caches)

    def handle_preemptions(self, kv_connector_metadata: Any) -> None:
        """Blocks may be given to other requests, and zeroed or copied to, before the next step begins."""
        if self._worker is not None:
            self._worker.wait_for_copies()

    def bind_connector_metadata(self, connector_metadata: Any) -> None:
        """A step begins."""
        super().bind_connector_metadata(connector_metadata)
        if self._worker is not None:
            self._worker.begin(connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Begin to load what this step is told to. vLLM calls this behind what the step computes."""
        if self._worker is not None:
            self._worker.load(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing: no step needs what is still being loaded."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Begin to copy what was computed of a layer, if that is to begin so early."""
        if self._worker is not None and self._is_layerwise:
            self._worker.save_layer(layer_name)

    def wait_for_save(self) -> None:
        """Begin to copy what is not yet of this step, and hand it to the threads that store it. Waits for nothing."""
        if self._worker is not None:
            self._worker.save()

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads have ended, well or not."""
        return None, (self._worker.finished() if self._worker is not None else None) or None

    def get_transfer_results(self, finished_req_ids: set[str]) -> Any:
        """Requests whose loads have ended, and which of them vLLM has to compute as a whole."""
        results = super().get_transfer_results(finished_req_ids)
        if self._worker is not None:
            results.failed_recving |= self._worker.failed_requests()
        return results

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks that could not be loaded: vLLM computes them."""
        return self._worker.failed_blocks() if self._worker is not None else set()

    def shutdown(self) -> None:
        """Finish what was begun, and close."""
        for part in (self._scheduler, self._worker):
            if part is not None:
                part.close()


def _unsupported(vllm_config: Any, kv_cache_config: Any) -> str:
    """Why blocks cannot be shared; empty when they can."""
    cache, parallel = vllm_config.cache_config, vllm_config.parallel_config
    if not cache.enable_prefix_caching:
        return "prefix caching is off, and its hashes are the keys: start vLLM with --enable-prefix-caching"
    if getattr(parallel, "decode_context_parallel_size", 1) * getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "context parallelism is not supported"
    sizes = {group.kv_cache_spec.block_size for group in kv_cache_config.kv_cache_groups}
    kinds = {type(group.kv_cache_spec).__name__ for group in kv_cache_config.kv_cache_groups}
    if len(sizes) != 1:
        return f"the KV cache groups have blocks of {', '.join(map(str, sorted(sizes)))} tokens: they must be the same"
    if any("Mamba" in kind for kind in kinds):
        return "the state of Mamba layers is not supported"
    if getattr(kv_cache_config, "needs_kv_cache_zeroing", False):
        return "layers keep KV in several precisions, and vLLM zeroes their blocks when no connector is told"
    return ""
