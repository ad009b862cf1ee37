"""KV events as a busy engine would publish them, for benchmarks of who takes them in. Needs msgpack only.

    python benchmarks/event_frames.py FILE BLOCKS [SEED]

writes the payloads to a file, each packed as one msgpack byte string, and `read_frames` gives them back.

The engine is at 64 prompts at a time. A prompt has 20 to 400 blocks of 16 tokens. Half of them begin with one of 16
shared beginnings of 8 to 128 blocks, a quarter continue an earlier prompt and its answer, a fifth part from one midway,
the rest share nothing. Each step takes in up to 128 blocks of prompts, one BlockStored a prompt, and each prompt taken
in has a chance of 1 in 16 to fill a block of its answer of 2 to 60, which is a BlockStored of one block. A step begins
with the removals, one event a block, as vLLM sends them: the prompts that ended first go first, each from its leaf up
to where another needs it, until of all blocks stored so far 3 in 10 are gone. Fields, their order and the hashes are
those of vLLM 0.32.0 with its default, sha256; tokens are of a vocabulary of 128,256.
"""

from __future__ import annotations

import hashlib
import pickle
import random
import sys
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from struct import unpack
from typing import Any, cast

import msgpack

BLOCK_SIZE = 16
_BEGINNINGS = 16
_BUDGET = 128
_RECENT = 512
_REMOVED = 0.3
_RUNNING = 64
_VOCABULARY = 128_256


def frames(blocks: int, seed: int = 1) -> Iterator[bytes]:
    """Payloads that store so many blocks in all and remove 3 in 10; the same for the same seed."""
    engine = _Engine(blocks, seed)
    step = 0
    while (events := engine.step()) or engine.left:
        step += 1
        if events:
            yield _pack([1_700_000_000 + step / 64, events, 0])


def prefill_frames(blocks: int, seed: int = 1, per_event: int = 64) -> Iterator[bytes]:
    """Payloads of an engine that only takes prompts in, `per_event` blocks an event; nothing is removed.

    The hashes are random: to who takes them in they are opaque.
    """
    chance, left, step = random.Random(seed), blocks, 0
    while left > 0:
        parent = None
        for _ in range(chance.randint(1, 8)):
            keys = [chance.getrandbits(64) for _ in range(per_event)]
            stored = {
                "type": "BlockStored",
                "block_hashes": keys,
                "parent_block_hash": parent,
                "token_ids": [chance.randrange(_VOCABULARY) for _ in range(per_event * BLOCK_SIZE)],
                "block_size": BLOCK_SIZE,
                "lora_id": None,
                "medium": "GPU",
                "lora_name": None,
                "extra_keys": [None] * per_event,
                "group_idx": 0,
                "kv_cache_spec_kind": "full_attention",
            }
            step += 1
            left -= per_event
            parent = keys[-1]
            yield _pack([1_700_000_000 + step / 64, [stored], 0])


def read_frames(path: Path) -> Iterator[bytes]:
    """What the file holds."""
    with path.open("rb") as file:
        yield from msgpack.Unpacker(file, max_buffer_size=0)


def _pack(value: object) -> bytes:
    return cast(bytes, msgpack.packb(value))


def _digest(value: object) -> bytes:
    return hashlib.sha256(pickle.dumps(value, protocol=5)).digest()


_ROOT = _digest("vllm-none-hash")


class _Block:
    __slots__ = ("children", "digest", "key", "live")

    def __init__(self, digest: bytes) -> None:
        self.digest = digest
        self.key = int.from_bytes(digest[-8:], "big")
        self.live = True
        self.children = 0


class _Prompt:
    """The blocks of a prompt and its answer so far, and how many they will be."""

    def __init__(self, path: list[_Block], asked: int, answered: int) -> None:
        self.path = path
        self.asked = asked
        self.whole = asked + answered


