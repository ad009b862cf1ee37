"""A secondary tier of vLLM's KV offloading: what its primary tier in host memory gets goes to Redis, for every engine.

``"secondary_tiers": [{"type": "distprefix", "url": "redis://..."}]``. One payload a chunk, which has all workers' KV.
Chunks go from the primary tier's rows to the socket and back, with no copy of ours between.
"""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from itertools import compress
from typing import Any, TypeVar

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.metrics import OffloadingConnectorStats
from vllm.v1.kv_offload.base import Locality, LookupResult, Medium, OffloadingCounterMetadata, OffloadPolicy
from vllm.v1.kv_offload.base import RequestOffloadingContext as Wish
from vllm.v1.kv_offload.tiering.async_lookup import AsyncLookupManager
from vllm.v1.kv_offload.tiering.base import JobResult, SecondaryTierManager

from distprefix.engines.chains import GROUP_BYTES, KeyChains, Run
from distprefix.engines.parts import PartStore
from distprefix.engines.store import REST_S, config_for, rest
from distprefix.engines.vllm_identity import process_id_of
from distprefix.engines.vllm_plugin import log_as_vllm
from distprefix.engines.vllm_tier_identity import chunk_tokens_of, tier_identity

__all__ = ["EVENTS", "DistPrefixTier"]

EVENTS = "vllm:distprefix_tier_events"
_LOOKUP_LIMIT_S = 1.0
"""Requests wait no longer for an answer."""
_IDLE_S = 0.001
"""A step that computes anything takes longer."""
_CLOSE_LIMIT_S = 5.0
"""So long the engine's end waits for what is still being stored."""
_OFFER_AGAIN_S = 60.0
"""After a store that failed, new requests offer all their chunks for so long, not only those that are new here."""

_log = logging.getLogger("distprefix")
T = TypeVar("T")


@dataclass(slots=True)
class _Job:
    """A transfer that vLLM waits for."""

    runs: list[tuple[Run, Future[list[bool]]]]
    """With which of its chunks are loaded, or stored then."""
    keys: tuple[bytes, ...]
    is_load: bool
    waiting_bytes: int
    began: float


