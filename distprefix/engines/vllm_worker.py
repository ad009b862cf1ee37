"""The connector's half in a vLLM worker: copies blocks out of the KV tensors and into them."""

# pyright: reportMissingImports=false

from __future__ import annotations

from concurrent.futures import Future
from typing import Any, NamedTuple

from distprefix.engines.paged import PagedCaches, Saving
from distprefix.engines.store import EngineStore, config_for, rest
from distprefix.engines.vllm_identity import identity_of, worker_id_of
from distprefix.engines.vllm_scheduler import Step, Transfer

__all__ = ["Worker"]


class _Loading(NamedTuple):
    transfer: Transfer
    rows: Any
    future: Future[int]


class Worker:
    """Belongs to the thread of the model runner."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, settings: dict[str, Any]) -> None:
        from vllm.distributed.parallel_state import get_pp_group, get_tp_group  # noqa: PLC0415 - set up by now

        self._groups = [tuple(group.layer_names) for group in kv_cache_config.kv_cache_groups]
        self._block_size = int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        ranks = get_tp_group().rank_in_group, get_pp_group().rank_in_group
        identity = identity_of(vllm_config, kv_cache_config, self._block_size, *ranks)
        self._store = EngineStore(config_for(identity, {"worker_id": worker_id_of(vllm_config), **settings}))
        self._caches: PagedCaches | None = None
        self._loading: list[_Loading] = []
        self._saving: list[tuple[Transfer, Saving]] = []
        self._is_idle = False
        self._failed: set[int] = set()
        self._failed_requests: set[str] = set()

    def register(self, tensors: dict[str, Any]) -> None:
        """Remember where KV lies."""
        self._caches = PagedCaches(tensors, self._groups, self._block_size)

    def begin(self, step: Step) -> None:
        """Begin a step, before anything of it is computed."""
        self.save()  # what a step left that vLLM did not end
        self.wait_for_copies()
        self._is_idle = step.is_idle
        if self._caches is None:
            return
        for transfer in step.saves:
            count = len(transfer.blocks[0])
            if self._store.has_room(count, count * self._caches.row_bytes):
                self._saving.append((transfer, Saving(self._caches, transfer.blocks)))

    def wait_for_copies(self) -> None:
        """The device changes no block from now on before it was copied out."""
        if self._caches is not None:
            self._caches.wait_for_copies()

    def load(self, step: Step) -> None:
        """Begin to load, into rows of their own: the tensors belong to the model runner's thread."""
        if self._caches is None:
            return
        for transfer in step.loads:
            rows = self._caches.rows(len(transfer.blocks[0]))
            future = self._store.load(transfer.chain, _buffers(rows), transfer.first)
            self._loading.append(_Loading(transfer, rows, future))

    def save_layer(self, name: str) -> None:
        """Begin to copy what the step computed of a layer, while it goes on with the next."""
        for _, saving in self._saving:
            saving.copy(name)

    def save(self) -> None:
        """Begin to copy the rest of what the step computed, and have it stored when it has come."""
        for transfer, saving in self._saving:
            saving.finish()
            self._store.store_later(transfer.chain, saving.count, saving.size, saving.rows, transfer.first)
        self._saving = []

    def finished(self) -> set[str]:
        """Requests whose loads have ended; what came is in their blocks then."""
        assert self._caches is not None or not self._loading
        if self._is_idle and self._loading:
            rest(each.future for each in self._loading)
        done = [each.future.done() for each in self._loading]  # asked once: one may end meanwhile
        ended = [each for each, is_done in zip(self._loading, done, strict=True) if is_done]
        self._loading = [each for each, is_done in zip(self._loading, done, strict=True) if not is_done]
        for transfer, rows, future in ended:
            good = future.result()
            if good and self._caches is not None:
                self._caches.scatter(rows, transfer.blocks, good)
            if good == len(transfer.blocks[0]):
                continue
            if len(transfer.blocks) == 1 and all(transfer.blocks[0]):
                self._failed.update(transfer.blocks[0][good:])
            else:  # vLLM would go on behind the last good block, which neither several groups nor a window allow
                self._failed_requests.add(transfer.request_id)
        return {each.transfer.request_id for each in ended}

    def failed_blocks(self) -> set[int]:
        """Blocks that could not be loaded, told once."""
        failed, self._failed = self._failed, set()
        return failed

    def failed_requests(self) -> set[str]:
        """Requests that vLLM has to compute as a whole, told once."""
        failed, self._failed_requests = self._failed_requests, set()
        return failed

    def close(self) -> None:
        """Finish what was begun, and close."""
        self._store.close()


def _buffers(rows: Any) -> list[memoryview]:
    return [memoryview(row) for row in rows.numpy()]
