"""What a worker holds after some frames, as simply as it can be said: the reference for the corpus."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterator
from itertools import takewhile
from typing import Any, NamedTuple

from distprefix.chunking import pack_extra
from distprefix.events.decode import decode
from distprefix.events.frames import Cleared, Removed, Stored

_FULL = ("full_attention", "mla_attention", "sink_full_attention")


class _Block(NamedTuple):
    parent: int | None
    tokens: bytes
    extra: bytes


class Model:
    """One rank of one worker: which blocks there are, and in which medium and group each is held."""

    def __init__(self, engine: str = "auto", *, is_plain: bool = False) -> None:
        self.engine = engine
        self.is_plain = is_plain
        self.sizes: dict[tuple[str, int], int] = {}
        self.blocks: dict[int, _Block] = {}
        self.held: defaultdict[str, defaultdict[int, set[int]]] = defaultdict(lambda: defaultdict(set))

    def forget(self) -> None:
        """Nothing is held, and nothing is known."""
        self.blocks.clear()
        self.held.clear()

    def apply(self, payload: bytes) -> None:
        """What one message tells."""
        for event in decode(payload, engine=self.engine, is_plain=self.is_plain).events:
            match event:
                case Stored():
                    self._store(event)
                case Removed():
                    self.held[event.medium].get(event.group, set()).difference_update(event.keys)
                case Cleared(str(medium)):
                    self.held.pop(medium, None)
                case Cleared():
                    self.forget()

    def _store(self, event: Stored) -> None:
        if event.kind not in _FULL:
            return
        size = 4 * event.block_size
        if event.tokens:
            if len(event.tokens) != size * len(event.keys):
                return
            largest = self.sizes.setdefault((event.medium, event.group), size)
            if size < largest:
                return
            if size > largest:
                self.sizes[event.medium, event.group] = size
                self.held.pop(event.medium, None)
        if event.tokens and event.is_told:
            parent = event.parent if event.parent in self.blocks else event.parent or None
            for i, key in enumerate(event.keys):
                extra = event.extras[i] if event.extras else b""
                self.blocks[key] = _Block(parent, event.tokens[i * size : (i + 1) * size], extra)
                parent = key
        known = event.keys if event.tokens else [key for key in event.keys if key in self.blocks]
        self.held[event.medium][event.group].update(known)

    def find(self, query: dict[str, Any], chunk_size: int) -> dict[str, int]:
        """Leading full chunks of a query by medium, where there are any."""
        tokens = array("I", query["tokens"]).tobytes()
        first = pack_extra("lora", query["lora_name"]) if query["lora_name"] else b""
        first += pack_extra("salt", query["cache_salt"]) if query["cache_salt"] else b""
        found: dict[str, int] = {}
        for medium, groups in self.held.items():
            keys: set[int] = set.intersection(*groups.values()) if groups else set()
            if chunks := max(self._ends(keys, None, tokens, 0, first)) // (4 * chunk_size):
                found[medium] = chunks
        return found

    def _ends(self, keys: set[int], parent: int | None, tokens: bytes, start: int, extra: bytes) -> Iterator[int]:
        """Where the runs of blocks that agree with the tokens end; the last one may do so in part."""
        yield start
        for key in keys & self.blocks.keys():
            block = self.blocks[key]
            if block.parent == parent and block.extra == extra:
                pairs = zip(block.tokens, tokens[start:], strict=False)
                end = start + sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
                yield end
                if end == start + len(block.tokens):
                    yield from self._ends(keys, key, tokens, end, b"")


def run(case: dict[str, Any]) -> list[dict[str, int]]:
    """The answers to the queries of a case."""
    model = Model(case["engine"]["format"], is_plain=case["engine"].get("plain", False))
    replay = {frame["seq"]: frame for frame in case.get("replay") or ()}
    following, last = 0, None
    for frame in case["frames"]:
        seq = frame["seq"]
        if frame == last:
            continue
        if seq < following:  # the engine has started anew
            model.forget()
            following = 0
        for missing in range(following, seq):
            if missing in replay:
                model.apply(bytes.fromhex(replay[missing]["payload_hex"]))
            else:
                model.forget()
        model.apply(bytes.fromhex(frame["payload_hex"]))
        following, last = seq + 1, frame
    return [model.find(query, case["chunk_size"]) for query in case["queries"]]
