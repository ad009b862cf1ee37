"""What the tests of engines that share KV have in common: prompts, and what lies in Redis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.engines.process import EngineProcess
from tests.fake_engine import until
from tests.servers import Server

__all__ = ["BLOCK", "BLOCKS", "Open", "calls", "have", "outputs", "payloads", "prompt"]

BLOCK = 32
BLOCKS = 257
"""Of an engine; one is vLLM's own."""

Open = Callable[..., EngineProcess]


def prompt(number: int, blocks: int, more: int = 0) -> list[int]:
    """A prompt that begins as no other one does."""
    return [3 + (7 * i + 31 * number) % 251 if i else 3 + number for i in range(BLOCK * blocks + more)]


def payloads(server: Server) -> list[bytes]:
    """Keys of what is in Redis to stay."""
    client = server.client()
    return [key for key in client.scan_iter(match="dp:*kv:*", count=1000) if b"}:kv:" in key and client.ttl(key) == -1]


def have(server: Server, blocks: int) -> None:
    """Wait until so many blocks are stored, and no more."""
    until(lambda: len(payloads(server)) >= blocks, 30)
    assert len(payloads(server)) == blocks


def calls(server: Server) -> int:
    """How many scripts it has run that only read: what is stored."""
    found: Any = server.client().info("commandstats")
    return int(found.get("cmdstat_evalsha_ro", {}).get("calls", 0))


def outputs(engine: EngineProcess, prompts: list[list[int]], **what: Any) -> list[list[int]]:
    """What an engine answers."""
    return engine.order("generate", prompts=prompts, **what)["outputs"]
