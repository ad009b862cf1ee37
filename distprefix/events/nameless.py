"""Blocks that an engine has, but does not say what they depend on: they are nobody's until it does. Pure."""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["Nameless"]


class Nameless:
    """Keys of such blocks, and where each is held. Bounded; the one told of longest ago is forgotten first."""

    def __init__(self, most: int) -> None:
        self.held: OrderedDict[int, int] = OrderedDict()
        """Keys, each with the bits of the groups that hold it."""
        self._most = most

    def add(self, key: int, bit: int) -> None:
        """The block is held there, too."""
        self.held[key] = self.held.pop(key, 0) | bit
        if len(self.held) > self._most:
            self.held.popitem(last=False)

    def remove(self, key: int, bits: int) -> bool:
        """The block is not held there any more. Whether it is one of these."""
        held = self.held.get(key)
        if held is None:
            return False
        if held & ~bits:
            self.held[key] = held & ~bits
        else:
            del self.held[key]
        return True

    def take(self, key: int) -> int:
        """The block has been told of: where it is held, and it is none of these any more."""
        return self.held.pop(key, 0)

    def void(self, bits: int) -> None:
        """Nothing is held there any more."""
        for key in [key for key, held in self.held.items() if held & bits]:
            self.remove(key, bits)

    def clear(self) -> None:
        """Nothing is held anywhere."""
        self.held.clear()
