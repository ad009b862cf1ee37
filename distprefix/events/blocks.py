"""A block of an engine, and its place in the tree of blocks. Pure."""

from __future__ import annotations

from collections.abc import Iterator

__all__ = ["EVERY_MEDIUM", "Block"]

EVERY_MEDIUM = (1 << 64) - 1


class Block:
    """What one engine block is: its content as chunk hashes, who is before and behind it, where it is held.

    Sets of media are bit masks. Chunks that end inside a block are its own; one that ends inside a chunk has none.
    """

    __slots__ = (
        "_children",
        "anchor",
        "chunks",
        "covered",
        "depth",
        "extras",
        "held",
        "is_head",
        "key",
        "parent",
        "rest",
        "told",
    )

    def __init__(
        self, key: int, parent: Block | None, chunks: bytes, rest: bytes | None = b"", extras: bytes = b""
    ) -> None:
        self.key = key
        self.parent = parent
        self.chunks = chunks
        self.depth = len(chunks) // 16
        """In chunks, behind this block."""
        self.rest = rest
        """Tokens behind the last full chunk; None when they are not known any more."""
        self.extras = extras
        """What these tokens' content depends on besides."""
        self.anchor: Block | None = None
        """The nearest block above that has chunks, or the root."""
        if parent is not None:
            self.depth += parent.depth
            self.anchor = parent if parent.chunks or parent.parent is None else parent.anchor
        self.held = 0
        """A byte for each medium, in it a bit for each attention group that has the block."""
        self.covered = 0
        """Media that hold this block and all before it."""
        self.told = 0
        """Media of which Redis says so."""
        self.is_head = False
        """Whether a radix node is known to begin with this block."""
        self._children: Block | dict[Block, None] | None = None

    @property
    def last(self) -> bytes:
        """Hash of the last chunk up to here; empty when there is none."""
        block: Block = self
        while not block.chunks and block.anchor is not None:
            block = block.anchor
        return block.chunks[-16:]

    @property
    def spare_bytes(self) -> int:
        """Bytes of tokens and extras that wait for the end of their chunk."""
        return len(self.rest or b"") + len(self.extras)

    @property
    def children(self) -> Iterator[Block]:
        """The blocks right behind this one."""
        if isinstance(self._children, Block):
            yield self._children
        elif self._children is not None:
            yield from tuple(self._children)

    @property
    def is_leaf(self) -> bool:
        """Whether nothing lies behind it."""
        return self._children is None

    def add_child(self, child: Block) -> None:
        """Most blocks have one child: a dictionary for each would take more than all the rest."""
        if self._children is None:
            self._children = child
        elif isinstance(self._children, Block):
            self._children = {self._children: None, child: None}
        else:
            self._children[child] = None

    def drop_child(self, child: Block) -> None:
        """The child is gone."""
        if isinstance(self._children, dict):
            self._children.pop(child, None)
            if not self._children:
                self._children = None
        elif self._children is child:
            self._children = None
