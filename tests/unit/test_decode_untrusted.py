"""KV events whose bytes may be anything: what a hostile message can cost, changed messages, and captured ones."""

from __future__ import annotations

import json
import math
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprefix.chunking import pack_extra
from distprefix.errors import EventFormatError
from distprefix.events.decode import decode
from distprefix.events.frames import Batch, Cleared, Stored
from distprefix.events.unpack import PAYLOAD_LIMIT
from tests.conformance.make import cases
from tests.event_samples import ENGINES, REMOVED, STORED, TOP, bare, pack, read, words

_EVENTS = Path(os.environ.get("KV_EVENTS") or Path(__file__).parents[3] / "shared" / "kv_events")
_CAPTURES = sorted(_EVENTS.glob("*.jsonl"))
_MIB = 1 << 20


@pytest.mark.parametrize("filler", [0, 2 * _MIB])
def test_one_bad_event_does_not_spoil_the_others(filler: int) -> None:
    """What cannot even be built, in a small message or a large one, is one malformed event."""
    huge_map: dict[int, int] = dict.fromkeys(range(1000), 0)
    events = [
        {"type": "x", "y": huge_map},
        {"type": "BlockStored", "y": "time"},
        STORED,
        {"type": "f", "f": "a" * filler},
    ]
    batch = decode(pack([1.5, events, 2]).replace(b"\xa4time", b"\xc7\x03\xff123"))
    assert (batch.at, batch.rank, batch.unknown, batch.malformed) == (1.5, 2, 1, 2)
    assert batch.events == read(STORED).events
    unhashable = b"\x93\x01\x92\x81\x90\x01" + pack(STORED) + b"\0"
    assert decode(unhashable) == Batch(1.0, 0, read(STORED).events, 0, 1)


def test_large_messages_are_read() -> None:
    """A message of many megabytes gives the same events, at a few times its size."""
    big = STORED | {"block_hashes": [2**63] * 20_000, "token_ids": [100_000] * 40_000, "extra_keys": None}
    payload = pack([1.0, [big] * 10, 1])
    batch = decode(payload)
    assert len(payload) > 3 * _MIB
    assert (len(batch.events), batch.malformed, batch.rank) == (10, 0, 1)
    huge = STORED | {"token_ids": [100_000] * (2 * _MIB)}
    assert decode(pack([1.0, [huge, STORED], 1])) == Batch(1.0, 1, read(STORED).events, 0, 1)


def test_the_limit() -> None:
    """A message above the limit is refused without a look into it."""
    with pytest.raises(EventFormatError, match=str(PAYLOAD_LIMIT)):
        decode(bytes(PAYLOAD_LIMIT + 1))


def array_of(count: int, items: bytes) -> bytes:
    """An array that claims a number of items."""
    return b"\xdd" + count.to_bytes(4, "big") + items


_HEAD = b"\x93\xca\0\0\0\0"


@pytest.mark.parametrize("size", [_MIB - 100, 5 * _MIB // 4, pytest.param(3 * _MIB, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("name", "item", "length"),
    [("lists", b"\x90", 1), ("maps", b"\x81\xc0\xc0", 3), ("text", b"\xa4\xf0\x9f\x98\x80", 5), ("ints", b"\xcd@@", 3)],
)
def test_what_a_hostile_message_costs(name: str, item: bytes, length: int, size: int) -> None:
    """No message takes more than 90 times its size in memory, and above a mebibyte 40 times; nor long."""
    count = size // length
    payload = _HEAD + b"\x91" + array_of(count, item * count) + b"\0"
    peak, seconds = cost(payload)
    assert peak < len(payload) * (90 if len(payload) <= _MIB else 40), name
    assert seconds < 20


@pytest.mark.parametrize(
    "payload",
    [
        _HEAD + array_of(10_000_000, b"") * 500 + bytes(11_000_000),
        _HEAD + b"\x91" + b"\x81\xa1a\xdf\0\x0f\xff\xff\x01" * 400,
        _HEAD + b"\x91" + b"\xdc\xff\xff" * 500 + bytes(60_000),
        _HEAD + array_of(4 * _MIB, b"\xc0" * (4 * _MIB)) + b"\0",
        _HEAD + b"\x91" + b"\x91" * (4 * _MIB) + b"\0\0",
        _HEAD + b"\x91\xdb\xff\xff\xff\xff" + b"a" * 1000,
    ],
    ids=["nested arrays", "nested maps", "nested short arrays", "empty events", "deep", "long text"],
)
def test_claims_cost_nothing(payload: bytes) -> None:
    """Lengths that a message only claims are not allocated."""
    peak, seconds = cost(payload)
    assert peak < 3 * len(payload) + 100_000
    assert seconds < 5


def cost(payload: bytes) -> tuple[int, float]:
    """Peak of memory and time to decode."""
    started = time.process_time()
    tracemalloc.start()
    try:
        decode(payload)
    except EventFormatError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, time.process_time() - started


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), TOP - 1)
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=40)
    | st.sampled_from(["BlockStored", "BlockRemoved", "AllBlocksCleared", *STORED]),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(st.sampled_from(list(STORED)) | st.binary(max_size=3) | st.integers(0, 9), inner, max_size=6)
    ),
    max_leaves=30,
)


