"""An engine's paged KV tensors as rows of bytes, one a block: all layers of it, one after the other."""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Blocks", "PagedCaches"]

Blocks = tuple[tuple[int, ...], ...]
"""Block ids of consecutive chunks, for each KV cache group."""


class _Layer(NamedTuple):
    group: int
    pages: Any
    """A tensor whose first dimension is the block."""
    begin: int
    stop: int
    """Its bytes in a row."""


class PagedCaches:
    """The tensors of one rank. Rows are the same for every order of the dimensions in memory."""

    def __init__(self, tensors: Mapping[str, Any], groups: Sequence[Sequence[str]], block_size: int) -> None:
        """`tensors`: by layer, (blocks, heads, tokens, size). `groups`: the layers of each KV cache group."""
        group_of = {name: i for i, names in enumerate(groups) for name in names}
        self._layers: list[_Layer] = []
        seen: set[tuple[int, int]] = set()  # groups share tensors, layers of a group may share their KV
        self.row_bytes = 0
        for name in sorted(tensors):
            tensor = tensors[name]
            if name not in group_of or (group_of[name], tensor.data_ptr()) in seen:
                continue
            seen.add((group_of[name], tensor.data_ptr()))
            pages = tensor.unflatten(0, (-1, block_size // tensor.shape[2])) if tensor.shape[2] < block_size else tensor
            size = pages[0].numel() * pages.element_size()
            self._layers.append(_Layer(group_of[name], pages, self.row_bytes, self.row_bytes + size))
            self.row_bytes += size

    def rows(self, count: int) -> Any:
        """Room for so many rows in host memory."""
        import torch  # noqa: PLC0415 - engines bring it

        return torch.empty((count, self.row_bytes), dtype=torch.uint8)

    def gather(self, blocks: Blocks, rows: Any) -> None:
        """Copy blocks into rows. On another device than the host's it waits for what was computed there."""
        for layer in self._layers:
            picked = layer.pages[list(blocks[layer.group])].contiguous()
            rows[:, layer.begin : layer.stop].copy_(_as_bytes(picked, len(rows)))

    def scatter(self, rows: Any, blocks: Blocks, count: int) -> None:
        """Copy the first `count` rows into their blocks, but for those that a group no longer has (block 0)."""
        for layer in self._layers:
            ids = blocks[layer.group][:count]
            kept = [i for i, block in enumerate(ids) if block]
            if not kept:
                continue
            part = rows[:count, layer.begin : layer.stop]
            part = part if len(kept) == count else part[kept]
            shape = (len(kept), *layer.pages.shape[1:])
            values = part.contiguous().view(layer.pages.dtype).reshape(shape)
            layer.pages[[ids[i] for i in kept]] = values.to(layer.pages.device)


def _as_bytes(picked: Any, count: int) -> Any:
    import torch  # noqa: PLC0415 - engines bring it

    return picked.view(torch.uint8).reshape(count, -1)
