"""Makes the names of our plug-ins known to vLLM, which calls this in each of its processes."""

# pyright: reportMissingImports=false

from __future__ import annotations

__all__ = ["CONNECTOR", "TIER", "TIERING_SPEC", "register"]

CONNECTOR, TIER, TIERING_SPEC = "DistPrefixConnector", "distprefix", "DistPrefixTieringSpec"


def register() -> None:
    """Register the connector, the tier and the tiering spec that also runs on CPUs. May be called again."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory  # noqa: PLC0415 - vLLM is there

    if CONNECTOR not in KVConnectorFactory._registry:  # noqa: SLF001 - registering twice raises
        KVConnectorFactory.register_connector(CONNECTOR, "distprefix.engines.vllm_connector", CONNECTOR)
