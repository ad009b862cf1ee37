"""What names the chunks of a namespace for one process, and what is to be done when that changes."""

from __future__ import annotations

import logging
from collections.abc import Callable

from distprefix.hashing import ChunkHasher

__all__ = ["Naming"]

_log = logging.getLogger("distprefix")


class Naming:
    """The hasher in use. Nothing names chunks before the first `take`."""

    def __init__(self, namespace: str) -> None:
        self.hasher = ChunkHasher("blake2b", bytes(32))
        self.secret = b""
        """The namespace's random secret; empty where it is configured, and before the first `take`."""
        self.rekeyed = 0
        """How often the namespace was made anew with another secret: its chunks have other names since."""
        self.on_rekey: Callable[[], object] = lambda: None
        """Called each time, when `hasher` is the new one."""
        self._namespace = namespace
        self._has_begun = False

    def take(self, hasher: ChunkHasher, secret: bytes) -> None:
        """Name chunks by this from now on."""
        had = self.hasher if self._has_begun else None
        self._has_begun = True
        self.secret = secret
        self.hasher = hasher
        if had is None:
            _warn_of(hasher.algorithm)
        elif had.check != hasher.check:
            self.rekeyed += 1
            _log.warning(
                "namespace %s was made anew by another process, with another secret: what this one knows under the "
                "old names is forgotten",
                self._namespace,
            )
            self.on_rekey()


def _warn_of(algorithm: str) -> None:
    if algorithm == "xxh3_128":
        _log.warning(
            "hash_algorithm xxh3_128 is no cryptographic hash: who chooses prompts can forge chunks of others in "
            "minutes. Keep it for namespaces all of whose tenants are trusted; blake2b is the default"
        )