class DistPrefixTier(SecondaryTierManager):
    """Methods belong to the scheduler: they wait for nothing and never raise. Redis may come and go."""

    medium = Medium.STORAGE

    def __init__(
        self,
        offloading_spec: Any,
        primary_kv_view: memoryview,
        tier_type: str,
        backpressure_detector: Any = None,
        *,
        locality: str | None = None,
        revision: str | None = None,
        **settings: Any,
    ) -> None:
        """`settings`: as `config_for` takes them. `revision`: the model's. Raises ConfigError for wrong ones."""
        super().__init__(offloading_spec, primary_kv_view, tier_type, backpressure_detector)
        log_as_vllm()
        self.locality = Locality.REMOTE if locality is None else Locality(locality)
        self._chunk_tokens = chunk_tokens_of(offloading_spec.config)
        configs = {
            group: config_for(
                tier_identity(offloading_spec.config, group, revision),
                {"worker_id": process_id_of(f"tier-{group}"), **settings},
            )
            for group in self._chunk_tokens
        }
        self._rows: Any = np.asarray(primary_kv_view)
        self._jobs: dict[int, _Job] = {}
        self._waiting_bytes, self._max_waiting_bytes = 0, self._rows.nbytes // 4
        # vLLM does not tell which groups have sliding windows: of one group alone it is taken to have none
        is_hybrid = len(configs) > 1
        self._stores = {
            group: PartStore(config, alone=is_hybrid, max_waiting_bytes=self._max_waiting_bytes)
            for group, config in configs.items()
        }
        self._offer_until = self._ended = 0.0
        self._waits_for_answers = False
        self._counts: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._lookups = _Lookups(tier_type, self._stores)

    # Requests

    def on_new_request(self, req_context: Any) -> Any:  # noqa: ARG002 - vLLM's signature
        """Every chunk that the primary tier has is offered while there may be holes in Redis."""
        is_whole = time.monotonic() >= self._offer_until
        return Wish(OffloadPolicy.CHUNK_LEVEL if is_whole else OffloadPolicy.REQUEST_LEVEL)

    def on_request_finished(self, req_context: Any) -> None:
        """Forget what was looked up for it."""
        self._lookups.cleanup(req_context.req_id)

    def on_schedule_end(self, context: Any) -> None:  # noqa: ARG002 - vLLM's signature
        """Look up what this step's requests asked for, one Redis call for each request and group.

        Rests when steps follow each other so fast that nothing was computed in them.
        """
        if self._waits_for_answers:
            self._lookups.answered.clear()
        self._lookups.flush()
        if time.monotonic() - self._ended < _IDLE_S:
            self._rest()
        self._ended, self._waits_for_answers = time.monotonic(), False

    def _rest(self) -> None:
        """Leave Python's lock to the threads that this step would only ask in vain."""
        if self._waits_for_answers:
            self._lookups.answered.wait(REST_S)
        elif self._jobs:
            rest(future for job in self._jobs.values() for _, future in job.runs if not future.done())

    def lookup(self, key: bytes, req_context: Any) -> Any:
        """Whether a chunk is stored; RETRY until it is known."""
        if self._learn(req_context).chunk(key) is None:
            self._counts["unknown_chunks"] += 1
            return LookupResult.MISS
        found = self._lookups.lookup(key, req_context)
        if found is None:
            self._waits_for_answers = True
            return LookupResult.RETRY
        return LookupResult.HIT if found else LookupResult.MISS

    def _learn(self, req_context: Any) -> KeyChains:
        """The chains of a request as it is now."""
        chains = req_context.get_state(KeyChains)
        if chains is None:
            chains = KeyChains(self._chunk_tokens)
            req_context.set_state(chains)
        chains.learn(getattr(req_context, "_offload_key_positions", {}))
        return chains

    # Transfers

    def submit_load(self, job_metadata: Any) -> None:
        """Begin to load chunks into their rows."""
        self._begin(job_metadata, is_load=True)

    def submit_store(self, job_metadata: Any) -> None:
        """Have chunks stored when those before are; not while rows that wait for it fill a quarter of the tier."""
        self._begin(job_metadata, is_load=False)

    def get_finished_jobs(self) -> Iterable[Any]:
        """What ended since the last call. Chunks that could not be loaded are misses from now on."""
        ended = [(name, job) for name, job in self._jobs.items() if all(future.done() for _, future in job.runs)]
        return [self._finish(name, self._jobs.pop(name)) for name, _ in ended]

    def drain_jobs(self) -> None:
        """Wait until all transfers that have begun have ended; what has not never will."""
        wait([future for job in self._jobs.values() for _, future in job.runs if not future.cancel()])

    def _begin(self, asked: Any, *, is_load: bool) -> None:
        keys = tuple(asked.keys)
        runs = self._learn(asked.req_context).runs(keys, map(int, asked.chunk_ids))
        self._counts["unknown_chunks"] += len(keys) - sum(len(run.keys) for run in runs)
        begin = self._load if is_load else self._store
        before = self._waiting_bytes
        begun = [(run, begin(run)) for run in runs]
        waiting = self._waiting_bytes - before
        self._jobs[asked.job_id] = _Job(begun, keys, is_load, waiting, time.monotonic())

    def _load(self, run: Run) -> Future[list[bool]]:
        return self._stores[run.group].load_parts(run.chain, self._buffers(run), run.first)

    def _store(self, run: Run) -> Future[list[bool]]:
        size = len(run.rows) * self.block_size_bytes
        if self._waiting_bytes + size > self._max_waiting_bytes:
            self._counts["stores_dropped_waiting"] += len(run.rows)
            dropped: Future[list[bool]] = Future()
            dropped.set_result([False] * len(run.rows))
            return dropped
        self._waiting_bytes += size
        return self._stores[run.group].store_parts(run.chain, self._buffers(run), run.first)

    def _buffers(self, run: Run) -> list[memoryview]:
        return [memoryview(self._rows[row]).cast("B") for row in run.rows]

    def _finish(self, name: int, job: _Job) -> Any:
        self._waiting_bytes -= job.waiting_bytes
        good = [key for run, future in job.runs for key in compress(run.keys, _outcome(future) or ())]
        is_whole = len(good) == len(job.keys)
        if job.is_load and not is_whole:
            self._lookups.mark_miss(set(job.keys).difference(good))
        elif not is_whole:
            self._offer_until = time.monotonic() + _OFFER_AGAIN_S
        return JobResult(
            job_id=name,
            success=is_whole,
            successful_keys=tuple(good) if job.is_load and good and not is_whole else None,
            transfer_time=time.monotonic() - job.began,
            transfer_bytes=len(good) * self.block_size_bytes,
        )

    # The rest

    @classmethod
    def build_metric_definitions(cls, extra_config: dict[str, Any]) -> dict[str, Any]:  # noqa: ARG003 - vLLM's
        """One counter, by what was counted."""
        told = "What the distprefix tier counted, by event: holes, unknown_chunks, stores_dropped, unavailable, ..."
        return {EVENTS: OffloadingCounterMetadata(documentation=told, labelnames=("event",))}

    def get_stats(self) -> Any:
        """What was counted since the last call."""
        counts = Counter(self._counts)
        for store in self._stores.values():
            counts.update(dict(store.counts))
        stats = OffloadingConnectorStats()
        for event, count in (counts - self._told).items():
            stats.increase_counter(EVENTS, count, (event,))
        self._told = counts
        return None if stats.is_empty() else stats

    def shutdown(self) -> None:
        """Finish what is being stored, but for what takes too long, and let go of the primary tier's memory."""
        wait([future for job in self._jobs.values() for _, future in job.runs], timeout=_CLOSE_LIMIT_S)
        self._lookups.shutdown()
        for store in self._stores.values():
            store.close()
        self._jobs.clear()
        self._rows = None


class _Lookups(AsyncLookupManager):
    """Asks on its thread, all keys of a request in a step at once."""

    def __init__(self, tier_type: str, stores: dict[int, PartStore]) -> None:
        self._stores = stores
        self.answered = threading.Event()
        super().__init__(tier_type=tier_type)

    def batch_lookup(self, keys: Sequence[bytes], req_context: Any) -> Iterable[bool]:
        """Which chunks are stored. Not to be waited for by the scheduler.

        A group that has nothing makes all others of no use: they would be loaded in vain.
        """
        chains: KeyChains = req_context.get_state(KeyChains)
        places = [(int.from_bytes(key[-GROUP_BYTES:], "big"), chains.chunk(key) or 0) for key in keys]
        wanted: dict[int, list[int]] = {}
        for group, chunk in places:
            wanted.setdefault(group, []).append(chunk)
        asked = {
            group: self._stores[group].look_up_parts(chains.chain(group, max(chunks) + 1), chunks)
            for group, chunks in wanted.items()
        }
        wait(asked.values(), timeout=_LOOKUP_LIMIT_S)
        found = {group: _outcome(future) or set[int]() for group, future in asked.items()}
        self.answered.set()
        return [all(found.values()) and chunk in found[group] for group, chunk in places]


def _outcome(future: Future[T]) -> T | None:
    """What came of a future, where something did."""
    return None if not future.done() or future.cancelled() or future.exception() is not None else future.result()
