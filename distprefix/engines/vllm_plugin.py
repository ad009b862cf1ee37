"""Makes the names of our plug-ins known to vLLM, which calls this in each of its processes."""

# pyright: reportMissingImports=false

from __future__ import annotations

import logging

__all__ = ["CONNECTOR", "TIER", "TIERING_SPEC", "log_as_vllm", "register"]

CONNECTOR, TIER, TIERING_SPEC = "DistPrefixConnector", "distprefix", "DistPrefixTieringSpec"


def register() -> None:
    """Register the connector, the tier and the tiering spec that also runs on CPUs. May be called again."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415 - vLLM is there

    if CONNECTOR not in KVConnectorFactory._registry:  # noqa: SLF001 - registering twice raises
        KVConnectorFactory.register_connector(CONNECTOR, "distprefix.engines.vllm_connector", CONNECTOR)
    _register_tier()


def log_as_vllm() -> None:
    """Have our messages appear in vLLM's log, unless logging is configured for them. vLLM's logging has to be."""
    ours = logging.getLogger("distprefix")
    theirs = logging.getLogger("vllm")
    if ours.handlers or ours.level != logging.NOTSET or not theirs.handlers:
        return
    for handler in theirs.handlers:
        ours.addHandler(handler)
    ours.setLevel(theirs.level)
    ours.propagate = theirs.propagate


def _register_tier() -> None:
    """Does nothing in a vLLM that has no tiers."""
    try:
        from vllm.v1.kv_offload.factory import OffloadingSpecFactory  # noqa: PLC0415
        from vllm.v1.kv_offload.tiering.factory import SecondaryTierFactory  # noqa: PLC0415
    except ImportError:
        return
    if TIERING_SPEC not in OffloadingSpecFactory._registry:  # noqa: SLF001 - registering twice raises
        OffloadingSpecFactory.register_spec(TIERING_SPEC, "distprefix.engines.vllm_cpu_spec", TIERING_SPEC)
    if TIER not in SecondaryTierFactory._registry:  # noqa: SLF001
        SecondaryTierFactory.register_tier(TIER, "distprefix.engines.vllm_tier", "DistPrefixTier")
