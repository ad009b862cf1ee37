"""Print the chains that our connector and our tier make of one prompt with adapters, images and salts, as JSON.

Run by the Python of the environment that install_vllm.sh makes: nothing runs but vLLM's own hashing.
"""

# pyright: basic, reportMissingImports=false
from __future__ import annotations

import json
from typing import Any

from vllm.lora.request import LoRARequest
from vllm.multimodal.inputs import MultiModalFeatureSpec, PlaceholderRange
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256_cbor
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_offload.base import make_offload_key
from vllm.v1.request import Request

from distprefix.engines.chains import KeyChains
from distprefix.engines.vllm_scheduler import _chain

BLOCK, BLOCKS = 16, 6
IMAGE = PlaceholderRange(offset=2 * BLOCK + 3, length=BLOCK)
"""Begins in the third block."""


def image(identifier: str) -> list[Any]:
    """A prompt's images: one."""
    return [MultiModalFeatureSpec(data=None, modality="image", identifier=identifier, mm_position=IMAGE)]


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain again": {},
    "adapter a": {"lora_request": LoRARequest("a", 1, "/adapters/1")},
    "adapter b": {"lora_request": LoRARequest("b", 1, "/adapters/1")},
    "adapter a elsewhere": {"lora_request": LoRARequest("a", 1, "/adapters/2")},
    "salt 1": {"cache_salt": "1"},
    "salt 2": {"cache_salt": "2"},
    "image x": {"mm_features": image("x")},
    "image y": {"mm_features": image("y")},
    "image x, salt 1": {"mm_features": image("x"), "cache_salt": "1"},
}


def main() -> None:
    """Everything."""
    init_none_hash(sha256_cbor)
    hasher = get_request_block_hasher(BLOCK, sha256_cbor)
    chains: dict[str, list[str]] = {}
    for kind, more in KINDS.items():
        request = Request(kind, [*range(BLOCK * BLOCKS)], SamplingParams(), None, block_hasher=hasher, **more)
        chain = _chain(request, BLOCKS)
        keys = KeyChains({0: BLOCK})
        keys.learn({make_offload_key(each, 0): BLOCK * (i + 1) for i, each in enumerate(request.block_hashes)})
        assert keys.chain(0, BLOCKS) == chain  # the tier's is the same
        chains[kind] = [chain[at : at + 16].hex() for at in range(0, len(chain), 16)]
    print("RESULT", json.dumps(chains))  # noqa: T201


if __name__ == "__main__":
    main()
