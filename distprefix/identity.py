"""What makes KV interchangeable, as one canonical structure: two caches that differ in any part share nothing. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache

__all__ = ["Identity", "encoded", "join_parts", "parts_of_text"]

_SHOWN = 80
_SECRETS = ("salt", "request_salt")
_SCRYPT_N = 1 << 13
"""About 20 ms for each guess at a salt that a reader of a namespace's name tries."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything that the bytes of a chunk's KV depend on, besides its tokens. Empty parts are unknown, and count.

    A part of more than 80 characters, as a layout may be, is replaced by its digest.
    """

    engine: str = ""
    """With its version as far as the layout depends on it, as ``vllm 0.32``."""
    model: str = ""
    weights: str = ""
    """A revision, or a digest of the files."""
    dtype: str = ""
    layout: str = ""
    """Layers, heads, order of the dimensions."""
    chunk_size: int = 16
    """Tokens."""
    ranks: str = ""
    """Parallel coordinates, as ``tp 0/2 pp 0/1``: each rank has its own part of the KV."""
    hashing: str = ""
    """Algorithm and seed of the engine's block hashes."""
    salt: str = field(default="", repr=False)
    """The tenant's secret."""
    request_salt: str = field(default="", repr=False)
    """A further secret that the tenant chooses for some requests, as LMCache's cache salt."""
    tokenizer: str = ""
    lora: str = ""
    other: str = ""
    """Whatever else the operator says that the KV depends on."""

    def __post_init__(self) -> None:
        for name, value in self._parts():
            if len(value) > _SHOWN:
                object.__setattr__(self, name, "digest " + hashlib.sha256(encoded(value)).hexdigest()[:32])

    @property
    def digest(self) -> bytes:
        """32 bytes that cover every part but the salts, which `salt_parts` has."""
        parts = [encoded(text) for pair in self._parts() for text in pair]
        return hashlib.blake2b(join_parts(b"distprefix identity 1", *parts), digest_size=32).digest()

    @property
    def salts(self) -> bytes:
        """Both salts as one secret value, unambiguously; empty without any."""
        if not self.salt and not self.request_salt:
            return b""
        return join_parts(encoded(self.salt), encoded(self.request_salt))

    @property
    def tenant(self) -> str:
        """What namespaces of one salt have in common, without showing it; empty without a salt."""
        return _tag(encoded(self.salt)) if self.salt else ""

    @property
    def text(self) -> str:
        """The parts that are known as JSON, for the namespace's descriptor; salts are not in it."""
        known = {name: value for name, value in self._parts() if value}
        return json.dumps(known, ensure_ascii=True, separators=(", ", ": "))

    def namespace(self, prefix: str) -> str:
        """A name that no other identity has: the prefix, the model as far as it can be shown, and a digest.

        About 20 ms with a salt that was not seen before: names confirm no cheap guess at it.
        """
        parts = (self.digest, _tag(self.salts).encode()) if self.salts else (self.digest,)
        digest = hashlib.blake2b(join_parts(b"distprefix namespace 1", *parts), digest_size=8).hexdigest()
        model = re.sub(r"[^A-Za-z0-9.-]+", "-", self.model.rstrip("/").rpartition("/")[2]).strip("-.")[:24]
        return "-".join(filter(None, (prefix[:22], model, digest)))

    def _parts(self) -> list[tuple[str, str]]:
        """Names and values of the parts that are no secrets."""
        return [(spec.name, str(getattr(self, spec.name))) for spec in fields(self) if spec.name not in _SECRETS]


def encoded(text: str) -> bytes:
    """A text's bytes, other ones for every other text, also where it has halves of surrogate pairs."""
    return text.encode(errors="surrogatepass")


def parts_of_text(text: str) -> Mapping[str, str]:
    """The parts that `Identity.text` shows, by name; none for what no Identity wrote."""
    try:
        parts: object = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(parts, dict):
        return {}
    return {str(name): value for name, value in parts.items() if isinstance(value, str)}


def join_parts(*parts: bytes) -> bytes:
    """The parts in a row, each after its length: no other parts give the same bytes."""
    return b"".join(len(part).to_bytes(8, "little") + part for part in parts)


@lru_cache(maxsize=4096)
def _tag(secret: bytes) -> str:
    """16 hex digits that equal salts have in common, and that cost a guess some 20 ms (scrypt, RFC 7914)."""
    salt = b"distprefix salt tag 1"
    return hashlib.scrypt(secret, salt=salt, n=_SCRYPT_N, r=8, p=1, maxmem=64 << 20, dklen=8).hex()