def sound(payload: bytes) -> None:
    """Decode with each engine: a batch that keeps its promises, or EventFormatError."""
    for engine in ENGINES:
        try:
            batch = decode(payload, engine=engine)
        except EventFormatError:
            continue
        assert math.isfinite(batch.at)
        for event in batch.events:
            if isinstance(event, Stored):
                assert all(0 <= key < TOP for key in event.keys)
                assert len(event.extras) in (0, len(event.keys))
                assert len(event.names) in (0, len(event.keys))
                assert bool(event.tokens) == bool(event.block_size)


@given(st.binary(max_size=300))
def test_arbitrary_bytes(payload: bytes) -> None:
    """Any bytes are a batch or refused."""
    sound(payload)


@given(_values, st.lists(_values, max_size=4), _values)
def test_arbitrary_structures(at: Any, events: list[Any], rank: Any) -> None:
    """Any structure is a batch or refused, and so is one whose events are nearly right."""
    sound(pack([at, events, rank]))
    sound(pack([1.0, events, 0]))
    sound(pack([1.0, [["BlockStored", *events], ["BlockRemoved", *events]], 0]))


@given(st.sampled_from(list(STORED)), _values)
def test_arbitrary_fields(name: str, value: Any) -> None:
    """One field with anything in it makes the event right or malformed, or of another kind."""
    for event in (STORED, REMOVED, bare()):
        payload = pack([1.0, [event | {name: value}, STORED], 0])
        batch = decode(payload)
        assert batch.unknown + batch.malformed + len(batch.events) - batch.unclear == 2
        sound(payload)


def captured(path: Path) -> list[tuple[bytes, Any]]:
    """The messages of a capture, with what is in them."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    return [(bytes.fromhex(row["payload_hex"]), row["decoded"]) for row in rows if "decoded" in row]


_MADE = [bytes.fromhex(frame["payload_hex"]) for case in cases() for frame in case["frames"]]
_FRAMES = _MADE + [payload for path in _CAPTURES for payload, _ in captured(path)]


@given(st.data())
def test_changed_frames(data: st.DataObject) -> None:
    """A message with some bytes changed, cut out or doubled is a batch or refused."""
    payload = bytearray(data.draw(st.sampled_from(_FRAMES)))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(payload)))
        payload[start : start + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=4))
    sound(bytes(payload))


@pytest.mark.skipif(not _CAPTURES, reason=f"no captured events in {_EVENTS}; KV_EVENTS says where they are")
@pytest.mark.parametrize("engine", ["auto", "own"])
@pytest.mark.parametrize("path", _CAPTURES or [Path("none")], ids=lambda path: path.stem)
def test_captured_frames(path: Path, engine: str) -> None:
    """Each event of a real engine comes out with all that it says."""
    own = path.stem.split("-")[0]
    for payload, (at, raw, rank) in captured(path):
        batch = decode(payload, engine=own if engine == "own" else engine)
        assert (batch.at, batch.rank, batch.unknown, batch.malformed) == (at, rank, 0, 0)
        assert len(batch.events) == len(raw)
        for event, said in zip(batch.events, raw, strict=True):
            if isinstance(event, Cleared):
                assert said == {"type": "AllBlocksCleared"}
                continue
            assert event.keys == tuple(map(key_of, said["block_hashes"]))
            assert (event.medium, event.group) == ("gpu", said.get("group_idx", 0))
            if isinstance(event, Stored):
                parent = said["parent_block_hash"]
                assert event.parent == (None if parent is None else key_of(parent))
                assert event.tokens == words(*said["token_ids"])
                assert (event.block_size, event.kind) == (
                    said["block_size"],
                    said.get("kv_cache_spec_kind", "full_attention"),
                )
                assert event.extras == extras_of(said, event)
                is_hidden = path.stem == "sglang-0.5.23-dynamo" and said["token_ids"] == [7] * 16
                assert event.is_told != (is_hidden and not said.get("cache_salt"))
                assert bool(event.names) == ("bytes" in path.stem)


def key_of(said: Any) -> int:
    """A hash as the captures write it."""
    return int(said["hex"][-16:], 16) if isinstance(said, dict) else said % TOP


def extras_of(said: dict[str, Any], event: Stored) -> tuple[bytes, ...]:
    """What the captures are known to hold: one salt each; SGLang's LoRA, which only dynamo shows, is not told."""
    rest = (b"",) * (len(event.keys) - 1)
    salt = said.get("cache_salt") or ((said.get("extra_keys") or [None])[0] or [None])[0]
    if salt:
        return (pack_extra("salt", "tenant-1"), *rest)
    return ()
