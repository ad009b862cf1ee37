"""vLLM's tiering spec, as it is, and on CPUs too, where vLLM's own has no worker."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from vllm.platforms import current_platform
from vllm.v1.kv_offload.base import OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.shared_offload_region import SharedOffloadRegion
from vllm.v1.kv_offload.tiering.spec import TieringOffloadingSpec

from distprefix.errors import ConfigError

__all__ = ["DistPrefixTieringSpec", "HostWorker"]


class DistPrefixTieringSpec(TieringOffloadingSpec):
    """``"spec_name": "DistPrefixTieringSpec"``: what vLLM's TieringOffloadingSpec is, with a worker for CPUs."""

    _host_worker: HostWorker | None = None

    def get_worker(self, kv_caches: Any) -> Any:
        """What copies between the KV tensors and the primary tier."""
        if not current_platform.is_cpu():
            return super().get_worker(kv_caches)
        if self._host_worker is None:
            self._host_worker = self._make_host_worker(kv_caches)
        return self._host_worker

    def _make_host_worker(self, kv_caches: Any) -> HostWorker:
        if self.config.canonical_layout:
            raise ConfigError("canonical_layout is not supported on CPUs: remove it from kv_connector_extra_config")
        if not self.num_chunks:
            raise ConfigError("cpu_bytes_to_use is less than one chunk needs: raise it in kv_connector_extra_config")
        region = SharedOffloadRegion(
            engine_id=self.config.engine_id,
            num_chunks=self.num_chunks,
            rank=0 if self.replicated_layout else self.config.parallel.rank,
            kv_bytes_per_chunk=self.kv_bytes_per_chunk,
            cpu_page_size=self.cpu_page_size_per_worker,
        )
        try:
            return HostWorker(kv_caches, self.blocks_per_chunk, region)
        except Exception:
            region.cleanup()
            raise


class _Layer(NamedTuple):
    """One tensor of a group."""

    blocks: Any
    """(blocks, bytes)"""
    rows: Any
    """(chunks, blocks of a chunk, bytes)"""
    size: int
    """Bytes of a block that are KV."""


class HostWorker(OffloadingWorker):
    """Copies at once, on the thread of the model runner, which has finished its step by then."""

    def __init__(self, kv_caches: Any, blocks_per_chunk: int, region: Any) -> None:
        self._blocks_per_chunk = blocks_per_chunk
        self._region = region
        weakref.finalize(self, region.cleanup)  # also when the engine ends without a word: it may be large
        self._finished: list[Any] = []
        pairs: list[tuple[Any, Any]] = []
        for each in kv_caches.tensors:
            rows = region.create_next_worker_view(each.page_size_bytes * blocks_per_chunk)
            pairs.append((each.tensor, rows.unflatten(1, (blocks_per_chunk, each.page_size_bytes))))
        self._groups = [
            [_Layer(*pairs[int(ref.tensor_idx)], int(ref.page_size_bytes)) for ref in refs]
            for refs in kv_caches.group_data_refs
        ]

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        """Copy blocks into rows."""
        began, size = time.perf_counter(), 0
        for layers, blocks, rows, parts in self._places(src_spec, dst_spec.block_ids):
            for layer in layers:
                layer.rows[rows, parts, : layer.size] = layer.blocks[blocks, : layer.size]
                size += len(blocks) * layer.size
        return self._finish(job_id, size, began)

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any, expedited: bool = False) -> bool:  # noqa: ARG002
        """Copy rows into blocks. `expedited`, from vLLM 0.33 on: what copies at once is never too late."""
        began, size = time.perf_counter(), 0
        for layers, blocks, rows, parts in self._places(dst_spec, src_spec.block_ids):
            for layer in layers:
                layer.blocks[blocks, : layer.size] = layer.rows[rows, parts, : layer.size]
                size += len(blocks) * layer.size
        return self._finish(job_id, size, began)

    def get_finished(self) -> list[Any]:
        """What was copied since the last call."""
        finished, self._finished = self._finished, []
        return finished

    def wait(self, job_ids: set[int]) -> None:
        """Nothing to wait for."""

    def shutdown(self) -> None:
        """Let go of the tensors and of the primary tier's memory."""
        self._groups.clear()
        if self._region is not None:
            self._region.cleanup()
            self._region = None

    def _places(self, spec: Any, chunk_ids: Any) -> list[tuple[Sequence[_Layer], Any, Any, Any]]:
        """For each group: its tensors, the blocks, and of each block the row and the part of the row.

        The first block of a group may lie in the middle of its chunk.
        """
        import torch  # noqa: PLC0415 - vLLM has it

        places: list[tuple[Sequence[_Layer], Any, Any, Any]] = []
        done_blocks = done_chunks = 0
        for layers, count, first in zip(self._groups, spec.group_sizes, spec.block_indices, strict=True):
            if count:
                at = first % self._blocks_per_chunk + np.arange(count)
                rows = chunk_ids[done_chunks + at // self._blocks_per_chunk]
                blocks = spec.block_ids[done_blocks : done_blocks + count]
                index = [torch.from_numpy(ids.astype(np.int64)) for ids in (blocks, rows, at % self._blocks_per_chunk)]
                places.append((layers, *index))
                done_blocks += count
                done_chunks += int(at[-1]) // self._blocks_per_chunk + 1
        assert (done_blocks, done_chunks) == (len(spec.block_ids), len(chunk_ids))
        return places

    def _finish(self, job_id: int, size: int, began: float) -> bool:
        self._finished.append(TransferResult(job_id, True, size, time.perf_counter() - began))
        return True
