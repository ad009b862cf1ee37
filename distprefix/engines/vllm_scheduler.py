"""The connector's half in vLLM's scheduler: which blocks to load, which to save."""

# pyright: reportMissingImports=false, reportUntypedBaseClass=false

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from distprefix.chunking import HASH_BYTES
from distprefix.engines.paged import Blocks
from distprefix.engines.store import EngineStore, config_for, rest
from distprefix.engines.vllm_identity import identities_of, worker_id_of

__all__ = ["Scheduler", "Step", "Transfer"]

_log = logging.getLogger("distprefix")
_LOOKUP_LIMIT_S = 1.0
"""A request that could be computed waits no longer for an answer."""


class Transfer(NamedTuple):
    """Blocks of one request to load or to save."""

    request_id: str
    chain: bytes
    """Hashes of all chunks up to the last one wanted, 16 bytes each."""
    first: int
    """The chunk that the blocks begin with."""
    blocks: Blocks


@dataclass
class Step(KVConnectorMetadata):
    """What workers do in a step."""

    loads: list[Transfer] = field(default_factory=list[Transfer])
    saves: list[Transfer] = field(default_factory=list[Transfer])
    is_idle: bool = False
    """Whether nothing is computed in it."""


@dataclass(slots=True)
class _Tracked:
    """A request."""

    request: Any
    lookups: list[Future[int]]
    """One for each rank."""
    asked: float
    preemptions: int
    has_loaded: bool = False
    """Once is enough: what failed would fail again."""
    saved: int = -1
    """Leading chunks that are stored, or being so; -1 before that is known."""
    lacked: int | None = None
    """Chunks that vLLM asked for and its own cache does not have; None when it has not asked."""


class Scheduler:
    """Belongs to the scheduler's thread."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, settings: dict[str, Any]) -> None:
        self._block_size = int(kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size)
        identities = identities_of(vllm_config, kv_cache_config, self._block_size)
        own = {"worker_id": worker_id_of(vllm_config), **settings}
        self._stores = [EngineStore(config_for(identity, own), threads=1) for identity in identities]
        self._tracked: dict[str, _Tracked] = {}
        self._loads: list[Transfer] = []

    def begin(self, request: Any) -> None:
        """Look a request up."""
        self._track(request)

    def loadable(self, request: Any, computed: int) -> int | None:
        """Tokens that can be loaded beyond the computed ones; None while that is not known."""
        tracked = self._track(request)
        tracked.lacked = (request.num_tokens - computed) // self._block_size
        if tracked.has_loaded:
            return 0
        stored = self._stored(tracked)
        if stored is None:
            return None
        # The last token has to be computed, to have something to sample from.
        most = min(stored, (request.num_tokens - 1) // self._block_size)
        return max(0, most * self._block_size - computed)

    def admit(self, request: Any, tokens: int) -> None:
        """A request was given blocks, and so many tokens are loaded: the look-up counts now, as vLLM counts it."""
        tracked = self._tracked.get(request.request_id)
        if tracked is not None and tracked.lacked is not None and tracked.lookups:
            for store in self._stores:
                store.count_lookup(tracked.lacked, tokens // self._block_size)
            tracked.lacked = None

    def load(self, request: Any, block_ids: tuple[list[int], ...], tokens: int) -> None:
        """Load so many tokens behind those that the request has computed, into its blocks."""
        tracked = self._track(request)
        tracked.has_loaded = True
        # What is loaded ends at a block, and begins where the local cache ended.
        stop = self._loaded_until(tracked)
        first = stop - tokens // self._block_size
        blocks = tuple(tuple(ids[first:stop]) for ids in block_ids)
        self._loads.append(Transfer(request.request_id, _chain(request, stop), first, blocks))

    def step(self, output: Any, manager: Any) -> Step:
        """What to do in the step that was just scheduled."""
        is_idle = not output.total_num_scheduled_tokens
        step, self._loads = Step(loads=self._loads, is_idle=is_idle), []
        if is_idle and not step.loads:
            self._rest()
        for request_id, computed in _scheduled(output):
            tracked = self._tracked.get(request_id)
            if tracked is None:
                continue
            after = (computed + output.num_scheduled_tokens[request_id]) // self._block_size
            self._note(tracked, computed // self._block_size)
            save = self._save(tracked, min(after, len(tracked.request.block_hashes)), manager)
            if save is not None:
                step.saves.append(save)
        return step

    def _rest(self) -> None:
        """Nothing can be computed before more is known: let it be asked for."""
        waiting = [each for tracked in self._tracked.values() for each in tracked.lookups if not each.done()]
        if waiting:
            rest(waiting)

    def end(self, request_id: str) -> None:
        """Forget a request."""
        self._tracked.pop(request_id, None)

    def close(self) -> None:
        """Close the connections."""
        for store in self._stores:
            store.close()

    def _track(self, request: Any) -> _Tracked:
        """A request, looked up; anew after a preemption, when its blocks have gone."""
        tracked = self._tracked.get(request.request_id)
        if tracked is None or tracked.preemptions != request.num_preemptions:
            count = len(request.block_hashes)
            lookups = (
                [store.look_up(_chain(request, count), is_counted=False) for store in self._stores] if count else []
            )
            tracked = _Tracked(request, lookups, time.monotonic(), request.num_preemptions)
            self._tracked[request.request_id] = tracked
        return tracked

    def _stored(self, tracked: _Tracked) -> int | None:
        """Leading chunks that every rank can load; None while that is not known."""
        if not all(lookup.done() for lookup in tracked.lookups):
            return 0 if time.monotonic() - tracked.asked > _LOOKUP_LIMIT_S else None
        return min((lookup.result() for lookup in tracked.lookups), default=0)

    def _loaded_until(self, tracked: _Tracked) -> int:
        return min(self._stored(tracked) or 0, (tracked.request.num_tokens - 1) // self._block_size)

    def _note(self, tracked: _Tracked, computed: int) -> None:
        """See what is stored already of a request that has so many chunks: what could not be loaded is not."""
        if tracked.saved < 0:
            tracked.saved = self._stored(tracked) or 0
        if tracked.has_loaded and computed < self._loaded_until(tracked):
            tracked.saved = min(tracked.saved, computed)

    def _save(self, tracked: _Tracked, stop: int, manager: Any) -> Transfer | None:
        """What of a request's first `stop` chunks is not stored yet. Blocks that a group has given up end it."""
        first = tracked.saved
        if stop <= first:
            return None
        block_ids = manager.get_block_ids(tracked.request.request_id)
        stop = min(stop, *(_until_null(ids, first) for ids in block_ids))
        if stop <= first:
            return None
        tracked.saved = stop
        blocks = tuple(tuple(ids[first:stop]) for ids in block_ids)
        return Transfer(tracked.request.request_id, _chain(tracked.request, stop), first, blocks)


def _chain(request: Any, count: int) -> bytes:
    return b"".join(block_hash[:HASH_BYTES] for block_hash in request.block_hashes[:count])


def _scheduled(output: Any) -> Iterator[tuple[str, int]]:
    """Requests of a step, and how many of their tokens were computed before it."""
    for request in output.scheduled_new_reqs:
        yield request.req_id, request.num_computed_tokens
    yield from zip(output.scheduled_cached_reqs.req_ids, output.scheduled_cached_reqs.num_computed_tokens, strict=True)


def _until_null(ids: list[int], first: int) -> int:
    """Where the first block from `first` on is that a group has given up, or the end."""
    return next((at for at in range(first, len(ids)) if not ids[at]), len(ids))
