"""What makes KV interchangeable: two engines that differ in any of it never meet in one namespace."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

__all__ = ["Identity", "read_fingerprint", "weights_of"]

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
_SAMPLE = 64 * 1024


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that the bytes of a chunk's KV depend on, besides its tokens."""

    engine: str
    """With its version as far as the layout depends on it, as ``vllm 0.32``."""
    model: str
    weights: str
    """A revision, or what `weights_of` says of a folder."""
    dtype: str
    layout: str
    """Layers, heads, order of the dimensions."""
    chunk_size: int
    """Tokens."""
    ranks: str
    """Parallel coordinates, as ``tp 0/2 pp 0/1``: each rank has its own part of the KV."""
    hashing: str
    """Algorithm and seed of the engine's block hashes."""
    salt: str = ""

    @property
    def fingerprint(self) -> str:
        """All of it in words, for the namespace's descriptor; the salt as a digest, the layout too when it is long."""
        return "; ".join(f"{name}={value}" for name, value in self._parts())

    def namespace(self, prefix: str) -> str:
        """A name that no other identity has: the prefix, the model as far as it can be shown, and a digest."""
        digest = hashlib.sha256(self.fingerprint.encode()).hexdigest()[:12]
        model = re.sub(r"[^A-Za-z0-9.-]+", "-", Path(self.model).name).strip("-.")[:24]
        return "-".join(filter(None, (prefix[:24], model, digest)))

    def _parts(self) -> Iterator[tuple[str, str]]:
        for spec in fields(self):
            value = str(getattr(self, spec.name))
            is_hidden = spec.name == "salt" and value
            yield spec.name, hashlib.sha256(value.encode()).hexdigest()[:16] if is_hidden or len(value) > 80 else value


def read_fingerprint(fingerprint: str) -> dict[str, str]:
    """The parts of an `Identity`'s fingerprint by name; empty for text that no `Identity` wrote."""
    names = [spec.name for spec in fields(Identity)]
    pattern = "; ".join(f"{name}=(?P<{name}>.*)" for name in names)
    found = re.fullmatch(pattern, fingerprint, re.DOTALL)
    return found.groupdict() if found else {}


def weights_of(model: str, revision: str | None = None) -> str:
    """A folder's weights as a digest of names, sizes, beginnings and ends of its files; else the revision given.

    Two fine-tunes of one architecture differ in it. Reads 128 KiB of each file.
    """
    folder = Path(model)
    if not folder.is_dir():
        return revision or "main"
    digest = hashlib.sha256()
    for pattern in ("config.json", *_WEIGHTS):
        for path in sorted(folder.glob(pattern)):
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}\n".encode())
            with path.open("rb") as file:
                digest.update(file.read(_SAMPLE))
                file.seek(max(0, size - _SAMPLE))
                digest.update(file.read(_SAMPLE))
    return digest.hexdigest()[:16]
