"""Makes the cases of the corpus: ``python tests/conformance/make.py`` writes one JSON file each beside itself."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import msgpack

FOLDER = Path(__file__).parent
_SIZE = 16
_TIME = 1_700_000_000.5
_FIELDS = [
    "block_hashes",
    "parent_block_hash",
    "token_ids",
    "block_size",
    "lora_id",
    "medium",
    "lora_name",
    "extra_keys",
    "group_idx",
    "kv_cache_spec_kind",
    "kv_cache_spec_sliding_window",
]
Event = dict[str, Any] | list[Any]
CLEARED = {"type": "AllBlocksCleared"}


def tokens(start: int, blocks: int, size: int = _SIZE) -> list[int]:
    """Consecutive token ids."""
    return list(range(start, start + blocks * size))


A, B, C = tokens(1000, 4), tokens(2000, 4), tokens(3000, 4)


def stored(hashes: Sequence[Any], ids: list[int], parent: Any = None, **more: Any) -> dict[str, Any]:
    """BlockStored as vLLM sends it since 0.24."""
    event = {
        "type": "BlockStored",
        "block_hashes": list(hashes),
        "parent_block_hash": parent,
        "token_ids": ids,
        "block_size": _SIZE,
        "lora_id": None,
        "medium": "GPU",
        "lora_name": None,
        "extra_keys": [None] * len(hashes),
        "group_idx": 0,
        "kv_cache_spec_kind": "full_attention",
    }
    return event | more


def removed(*hashes: Any, medium: Any = "GPU", **more: Any) -> dict[str, Any]:
    """BlockRemoved as vLLM sends it since 0.24."""
    return {"type": "BlockRemoved", "block_hashes": list(hashes), "medium": medium, "group_idx": 0} | more


def placeholder(*hashes: Any, medium: str = "CPU") -> dict[str, Any]:
    """What vLLM's offloading tells: hashes only."""
    event = stored(hashes, [], block_size=0, medium=medium)
    for name in ("extra_keys", "group_idx", "kv_cache_spec_kind"):
        del event[name]
    return event


def window(hashes: Sequence[int], ids: list[int], parent: Any = None, group: int = 1) -> dict[str, Any]:
    """BlockStored of a group with a sliding window."""
    kind = {"kv_cache_spec_kind": "sliding_window", "kv_cache_spec_sliding_window": 32}
    return stored(hashes, ids, parent, group_idx=group, **kind)


def array(event: dict[str, Any], length: int) -> list[Any]:
    """An event as engines sent it before: its tag and the first `length` fields."""
    names = _FIELDS if event["type"] == "BlockStored" else ["block_hashes", "medium", "group_idx"]
    return [event["type"], *[event.get(name) for name in names[:length]]]


def sglang(ids: list[int], seed: bytes = b"", **more: Any) -> dict[str, Any]:
    """BlockStored of a prompt as SGLang 0.5.23 sends it: signed hashes of its own rule."""
    hashes = sglang_hashes(ids, seed)
    return {
        "type": "BlockStored",
        "block_hashes": hashes,
        "parent_block_hash": None,
        "token_ids": ids,
        "block_size": _SIZE,
        "lora_id": None,
        "medium": "GPU",
    } | more


def sglang_hashes(ids: Sequence[int | list[int]], seed: bytes = b"") -> list[int]:
    """First 8 bytes of chained SHA-256, as signed integers; of tokens, or of EAGLE's pairs."""
    hashes: list[int] = []
    for start in range(0, len(ids), _SIZE):
        block = [each if isinstance(each, list) else [each] for each in ids[start : start + _SIZE]]
        words = [word for each in block for word in each]
        seed = hashlib.sha256(seed + struct.pack(f"<{len(words)}I", *words)).digest()
        hashes.append(int.from_bytes(seed[:8], "big", signed=True))
    return hashes


def ask(ids: list[int], lora: str | None = None, salt: str | None = None, **holders: int) -> dict[str, Any]:
    """A query and what it must find."""
    return {"tokens": ids, "lora_name": lora, "cache_salt": salt, "holders": holders}


