"""SGLang's host memory as buffers, and what its KV depends on. Knows pools by what they answer, not by their class."""

from __future__ import annotations

import ctypes
import sys
from importlib import metadata
from typing import Any

from distprefix.engines.identity import Identity, weights_soon
from distprefix.redis.transfers import Buffer

__all__ = ["Page", "bytes_of", "identity_of", "is_replicated", "launched_with", "pages_of"]

_GEOMETRY = (
    "layout",
    "layer_num",
    "start_layer",
    "end_layer",
    "head_num",
    "head_dim",
    "v_head_dim",
    "head_group_num",
    "kv_lora_rank",
    "qk_rope_head_dim",
    "num_mamba_layers",
    "temporal_state_elem_size",
    "conv_state_shapes",
    "storage_format_tag",
    "size_per_token",
)


class Page:
    """A page of a host pool: one segment of memory, or several, such as K and V."""

    __slots__ = ("_segments",)

    def __init__(self, segments: list[memoryview]) -> None:
        self._segments = segments

    def read(self) -> Buffer:
        """Its bytes: the pool's own memory when it is one segment, else a copy."""
        return self._segments[0] if len(self._segments) == 1 else b"".join(self._segments)

    def target(self) -> memoryview:
        """Where to load it into: the pool's own memory when it is one segment."""
        if len(self._segments) == 1:
            return self._segments[0]
        return memoryview(bytearray(sum(map(len, self._segments))))

    def keep(self, target: memoryview) -> None:
        """What was loaded into its target goes where it belongs."""
        at = 0
        if len(self._segments) > 1:
            for segment in self._segments:
                segment[:] = target[at : at + len(segment)]
                at += len(segment)


class _FlatPage(Page):
    """A page of a pool that does not tell where its segments lie: it gives and takes copies."""

    __slots__ = ("_index", "_loaded", "_pool")

    def __init__(self, pool: Any, index: int) -> None:
        super().__init__([])
        self._pool, self._index, self._loaded = pool, index, None

    def read(self) -> Buffer:
        return bytes_of(self._pool.get_data_page(self._index, flat=True).contiguous(), copy=True)

    def target(self) -> memoryview:
        self._loaded = self._pool.get_dummy_flat_data_page()
        return bytes_of(self._loaded)

    def keep(self, target: memoryview) -> None:  # noqa: ARG002 - it is the tensor's own memory
        self._pool.set_from_flat_data_page(self._index, self._loaded)


def pages_of(pool: Any, host_indices: Any, count: int) -> list[Page]:
    """The pages that a pool has at these indices, of every token. Raises ValueError when they are not so many."""
    size = getattr(pool, "page_size", 1) or 1
    if host_indices is None or len(host_indices) != count * size:
        raise ValueError(f"{0 if host_indices is None else len(host_indices)} indices for {count} pages of {size}")
    try:
        pointers, sizes = pool.get_page_buffer_meta(host_indices)
    except (AttributeError, NotImplementedError, ValueError):  # not in this layout
        return [_FlatPage(pool, int(host_indices[at * size])) for at in range(count)]
    each = len(pointers) // count if count else 0
    starts = range(0, count * each, each or 1)
    return [Page(_segments(pointers[at : at + each], sizes[at : at + each])) for at in starts]


def bytes_of(tensor: Any, *, copy: bool = False) -> memoryview:
    """A contiguous tensor's memory; the tensor must outlive it, unless it is copied."""
    view = _memory(tensor.data_ptr(), tensor.numel() * tensor.element_size())
    return memoryview(bytes(view)) if copy else view


def is_replicated(config: Any, name: str, pool: Any) -> bool:
    """Whether every tensor-parallel rank has the same bytes in a pool: MLA's latent KV, but no state and no heads."""
    return bool(config.is_mla_model) and name != "mamba" and not type(pool).__name__.startswith("MHA")


def identity_of(config: Any, pool: Any, name: str) -> Identity:
    """What a pool's pages depend on."""
    model = str(config.model_name or "")
    parts = [f"tp {config.tp_rank}/{config.tp_size}", f"pp {config.pp_rank}/{config.pp_size}"]
    if is_replicated(config, name, pool):
        parts[0] = f"tp all dcp {getattr(config, 'dcp_rank', 0)}/{getattr(config, 'dcp_size', 1)}"
    parts.append(f"cp {config.attn_cp_rank}/{config.attn_cp_size}")
    geometry = [f"{key} {getattr(pool, key)}" for key in _GEOMETRY if getattr(pool, key, None) is not None]
    return Identity(
        engine=f"sglang {_version()}",
        model=model,
        weights=weights_soon(model),
        dtype=f"{str(getattr(pool, 'dtype', '')).removeprefix('torch.')}/{launched_with('model', 'kv_cache_dtype')}",
        layout=f"{name} {type(pool).__name__} {' '.join(geometry)}",
        chunk_size=int(getattr(config, "logical_page_size", None) or pool.page_size),
        ranks=" ".join(parts),
        hashing="sglang sha256 pages",
    )


def launched_with(bag: str, name: str) -> Any:
    """An option that the server was launched with; None outside a server."""
    context = sys.modules.get("sglang.srt.runtime_context")
    try:
        return getattr(getattr(context, f"get_{bag}")(), name)
    except (AttributeError, ValueError):  # published for no server
        return None


def _version() -> str:
    """All of it: the order of a page's bytes has changed between patch releases."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return "unknown"


def _segments(pointers: list[int], sizes: list[int]) -> list[memoryview]:
    """The memory named, as one where one segment follows the other."""
    merged: list[list[int]] = []
    for pointer, size in zip(pointers, sizes, strict=True):
        if merged and sum(merged[-1]) == pointer:
            merged[-1][1] += size
        else:
            merged.append([pointer, size])
    return [_memory(pointer, size) for pointer, size in merged]


def _memory(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")
