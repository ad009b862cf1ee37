"""The hash by which SGLang names the first block of a plain prompt. Pure.

The rule is ``get_hash_str`` and ``hash_str_to_int64`` of SGLang's ``mem_cache`` (0.5.23; the captured frames agree):
SHA-256 of the digest of the block before, if any, and the tokens as little-endian uint32; events carry the first
8 bytes, big-endian. With EAGLE a pair stands for each token: itself and the one that follows it. A cache salt, and
with the format "dynamo" a LoRA, changes the hash of the first block. With the format "default" a LoRA changes nothing:
its blocks cannot be told from those of the plain model.
"""

from __future__ import annotations

import hashlib

__all__ = ["first_hash"]


def first_hash(tokens: bytes, block_size: int) -> int:
    """Key of the first block of `tokens` (little-endian uint32) where nothing but tokens matters.

    Of pairs, `tokens` has both tokens of each, and `block_size` is twice as large.
    """
    return int.from_bytes(hashlib.sha256(tokens[: 4 * block_size]).digest()[:8], "big")