def frame(seq: int, *events: Event, head: Sequence[Any] = (_TIME,), tail: Sequence[Any] = (0,)) -> dict[str, Any]:
    """One message."""
    return {"seq": seq, "payload_hex": cast("bytes", msgpack.packb([*head, list(events), *tail])).hex()}


def case(
    name: str,
    why: str,
    frames: list[Any],
    queries: list[dict[str, Any]],
    engine: str = "vllm",
    chunk_size: int = _SIZE,
    *,
    is_plain: bool = False,
    replay: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """One file; frames that are only lists of events are numbered from 0."""
    made = [frame(i, *item) if isinstance(item, list) else item for i, item in enumerate(frames)]
    sender = {"format": engine} | ({"plain": True} if is_plain else {})
    case = {"name": name, "why": why, "engine": sender, "chunk_size": chunk_size, "frames": made}
    return case | ({"replay": replay} if replay is not None else {}) | {"queries": queries}


def shapes() -> Iterator[dict[str, Any]]:
    """The same facts in every shape that engines have sent."""
    first, second = stored([1, 2], A[:32]), stored([3], A[32:48], 2)
    yield case(
        "maps",
        "Events are maps with a type, as vLLM sends them since 0.24.",
        [[first], [second]],
        [ask(A, gpu=3), ask(A[:40], gpu=2), ask(B)],
    )
    ids = tokens(1000, len(_FIELDS) - 3)
    chain = [
        array(stored([n + 1], ids[n * _SIZE : (n + 1) * _SIZE], n or None), 4 + n) for n in range(len(_FIELDS) - 3)
    ]
    yield case(
        "arrays",
        "Events are arrays of a tag and 4 to 11 fields: older engines send fewer.",
        [
            [array(stored([9], B[:16]), 5)],
            [["AllBlocksCleared"], *chain[:2]],
            chain[2:],
            [array(removed(n), n - 5) for n in (6, 7, 8)],
        ],
        [ask(ids, gpu=5), ask(B)],
        is_plain=True,
    )
    yield case(
        "two-element-batch",
        "A batch without a rank is a batch, and so is one with elements that nobody knows yet.",
        [frame(0, first, tail=()), frame(1, second, tail=(0, "more", [1]))],
        [ask(A, gpu=3)],
    )
    by_bytes = {key.encode(): value for key, value in first.items()} | {b"type": b"BlockStored"}
    yield case("bytes-names", "The names of fields and types may be binary.", [[by_bytes]], [ask(A, gpu=2)])
    yield case(
        "unknown-types-and-fields",
        "What is not known is passed over, and what stands beside it counts.",
        [[{"type": "BlockMoved", "block_hashes": [1]}, ["Later", 1], first | {"locality": "LOCAL", "new": {"a": [1]}}]],
        [ask(A, gpu=2)],
    )
    yield case(
        "missing-fields",
        "A map may lack every field that has a default.",
        [[{name: first[name] for name in ("type", *_FIELDS[:4])}], [{"type": "BlockRemoved", "block_hashes": [2]}]],
        [ask(A, gpu=1)],
        is_plain=True,
    )
    yield case(
        "malformed-events",
        "An event that makes no sense is left out; the others of its batch count.",
        [[stored([9], B[:16], "parent"), stored([True], B[:16]), stored([8], [-1] * 16), first, "BlockStored", []]],
        [ask(A, gpu=2), ask(B)],
    )

    by_name = {"ts": _TIME, "events": [first], "data_parallel_rank": 0}
    yield case(
        "batch-as-map",
        "A batch may be a map of its parts.",
        [{"seq": 0, "payload_hex": cast("bytes", msgpack.packb(by_name)).hex()}, [second]],
        [ask(A, gpu=3)],
    )
    envelope = {"event_id": 1, "event_type": "stored", "model_name": "m", "block_size": _SIZE, "tenant_id": "default"}
    envelope |= {"backend_id": "w", "medium": "gpu", "dp_rank": 0, "additional_salt": None, "base_block_idx": 0}
    gone = {"event_type": "removed", "medium": "gpu", "seq_hashes": [3]}
    yield case(
        "rfc-1527-envelope",
        "Mooncake's envelope has other names for the same things, and a salt or nil in each event.",
        [
            [envelope | {"seq_hashes": [1, 2, 3], "parent_hash": None, "token_ids": A[:48]}],
            [envelope | {"seq_hashes": [11], "parent_hash": None, "token_ids": B[:16], "additional_salt": "s"}],
            [gone],
        ],
        [ask(A, gpu=2), ask(B, salt="s", gpu=1), ask(B)],
    )


def hashes() -> Iterator[dict[str, Any]]:
    """What names a block."""
    yield case(
        "signed-meets-unsigned",
        "-1 and 2^64-1 name the same block: some senders have signed hashes, some unsigned.",
        [[stored([-1], A[:16])], [stored([5, -2], A[16:48], 2**64 - 1)], [removed(2**64 - 2)]],
        [ask(A, gpu=2)],
    )
    whole = [hashlib.sha256(b"%d" % i).digest() for i in range(3)]
    yield case(
        "bytes-hashes",
        "Hashes may be binary, 32 bytes long.",
        [[stored(whole, A[:48])], [removed(whole[2])]],
        [ask(A, gpu=2)],
    )
    yield case(
        "bytes-meet-numbers",
        "A number names the block whose binary hash ends in it, big-endian.",
        [[stored(whole[:2], A[:32])], [stored([9], A[32:48], int.from_bytes(whole[1][-8:], "big"))]],
        [ask(A, gpu=3)],
    )
    ids = sglang_hashes(A)
    yield case(
        "sglang-plain",
        "SGLang's hashes are signed, and its maps lack what is at its default.",
        [[CLEARED, sglang(A)], [{"type": "BlockRemoved", "block_hashes": ids[3:], "medium": "GPU"}]],
        [ask(A, gpu=3)],
        "sglang",
    )


def contents() -> Iterator[dict[str, Any]]:
    """Equal tokens that are not equal blocks."""
    salted = stored([11, 12], A[:32], extra_keys=[["tenant-1"], None])
    yield case(
        "salted-and-plain",
        "The same tokens with a cache salt and without are different blocks; the salt is told in the first block only.",
        [[salted], [stored([1], A[:16])]],
        [ask(A, salt="tenant-1", gpu=2), ask(A, gpu=1), ask(A, salt="tenant-2")],
    )
    tuned = stored([21, 22], A[:32], lora_id=1, lora_name="tuned", extra_keys=[["tuned"], ["tuned"]])
    yield case(
        "lora",
        "The blocks of a LoRA are its own; its name stands first among each block's extra keys.",
        [
            [tuned],
            [stored([23], A[32:48], 22, lora_id=1, lora_name="tuned", extra_keys=[["tuned"]])],
            [stored([1], A[:16])],
        ],
        [ask(A, "tuned", gpu=3), ask(A, gpu=1), ask(A, "other")],
    )
    yield case(
        "lora-and-salt",
        "LoRA and salt both count, and a salt that is called like the LoRA is still a salt.",
        [[tuned | {"extra_keys": [["tuned", "tuned"], ["tuned"]]}], [tuned | {"block_hashes": [31, 32]}]],
        [ask(A, "tuned", "tuned", gpu=2), ask(A, "tuned", gpu=2), ask(A, salt="tuned"), ask(A)],
    )
    image = stored([41, 42, 43], A[:48], extra_keys=[None, [["image-1", 3]], [["image-1", -13]]])
    yield case(
        "multimodal",
        "Blocks that an image reaches into are not those of the bare placeholder tokens.",
        [[image]],
        [ask(A, gpu=1)],
    )
    yield case(
        "sglang-salt",
        "SGLang tells the salt in a field of its own.",
        [
            [sglang(A, hashlib.sha256(b"sglang-cache-salt-v1\0tenant-1").digest(), cache_salt="tenant-1")],
            [sglang(A[:16])],
        ],
        [ask(A, salt="tenant-1", gpu=4), ask(A, gpu=1)],
        "sglang",
    )
    pairs = [[token, token + 1] for token in A]
    names = sglang_hashes(pairs)
    yield case(
        "sglang-eagle",
        "With EAGLE SGLang tells each token with the one that follows it, and hashes both.",
        [[sglang(A) | {"block_hashes": names, "token_ids": pairs}, sglang(B) | {"block_hashes": [*names[:3], 9]}]],
        [ask(A, gpu=4), ask(B)],
        "sglang",
    )
    yield case(
        "sglang-hash-of-something-else",
        "A first block whose hash is not that of its tokens is of a LoRA that is not told: nobody is said to have it.",
        [[sglang(A, b"namespace"), sglang(B)]],
        [ask(A), ask(B, gpu=4)],
        "sglang",
    )

    unsaid = {name: value for name, value in stored([51, 52], C[:32]).items() if name != "extra_keys"}
    yield case(
        "untold",
        "What an event does not say of its blocks may be a salt or an image: nobody has them, nor what follows.",
        [[array(stored([1, 2], A[:32]), 7), stored([3], A[32:48], 2), unsaid], [removed(52)]],
        [ask(A), ask(C)],
    )
    yield case(
        "untold-of-a-plain-fleet",
        "An operator may say that what is not told is nothing.",
        [[array(stored([1, 2], A[:32]), 7), stored([3], A[32:48], 2), unsaid], [removed(52)]],
        [ask(A, gpu=3), ask(C, gpu=1)],
        is_plain=True,
    )
    moved = [name for name in unsaid if name not in ("block_hashes", "token_ids", "medium")]
    offloaded = {name: unsaid[name] for name in moved} | {"medium": "CPU"}
    yield case(
        "untold-of-another-medium",
        "Blocks offloaded with bare tokens are those that the GPU tells of by the same hashes, before or after.",
        [
            [salted, offloaded | {"block_hashes": [11, 12], "token_ids": A[:32]}],
            [offloaded | {"block_hashes": [61, 62], "token_ids": B[:32]}],
            [stored([61, 62], B[:32], extra_keys=[["tenant-2"], None])],
            [offloaded | {"block_hashes": [71], "token_ids": C[:16]}],
        ],
        [
            ask(A),
            ask(A, salt="tenant-1", gpu=2, cpu=2),
            ask(B),
            ask(B, salt="tenant-2", gpu=2, cpu=2),
            ask(C),
        ],
    )


def media() -> Iterator[dict[str, Any]]:
    """Where blocks are."""
    yield case(
        "medium-cpu",
        "Each medium has its own blocks; no medium means the GPU.",
        [[stored([1, 2], A[:32], medium="CPU"), stored([1], A[:16], medium=None)], [removed(2, medium="CPU")]],
        [ask(A, gpu=1, cpu=1)],
    )
    yield case(
        "offload-placeholder",
        "Offloading names blocks without tokens: they are those told before.",
        [[stored([1, 2, 3], A[:48])], [placeholder(1), placeholder(2)], [removed(3), removed(2), removed(1)]],
        [ask(A, cpu=2)],
    )

    both = [stored([1, 2], A[:32]), stored([1, 2], A[:32], medium="CPU")]
    yield case(
        "clear-of-one-medium",
        "A clear that names a medium leaves the others, be it of a kind that nobody knows.",
        [both, [{"type": "TierBlocksCleared", "medium": "GPU"}], [stored([11], B[:16])]],
        [ask(A, cpu=2), ask(B, gpu=1)],
    )
    yield case(
        "removal-that-cannot-be-read",
        "Of a removal that makes no sense nobody knows what it took: the medium that it names holds nothing.",
        [both, [removed(7) | {"group_idx": -1}, stored([11], B[:16])]],
        [ask(A, cpu=2), ask(B, gpu=1)],
    )
    yield case(
        "removal-without-a-medium",
        "A removal that cannot be read and names no medium may have concerned all.",
        [both, [{"type": "BlockRemoved", "block_hashes": ["8"], "medium": 0}]],
        [ask(A)],
    )


def groups() -> Iterator[dict[str, Any]]:
    """Models with several kinds of attention."""
    yield case(
        "sliding-window-group",
        "A sliding window's group names fewer blocks than its tokens make: only full attention counts.",
        [[window([3, 4], A), stored([1, 2, 3, 4], A)]],
        [ask(A, gpu=4)],
    )
    yield case(
        "sliding-window-only",
        "What only a sliding window holds is not counted.",
        [[window([3, 4], A)], [window([11, 12, 13, 14], B)]],
        [ask(A), ask(B)],
    )
    yield case(
        "sliding-window-removal",
        "The same hash lies in several groups: its removal from the window's leaves it in the other.",
        [[window([1, 2], A[:32], group=0), stored([1, 2], A[:32], group_idx=1)], [removed(1, group_idx=0)]],
        [ask(A, gpu=2)],
    )
    latent, sink = (
        {"group_idx": 1, "kv_cache_spec_kind": "mla_attention"},
        {"group_idx": 2, "kv_cache_spec_kind": "sink_full_attention"},
    )
    three = [stored([1, 2, 3], A[:48]), stored([1, 2, 3], A[:48], **latent), stored([1, 2, 3], A[:48], **sink)]
    yield case(
        "several-full-groups",
        "A block counts while every full group has it: full, latent and sink attention are full.",
        [three, [removed(3, group_idx=1)]],
        [ask(A, gpu=2)],
    )
    yield case(
        "span-of-full-group",
        "Hashes of a full group that do not fit its tokens cannot be placed, and are left out.",
        [[stored([2], A[:32]), stored([11], B[:16])]],
        [ask(A), ask(B, gpu=1)],
    )


def orders() -> Iterator[dict[str, Any]]:
    """What comes before what."""
    one, two = stored([1, 2], A[:32]), stored([3, 4], A[32:64], 2)
    yield case(
        "cleared-before-stored",
        "Everything is dropped, and what follows in the same batch is held.",
        [[one, two], [CLEARED, stored([11], B[:16])]],
        [ask(A), ask(B, gpu=1)],
    )
    yield case(
        "duplicates",
        "A block stored twice is one block, and one removal removes it.",
        [[one], [one, two], [two], [removed(4)]],
        [ask(A, gpu=3)],
    )
    yield case(
        "removal-before-store",
        "A removal of what is not there does nothing, and the store after it counts.",
        [[removed(1, 2, 99)], [one]],
        [ask(A, gpu=2)],
    )
    yield case(
        "removal-mid-chain",
        "Blocks behind a hole are held but do not count.",
        [[one, two], [removed(2)]],
        [ask(A, gpu=1)],
    )
    yield case(
        "hole-filled-again",
        "Blocks behind a hole count again when the hole is filled.",
        [[one, two], [removed(2)], [stored([2], A[16:32], 1)]],
        [ask(A, gpu=4)],
    )
    yield case(
        "unknown-parent",
        "Blocks that come before the blocks they go on from count when those come.",
        [[two], [stored([21, 22], C[:32], 2)], [one]],
        [ask(A, gpu=4), ask([*A[:32], *C[:32]], gpu=4), ask(A[32:])],
    )
    yield case(
        "parked-then-removed",
        "A block removed while it waits for its parent is not there when the parent comes.",
        [[two], [removed(4)], [one]],
        [ask(A, gpu=3)],
    )
    yield case(
        "parent-of-zero",
        "A parent of 0 that is no block is none: some publishers begin a prompt so.",
        [[stored([1, 2], A[:32], 0)], [stored([0], B[:16])], [stored([5], B[16:32], 0)]],
        [ask(A, gpu=2), ask(B, gpu=2), ask(B[16:])],
    )
    yield case(
        "branches",
        "Two prompts go on from one block, and a removal in one leaves the other.",
        [[one], [two, stored([13, 14], B[32:], 2)], [removed(3)]],
        [ask(A, gpu=2), ask([*A[:32], *B[32:]], gpu=4)],
    )
    yield case(
        "full-report",
        "With kv_cache_report_mode full the reused beginning is told again, from the root: it is no second holding.",
        [[one], [stored([1, 2, 3], A[:48])], [stored([1, 2, 3, 4], A)], [removed(4), removed(3), removed(2)]],
        [ask(A, gpu=1)],
    )


def sizes() -> Iterator[dict[str, Any]]:
    """Blocks and chunks of different sizes."""
    yield case(
        "blocks-of-two-chunks",
        "A block of 32 tokens is two chunks of 16.",
        [[stored([1, 2], A, block_size=32)], [removed(2)]],
        [ask(A, gpu=2), ask(A[:31], gpu=1)],
    )
    yield case(
        "two-blocks-a-chunk",
        "With blocks of 8 tokens a chunk of 16 counts when both its blocks are held.",
        [
            [stored([1, 2, 3, 4, 5], A[:40], block_size=8)],
            [stored([11, 12, 13, 14], B[:32], block_size=8), removed(14)],
        ],
        [ask(A, gpu=2), ask(B, gpu=1)],
    )

    small = stored([11, 12, 13, 14], A[:32], block_size=8)
    yield case(
        "two-sizes",
        "Blocks smaller than the largest of a group are of another cache, or tails: they say nothing of the others.",
        [[stored([1, 2], A[:32]), small], [removed(14, 13, 12, 11)], [small, removed(2)]],
        [ask(A, gpu=1)],
    )
    yield case(
        "smaller-blocks-first",
        "The first larger block shows that what a group told until then was not its blocks.",
        [[small], [stored([21, 22], B[:32])]],
        [ask(A), ask(B, gpu=2)],
    )


def sequences() -> Iterator[dict[str, Any]]:
    """Frames that come twice, late, or not at all."""
    zero, one, two = (
        frame(0, stored([1], A[:16])),
        frame(1, stored([2], A[16:32], 1)),
        frame(2, stored([3], A[32:48], 2)),
    )
    yield case("frame-twice", "A frame that comes twice is applied once.", [zero, one, one, two], [ask(A, gpu=3)])
    yield case(
        "gap-replayed",
        "What is missing between two frames is asked for, and applied before the later one.",
        [zero, two],
        [ask(A, gpu=3)],
        replay=[zero, one, two],
    )
    yield case(
        "joined-late",
        "Frames before the first one that is seen are asked for from 0.",
        [two],
        [ask(A, gpu=3)],
        replay=[zero, one, two],
    )
    yield case(
        "gap-lost",
        "Frames that cannot be had may have removed anything: nothing from before them is held.",
        [zero, two, frame(3, stored([11], B[:16]))],
        [ask(A), ask(B, gpu=1)],
        replay=[two],
    )
    yield case(
        "restart",
        "A number that goes back to 0 is a new engine: it holds nothing of the old one.",
        [zero, one, frame(0, stored([11], B[:16])), frame(1, stored([12], B[16:32], 11))],
        [ask(A), ask(B, gpu=2)],
    )


def cases() -> Iterator[dict[str, Any]]:
    """All cases."""
    for section in (shapes, hashes, contents, media, groups, orders, sizes, sequences):
        yield from section()


def text(made: dict[str, Any]) -> str:
    """A case as its file has it: one frame or query a line."""
    lines: list[str] = []
    for name, value in made.items():
        if isinstance(value, list):
            rows = ",\n".join(f"    {json.dumps(row)}" for row in value)
            lines.append(f'  "{name}": [\n{rows}\n  ]' if rows else f'  "{name}": []')
        else:
            lines.append(f'  "{name}": {json.dumps(value)}')
    return "{\n" + ",\n".join(lines) + "\n}\n"


def files() -> dict[str, str]:
    """All files by name."""
    return {f"{made['name']}.json": text(made) for made in cases()}


if __name__ == "__main__":
    wanted = files()
    for stale in {path.name for path in FOLDER.glob("*.json")} - set(wanted):
        (FOLDER / stale).unlink()
    for name, content in wanted.items():
        (FOLDER / name).write_text(content)