class _Engine:
    def __init__(self, blocks: int, seed: int) -> None:
        self.left = blocks
        self._random = random.Random(seed)
        self._beginnings: list[list[_Block]] = []
        self._taking: _Prompt | None = None
        self._answering: list[_Prompt] = []
        self._ended: deque[_Prompt] = deque()
        self._recent: deque[_Prompt] = deque(maxlen=_RECENT)
        self._stored = self._removed = 0

    def step(self) -> list[dict[str, Any]]:
        """The events of one step; none when all is done."""
        events = [*self._evict()]
        budget = _BUDGET
        while budget and self.left and (self._taking or len(self._answering) < _RUNNING):
            prompt = self._taking = self._taking or self._begin()
            count = min(budget, prompt.asked - len(prompt.path), self.left)
            events.append(self._store(prompt.path, count))
            budget -= count
            if len(prompt.path) == prompt.asked:
                if prompt.whole == prompt.asked:
                    prompt.path[-1].children += 1  # a beginning stays
                else:
                    self._answering.append(prompt)
                self._taking = None
        going: list[_Prompt] = []
        for prompt in self._answering:
            if self.left and self._random.random() < 1 / 16:
                events.append(self._store(prompt.path, 1))
            if len(prompt.path) < prompt.whole:
                going.append(prompt)
            else:
                self._ended.append(prompt)
                self._recent.append(prompt)
        self._answering = going
        return events

    def _begin(self) -> _Prompt:
        """A prompt with what it shares; it is to store a block at once, so that nothing of that goes."""
        rng = self._random
        asked, answered, chance = rng.randint(20, 400), rng.randint(2, 60), rng.random()
        if len(self._beginnings) < _BEGINNINGS:
            beginning: list[_Block] = []
            self._beginnings.append(beginning)
            return _Prompt(beginning, 8 * len(self._beginnings), 0)
        shared: list[_Block] = []
        if chance < 0.5:
            shared = rng.choice(self._beginnings)
        elif chance < 0.95 and self._recent:
            shared = rng.choice(self._recent).path
            while shared and not shared[-1].live:
                shared.pop()
            if chance > 0.75:
                shared = shared[: rng.randint(0, len(shared))]
        return _Prompt(shared[: asked - 1], asked, answered)

    def _store(self, path: list[_Block], count: int) -> dict[str, Any]:
        """Append new blocks to the path."""
        numbers = unpack(f"<{count * BLOCK_SIZE}I", self._random.randbytes(count * BLOCK_SIZE * 4))
        tokens = [number % _VOCABULARY for number in numbers]
        parent = path[-1].key if path else None
        digest = path[-1].digest if path else _ROOT
        if path:
            path[-1].children += 1
        new: list[_Block] = []
        for start in range(0, len(tokens), BLOCK_SIZE):
            digest = _digest((digest, tuple(tokens[start : start + BLOCK_SIZE]), None))
            new.append(_Block(digest))
            new[-1].children = 1
        new[-1].children = 0
        path += new
        self._stored += count
        self.left -= count
        return {
            "type": "BlockStored",
            "block_hashes": [block.key for block in new],
            "parent_block_hash": parent,
            "token_ids": tokens,
            "block_size": BLOCK_SIZE,
            "lora_id": None,
            "medium": "GPU",
            "lora_name": None,
            "extra_keys": [None] * count,
            "group_idx": 0,
            "kv_cache_spec_kind": "full_attention",
        }

    def _evict(self) -> Iterator[dict[str, Any]]:
        while self._removed < int(self._stored * _REMOVED) and self._ended:
            path = self._ended[0].path
            if path and not path[-1].children:
                block = path.pop()
                block.live = False
                if path:
                    path[-1].children -= 1
                self._removed += 1
                yield {"type": "BlockRemoved", "block_hashes": [block.key], "medium": "GPU", "group_idx": 0}
            else:
                self._ended.popleft()


def main(path: Path, blocks: int, seed: int = 1) -> None:
    """Write a file of them."""
    with path.open("wb") as file:
        for frame in frames(blocks, seed):
            file.write(_pack(frame))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
