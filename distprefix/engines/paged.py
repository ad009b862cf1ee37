"""An engine's paged KV tensors as rows of bytes, one a block: all layers of it, one after the other.

Copying out of a device runs beside what it computes, on a stream of its own; on a CPU the same calls copy at once.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Blocks", "Layer", "PagedCaches", "Saving"]

Blocks = tuple[tuple[int, ...], ...]
"""Block ids of consecutive chunks, for each KV cache group."""


class Layer(NamedTuple):
    """The KV of a layer, and where it lies in a row."""

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
        import torch  # noqa: PLC0415 - engines bring it

        group_of = {name: i for i, names in enumerate(groups) for name in names}
        self.layers: dict[str, Layer] = {}
        seen: set[tuple[int, int]] = set()  # groups share tensors, layers of a group may share their KV
        self.row_bytes = 0
        for name in sorted(tensors):
            tensor = tensors[name]
            if name not in group_of or (group_of[name], tensor.data_ptr()) in seen:
                continue
            seen.add((group_of[name], tensor.data_ptr()))
            pages = tensor.unflatten(0, (-1, block_size // tensor.shape[2])) if tensor.shape[2] < block_size else tensor
            size = pages[0].numel() * pages.element_size()
            self.layers[name] = Layer(group_of[name], pages, self.row_bytes, self.row_bytes + size)
            self.row_bytes += size
        self._place = next(iter(tensors.values())).device if tensors else torch.device("cpu")
        self.device = torch.get_device_module(self._place)
        self.stream = self.device.Stream()

    def rows(self, count: int) -> Any:
        """Room for so many rows in host memory."""
        import torch  # noqa: PLC0415 - engines bring it

        return torch.empty((count, self.row_bytes), dtype=torch.uint8)

    def index(self, blocks: Sequence[int]) -> Any:
        """Blocks as the device takes them, on their way there: memory that is not pinned would be waited for."""
        import torch  # noqa: PLC0415 - engines bring it

        ids = torch.tensor(blocks, dtype=torch.int64, pin_memory=self._place.type != "cpu")
        return ids.to(self._place, non_blocking=True)

    def wait_for_copies(self) -> None:
        """What the device does from now on waits for what is still being copied out of it: blocks are used again."""
        self.device.current_stream().wait_stream(self.stream)

    def scatter(self, rows: Any, blocks: Blocks, count: int) -> None:
        """Copy the first `count` rows into their blocks, but for those that a group no longer has (block 0)."""
        for layer in self.layers.values():
            ids = blocks[layer.group][:count]
            kept = [i for i, block in enumerate(ids) if block]
            if not kept:
                continue
            part = rows[:count, layer.begin : layer.stop]
            part = part if len(kept) == count else part[kept]
            shape = (len(kept), *layer.pages.shape[1:])
            values = part.contiguous().view(layer.pages.dtype).reshape(shape)
            layer.pages.index_copy_(0, self.index([ids[i] for i in kept]), values.to(self._place))


class Saving:
    """Blocks on their way into rows, layer by layer. Belongs to the thread of the model runner, but for `rows`."""

    def __init__(self, caches: PagedCaches, blocks: Blocks) -> None:
        self.count = len(blocks[0])
        self.size = self.count * caches.row_bytes
        """Bytes of all rows."""
        self._caches = caches
        self._blocks = [caches.index(ids) for ids in blocks]
        self._picked: dict[str, Any] = {}
        self._copied: Any = None

    def copy(self, name: str) -> None:
        """Begin to copy what the device has computed of a layer. Waits for nothing; a layer is copied once."""
        layer = self._caches.layers.get(name)
        if layer is None or name in self._picked:
            return
        stream = self._caches.stream
        stream.wait_stream(self._caches.device.current_stream())
        with self._caches.device.stream(stream):
            picked = layer.pages.index_select(0, self._blocks[layer.group])
            self._picked[name] = picked.to("cpu", non_blocking=True)  # into pinned memory, where there is a device

    def finish(self) -> None:
        """Begin to copy the layers that were not. Nothing may follow."""
        for name in self._caches.layers:
            self.copy(name)
        self._copied = self._caches.device.Event()
        self._copied.record(self._caches.stream)

    def rows(self) -> list[memoryview]:
        """The rows, when all is copied; on any thread, once."""
        self._copied.synchronize()
        rows = self._caches.rows(self.count)
        for name, layer in self._caches.layers.items():
            rows[:, layer.begin : layer.stop] = _as_bytes(self._picked.pop(name), self.count)
        return [memoryview(row) for row in rows.numpy()]


def _as_bytes(picked: Any, count: int) -> Any:
    import torch  # noqa: PLC0415 - engines bring it

    return picked.contiguous().view(torch.uint8).reshape(count, -1)
