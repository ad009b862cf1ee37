"""A prompt whose payloads lie in a tier, read through proxies that a test has answer in the servers' place."""

from __future__ import annotations

from typing import Any

from tests.contract.test_failures import wait_until
from tests.contract.test_find import prompt
from tests.contract.test_tree import heads
from tests.payloads import data, loaded, metric, put
from tests.proxy import Answer, Proxy
from tests.servers import Backend, Server

__all__ = ["AT", "LONG", "SHORT", "TOKENS", "Scene"]

TOKENS = prompt(6)
AT = 3
"""The chunk that something is wrong with."""
SHORT, LONG = 400, 3000
"""Bytes of payloads: of one value, and of several small parts."""


class Scene:
    """A prompt whose payloads lie in a tier, and a reader that reaches the servers through proxies."""

    def __init__(self, backend: Backend, tier: str, second: Server, size: int = SHORT, **settings: Any) -> None:
        self.backend = backend
        self.tier = tier
        self.right = data(TOKENS, size)
        common = {"cold_codec": "raw", **settings}
        self.writer, self.server = put(backend, tier, TOKENS, second, size, **common)
        self.tree = Proxy(backend.url or "")
        self.cold = Proxy(second.url)
        self.values = self.cold if tier == "elsewhere" else self.tree
        """The proxy before the payloads' server."""
        where = {"cold_url": self.cold.url} if tier == "elsewhere" else {}
        options = {"strict": False, "payload_timeout_s": 3.0, "publish_timeout_s": 3.0, "breaker_reset_s": 0.05}
        self.reader = backend.open("reader", **{"url": self.tree.url, **where, **common, **options})
        self.options: dict[str, Any] = {"url": backend.url, **where, **common}
        self.before = backend.dump()

    @property
    def chunk(self) -> str:
        """The chunk that something is wrong with."""
        return heads(TOKENS)[AT]

    def key(self, part: int = 0) -> str:
        """The first value of its payload, or a part of it."""
        first = self.backend.keys.payload(self.chunk, cold=self.tier != "warm")
        if not part:
            return first
        (found,) = self.server.scan_iter(match=f"{first}:*:{part}", count=1000)
        return found.decode()

    def answer_reads(self, answer: Answer) -> None:
        """Have reads of that payload's first value answered in the server's place."""
        key = self.key().encode()
        self.values.answer = lambda words, ask: answer(words, ask) if words[:2] == [b"GET", key] else ask()

    def ends_there(self) -> None:
        """The hit ends before that chunk, and the tree stays."""
        assert loaded(self.reader, TOKENS) == self.right[:AT]
        assert self.backend.dump() == self.before
        assert metric(self.reader, "payloads_trimmed") == 0

    def recovers(self) -> None:
        """Once the server is reached again, all is there as before."""
        self.tree.greeting = self.cold.greeting = b""
        for proxy in (self.tree, self.cold):
            proxy.answer = lambda _, ask: ask()
        wait_until(lambda: loaded(self.reader, TOKENS) == self.right)
        assert self.backend.dump() == self.before

    def trims(self) -> None:
        """The hit ends before that chunk, and so does the tree, now and for all."""
        refuted = metric(self.reader, "evidence_refuted")
        assert loaded(self.reader, TOKENS) == self.right[:AT]
        assert metric(self.reader, "payloads_trimmed") >= len(self.right) - AT
        assert metric(self.reader, "evidence_refuted") == refuted
        assert metric(self.reader, "trims_failed") == 0
        other = self.backend.open("other", **self.options)
        assert other.find_stored(TOKENS) == AT
        assert other.store(TOKENS, self.right) == len(self.right)
        assert loaded(other, TOKENS) == self.right

    def failures(self) -> dict[str, int]:
        """Failures of the payloads' server by cause."""
        name = "warm" if self.tier == "warm" else "cold"
        return self.reader.get_metrics()[f"payload_failures_{name}"]

    def close(self) -> None:
        """End the proxies."""
        self.tree.close()
        self.cold.close()
