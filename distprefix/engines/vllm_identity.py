"""What vLLM's KV depends on, read from its configuration."""

# pyright: reportMissingImports=false

from __future__ import annotations

import os
import re
import socket
from typing import Any

from distprefix.engines.identity import Identity, weights_soon
from distprefix.errors import ConfigError

__all__ = ["identities_of", "identity_of", "platform", "process_id_of", "worker_id_of"]


def identities_of(vllm_config: Any, kv_cache_config: Any, chunk_size: int) -> list[Identity]:
    """The identity of every rank, the first rank's first. Raises ConfigError when hashes cannot be shared."""
    parallel = vllm_config.parallel_config
    return [
        identity_of(vllm_config, kv_cache_config, chunk_size, tp, pp)
        for pp in range(parallel.pipeline_parallel_size)
        for tp in range(parallel.tensor_parallel_size)
    ]


def identity_of(vllm_config: Any, kv_cache_config: Any, chunk_size: int, tp: int | None, pp: int | None) -> Identity:
    """One rank's identity; None for all ranks together, whose KV lies in one payload."""
    import vllm  # noqa: PLC0415 - this module is imported without vLLM too, to be looked at

    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    version = ".".join(vllm.__version__.split(".")[:2])
    of = (parallel.tensor_parallel_size, parallel.pipeline_parallel_size)
    return Identity(
        engine=f"vllm {version} on {platform()}",
        model=str(model.model),
        weights=weights_soon(str(model.model), model.revision),
        dtype=f"{str(model.dtype).removeprefix('torch.')}/{vllm_config.cache_config.cache_dtype}",
        layout=_layout_of(kv_cache_config),
        chunk_size=chunk_size,
        ranks=f"tp {'all' if tp is None else tp}/{of[0]} pp {'all' if pp is None else pp}/{of[1]}",
        hashing=_hashing_of(vllm_config),
    )


def platform() -> str:
    """The device; of a CPU what its attention lays KV out for."""
    import torch  # noqa: PLC0415 - vLLM has it
    from vllm.platforms import current_platform  # noqa: PLC0415

    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if current_platform.is_cpu() else "device"


def worker_id_of(vllm_config: Any) -> str:
    """An engine's name, the same in its scheduler and in all its workers, so that their figures are added up.

    It ends in `engine_id` of the kv-transfer-config; of vLLM's own, a random one, in its first digits.
    """
    engine = str(vllm_config.kv_transfer_config.engine_id)
    drawn = re.fullmatch(r"([0-9a-f]{8})-[0-9a-f]{4}-[0-9a-f-]{22}(.*)", engine)
    return _name(f"vllm-{_host()}-{''.join(drawn.groups()) if drawn else engine}")


def process_id_of(part: str) -> str:
    """A name for one part of an engine's process."""
    return _name(f"vllm-{_host()}-{os.getpid()}-{part}")


def _host() -> str:
    return socket.gethostname()[:24]


def _name(text: str) -> str:
    """As names of workers have to be."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", text)[:64]


def _hashing_of(vllm_config: Any) -> str:
    """Algorithm and seed. Raises ConfigError when another process would come to other hashes."""
    algorithm, seed = vllm_config.cache_config.prefix_caching_hash_algo, os.environ.get("PYTHONHASHSEED")
    if not str(algorithm).startswith("sha256") and not (seed or "").isdigit():
        raise ConfigError(
            f"--prefix-caching-hash-algo {algorithm} has another seed in every process, so nothing could ever be "
            "shared: use sha256_cbor, or set PYTHONHASHSEED to the same number everywhere"
        )
    return f"{algorithm} seed {seed or 'default'}"


def _layout_of(kv_cache_config: Any) -> str:
    """Every group's layers and what a block of them is."""
    groups = []
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        parts = [type(spec).__name__, str(spec.page_size_bytes), str(spec.block_size)]
        parts += [
            f"{name} {getattr(spec, name)}" for name in ("num_kv_heads", "head_size", "dtype") if hasattr(spec, name)
        ]
        groups.append(f"{','.join(sorted(group.layer_names))}: {' '.join(parts)}")
    return " | ".join(groups)
