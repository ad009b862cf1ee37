"""Blocks that an engine has, but does not say what they depend on: they are nobody's until it does. Pure."""

from __future__ import annotations

from collections import OrderedDict

__all__ = ["Nameless"]


class Nameless:
    """Keys of such blocks, and where each is held. Bounded; the one told of longest ago is forgotten first."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held: OrderedDict[int, int] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: object) -> bool:
        return key in self._held

    def add(self, key: int, bit: int) -> None:
        """The block is held there, too."""
        self._held[key] = self._held.pop(key, 0) | bit
        if len(self._held) > self._most:
            self._held.popitem(last=False)

    def remove(self, key: int, bits: int) -> bool:
        """The block is not held there any more. Whether it is one of these."""
        held = self._held.get(key)
        if held is None:
            return False
        if held & ~bits:
            self._held[key] = held & ~bits
        else:
            del self._held[key]
        return True

    def take(self, key: int) -> int:
        """The block has been told of: where it is held, and it is none of these any more."""
        return self._held.pop(key, 0)

    def void(self, bits: int) -> None:
        """Nothing is held there any more."""
        for key in [key for key, held in self._held.items() if held & bits]:
            self.remove(key, bits)

    def clear(self) -> None:
        """Nothing is held anywhere."""
        self._held.clear()
