"""What the KV of an offloading tier depends on. vLLM tells tiers less than it tells connectors."""

# pyright: reportMissingImports=false

from __future__ import annotations

from pathlib import Path
from typing import Any

from distprefix.engines.identity import Identity, weights_soon
from distprefix.engines.vllm_identity import platform
from distprefix.errors import ConfigError

__all__ = ["chunk_tokens_of", "tier_identity"]


def chunk_tokens_of(config: Any) -> dict[int, int]:
    """Tokens of a chunk, for each KV cache group. `config`: vLLM's OffloadingConfig."""
    return {group.group_id: group.tokens_per_block * config.cache.blocks_per_chunk for group in config.groups}


def tier_identity(config: Any, group: int, revision: str | None) -> Identity:
    """The identity of one KV cache group; a chunk of it has the KV of all workers in one payload.

    vLLM does not tell the revision of a model: `revision` is what the user says. Raises ConfigError when it is needed.
    """
    import vllm  # noqa: PLC0415 - this module is imported without vLLM too, to be looked at

    parallel = config.parallel
    sizes = f"pcp {parallel.pcp_size} dcp {parallel.dcp_size} of {parallel.world_size}"
    return Identity(
        engine=f"vllm {'.'.join(vllm.__version__.split('.')[:2])} tier on {platform()}",
        model=str(config.model.name),
        weights=_weights_of(str(config.model.name), revision),
        dtype=config.model.dtype,
        layout=_layout_of(config, group),
        chunk_size=chunk_tokens_of(config)[group],
        ranks=f"tp all/{parallel.tp_size} pp all/{parallel.pp_size} {sizes}",
        hashing=f"of {config.cache.tokens_per_hash} tokens",  # another algorithm or seed comes to other hashes
    )


def _layout_of(config: Any, group: int) -> str:
    """A row: which group's, and what lies where in it."""
    groups = [
        f"group {each.group_id}: {each.tokens_per_block} tokens, {','.join(sorted(each.layer_names))}"
        for each in config.groups
    ]
    row = (
        f"{config.worker_kv_bytes_per_block} bytes x {config.cache.blocks_per_chunk}",
        f"{config.kv_cache_layout} {'canonical' if config.canonical_layout else 'direct'}",
        "one copy" if config.replicated_layout else "a copy for each worker",
    )
    return " | ".join((f"group {group}", *row, *groups))


def _weights_of(model: str, revision: str | None) -> str:
    if revision is not None or Path(model).is_dir():
        return weights_soon(model, revision)
    commits = _commits_of(model)
    if len(commits) == 1:
        return commits[0]
    raise ConfigError(
        f"which revision of {model} is it? vLLM does not tell tiers, and Hugging Face's cache has {len(commits)}: "
        'give the tier a "revision", the same as the engine\'s, or have the engine load the model from a folder'
    )


def _commits_of(model: str) -> list[str]:
    """The commits of a model that Hugging Face's cache has here."""
    from huggingface_hub.constants import HF_HUB_CACHE  # noqa: PLC0415 - vLLM has it

    folder = Path(HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "snapshots"
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
