"""KV events of engines: every shape they were ever sent in, and what is refused."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import msgpack
import pytest

from distprefix.chunking import pack_extra
from distprefix.errors import DistPrefixError, EventFormatError, InvalidInputError
from distprefix.events.decode import decode
from distprefix.events.frames import Batch, Cleared, Removed, Stored
from distprefix.events.sglang import first_hash
from tests.conformance.make import sglang_hashes
from tests.event_samples import ENGINES, REMOVED, STORED, TOP, bare, pack, read, stored, words

_MIB = 1 << 20


def refused(*events: Any, clears: str | None = "") -> bool:
    """Whether each of the events, and nothing else, counts as malformed, and as having cleared `clears` where given."""
    batch = read(*events, REMOVED)
    left = () if clears == "" else (Cleared(clears),) * len(events)
    counts = (batch.malformed, batch.unclear, batch.unknown)
    return counts == (len(events), len(left), 0) and batch.events == (*left, Removed((1,), "gpu", 0))


def test_a_map_is_read() -> None:
    """A map of vLLM becomes an event with everything in it."""
    want = Stored((1, 2), None, words(10, 11, 12, 13), 2, "gpu", 0, "full_attention", (), ())
    assert read(STORED, REMOVED, {"type": "AllBlocksCleared"}) == Batch(
        1.5, 0, (want, Removed((1,), "gpu", 0), Cleared()), 0, 0
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("length", range(4, 13))
def test_arrays_of_any_length_are_read(engine: str, length: int) -> None:
    """A positional array of four fields or more is the same event; what it lacks has its default."""
    names = list(STORED)[1:]
    values = [5, "CPU", None, None, 3, "mla_attention", 128, "more"]
    array = ["BlockStored", [-1], 7, [10, 11], 2, *(values if engine != "sglang" else [5, "CPU", "salt", "s", "lora"])]
    (event,) = read(array[: length + 1], engine=engine if engine != "auto" else "vllm").events
    assert isinstance(event, Stored)
    assert (event.keys, event.parent, event.tokens, event.block_size) == ((TOP - 1,), 7, words(10, 11), 2)
    assert event.medium == ("cpu" if length >= 6 else "gpu")
    if engine != "sglang":
        assert event.group == (3 if length >= 9 else 0), names
        assert event.kind == ("mla_attention" if length >= 10 else "full_attention")
    assert read(["BlockRemoved", [1]], ["BlockRemoved", [1], "CPU"], engine=engine).events == (
        Removed((1,), "gpu", 0),
        Removed((1,), "cpu", 0),
    )
    assert read(["AllBlocksCleared"], engine=engine).events == (Cleared(),)


def test_arrays_that_are_too_short_are_malformed() -> None:
    """Without hashes, parent, tokens and block size there is no stored block."""
    assert refused(*[["BlockStored", [1], None, [1], 1][:n] for n in range(1, 5)], [])
    assert refused(["BlockRemoved"], [[]], clears=None)


def test_batches_of_two_and_more_elements() -> None:
    """A batch may lack its rank, have nil for it, or have elements more."""
    assert decode(pack([1, []])) == Batch(1.0, None, (), 0, 0)
    assert decode(pack([1, [], None])).rank is None
    assert decode(pack([1, [REMOVED], 3, "x", [1]])) == Batch(1.0, 3, (Removed((1,), "gpu", 0),), 0, 0)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        pack(None),
        pack(1),
        pack({}),
        pack([]),
        pack([1.0]),
        pack([1.0, None]),
        pack([1.0, {}, 0]),
        pack(["now", [], 0]),
        pack([True, [], 0]),
        pack([[], [], 0]),
        pack([1.0, [], True]),
        pack([1.0, [], "0"]),
        pack([1.0, [], -1]),
        pack([1.0, [], 0.0]),
        pack([1.0, [], 0]) + b"\0",
        pack([1.0, [STORED], 0])[:-1],
        pack([1.0, [None] * (1 << 19), 0]),
        b"\xdd\xff\xff\xff\xff" * 400,
        b"\x91" * 5000 + b"\0",
    ],
)
def test_what_is_no_batch_is_refused(payload: bytes) -> None:
    """A message that is not one batch and nothing else is refused as a whole, with a message."""
    with pytest.raises(EventFormatError, match=r"\w"):
        decode(payload)
    with pytest.raises(EventFormatError, match=r"\w"):
        decode(payload + b"\xdb\0\x20\0\0" + b"a" * (2 * _MIB))
    assert issubclass(EventFormatError, DistPrefixError)
    assert issubclass(EventFormatError, ValueError)


def test_an_unknown_engine_is_refused() -> None:
    """An engine that nobody knows is a mistake of the caller."""
    with pytest.raises(InvalidInputError, match="'llama'"):
        decode(pack([1.0, []]), engine="llama")


@pytest.mark.parametrize("at", [math.nan, math.inf, -math.inf, None, -1.0, 1e300, 2**63])
def test_times_that_are_none(at: Any) -> None:
    """A time that is no number, or that no clock shows, is 0."""
    assert decode(pack([at, []])).at == 0.0


def test_hashes_are_low_64_bits() -> None:
    """Negative numbers and strings are the same keys as the numbers they end in; long strings are kept whole."""
    long = [bytes(range(32)), b"\xff" * 16]
    assert stored(block_hashes=[-1, -(2**63)]).keys == (TOP - 1, 2**63)
    event = stored(block_hashes=long, parent_block_hash=b"abc" + b"\0" * 7 + b"\5")
    assert event.keys == (int.from_bytes(range(24, 32), "big"), TOP - 1)
    assert (event.parent, event.names) == (5, tuple(long))
    assert stored(block_hashes=[b"\1", b"\xff" * 16]).names == ()
    assert stored(block_hashes=[b"\1\0", 7]).keys == (256, 7)


def test_bad_hashes_are_malformed() -> None:
    """What is neither a number nor a string of bytes names no block."""
    bad: list[Any] = [True, 1.0, "1", None, [1], {}, b"", msgpack.ExtType(5, b"1")]
    assert refused(*[STORED | {"block_hashes": [1, value]} for value in bad])
    assert refused(*[REMOVED | {"block_hashes": [value]} for value in bad], clears="gpu")
    assert refused(*[STORED | {"parent_block_hash": value} for value in bad if value is not None])
    assert refused(*[STORED | {"block_hashes": value} for value in (None, 1, "a", {}, b"ab")])


def test_bad_tokens_are_malformed() -> None:
    """Token ids are integers in [0, 2^32), and there are none without a block size."""
    assert refused(*[STORED | {"token_ids": [1, value]} for value in (True, 1.0, "1", None, -1, 2**32, [1], b"1")])
    assert refused(*[STORED | {"token_ids": value} for value in (None, 1, b"abcd", {1: 2})])
    assert refused(*[STORED | {"block_size": value} for value in (True, 2.0, "2", -2, None, 0)])
    assert stored(token_ids=[0, 2**32 - 1]).tokens == words(0, 2**32 - 1)


def test_bad_fields_are_malformed() -> None:
    """Fields of the wrong type are not guessed at."""
    assert refused(*[STORED | {"group_idx": value} for value in (True, 1.0, "1", -1)])
    assert refused(*[STORED | {"lora_id": value} for value in (True, 1.0, "1")])
    names = ("medium", "kv_cache_spec_kind", "lora_name", "cache_salt")
    assert refused(*[STORED | {name: value} for name in names for value in (1, True, [], {})])
    assert refused(*[STORED | {"extra_keys": value} for value in (1, "ab", [["a"]], ["a", None], [{"a": 1}, None])])
    assert refused(None, 1, "BlockStored", b"", {}, {"type": None}, {"type": ""}, {1: 2})
    assert refused({"type": 1}, {"type": []}, [5, "x"], clears=None)
    assert refused(*[{k: v for k, v in STORED.items() if k != name} for name in list(STORED)[1:5]])
    assert refused(REMOVED | {"medium": 1}, clears=None)
    assert refused(REMOVED | {"group_idx": True}, REMOVED | {"block_hashes": 7}, clears="gpu")


def test_unknown_kinds_and_fields() -> None:
    """Events of other kinds are counted and other fields ignored, whatever is in them."""
    more = {"locality": "LOCAL", "new": [{"a": [1.0]}], "lookahead_token_ids": [[1], [2]]}
    batch = read({"type": "Moved"}, ["Later", 1, 2], {"type": b"\xff"}, STORED | more)
    assert (batch.unknown, batch.malformed) == (3, 0)
    assert batch.events == read(STORED).events


def test_names_may_be_bytes() -> None:
    """Names of fields, types and media may be binary."""
    made = {k.encode(): v.encode() if isinstance(v, str) else v for k, v in STORED.items()}
    assert read(made).events == read(STORED).events
    assert read([b"BlockRemoved", [1], b"CPU"], {b"type": b"AllBlocksCleared"}).events == (
        Removed((1,), "cpu", 0),
        Cleared(),
    )


@pytest.mark.parametrize(
    ("medium", "word"),
    [
        (None, "gpu"),
        ("", "gpu"),
        ("GPU", "gpu"),
        ("CPU_PINNED", "cpu_pinned"),
        ("a b/c:d@é", "a-b-c-d--"),
        ("x" * 100, "x" * 64),
        ("İ" * 64, "i-" * 32),
        (b"\xffA", "-a"),
    ],
)
def test_media(medium: Any, word: str) -> None:
    """A medium is a short word in lower case; none means the GPU."""
    assert stored(medium=medium).medium == word


def test_placeholders() -> None:
    """An event without tokens names blocks, whatever block size it tells."""
    for size in (0, 16):
        event = stored(token_ids=[], block_size=size, extra_keys=None)
        assert (event.keys, event.tokens, event.block_size, event.parent) == ((1, 2), b"", 0, None)


def test_defaults() -> None:
    """Without them the group is 0 and of full attention, and the medium the GPU."""
    event = stored(group_idx=None, kv_cache_spec_kind=None, medium=None)
    assert (event.group, event.kind, event.medium) == (0, "full_attention", "gpu")
    short = {name: STORED[name] for name in list(STORED)[:5]}
    assert read(short, engine="vllm").events == (event._replace(is_told=False),)
    assert decode(pack([1.5, [short], 0]), is_plain=True).events == (event,)


def test_extras_are_packed_the_same_everywhere() -> None:
    """The packing of an extra is fixed: it is part of what names a block."""
    assert pack_extra("mm", "image", -3) == b"\x93\xa2mm\xa5image\xfd"
    assert pack_extra("key", b"\1") == b"\x92\xa3key\xc4\x01\x01"
    assert pack_extra("salt", "\udcff") == b"\x92\xa4salt\xa1\xff"


@pytest.mark.parametrize(
    ("fields", "extras"),
    [
        ({"lora_name": "a", "lora_id": 1}, [[("lora", "a")], []]),
        ({"lora_id": 7}, [[("lora", "7")], []]),
        ({"lora_id": 0}, []),
        ({"lora_name": ""}, []),
        ({"lora_name": "a", "parent_block_hash": 5}, []),
        ({"lora_name": "a", "extra_keys": [["a"], ["a"]]}, [[("lora", "a")], []]),
        ({"lora_name": "a", "extra_keys": [["a"], ["a"]], "parent_block_hash": 5}, []),
        ({"lora_name": "a", "extra_keys": [["a", "a"], ["a"]]}, [[("lora", "a"), ("salt", "a")], []]),
        ({"extra_keys": [["t"], None]}, [[("salt", "t")], []]),
        ({"extra_keys": [["t", "u"], ["v"]]}, [[("salt", "t"), ("key", "u")], [("key", "v")]]),
        ({"extra_keys": [["t"], None], "parent_block_hash": 5}, [[("key", "t")], []]),
        ({"extra_keys": [["t"], None], "cache_salt": "t"}, [[("salt", "t")], []]),
        ({"extra_keys": [["u"], None], "cache_salt": "t"}, [[("salt", "t"), ("key", "u")], []]),
        ({"cache_salt": "t"}, [[("salt", "t")], []]),
        ({"cache_salt": "t", "parent_block_hash": 5}, []),
        ({"extra_keys": [[["i", 3], "t"], [["i", -13]]]}, [[("salt", "t"), ("mm", "i", 3)], [("mm", "i", -13)]]),
        (
            {"lora_name": "a", "extra_keys": [["a", ["i", 3], "t", b"d"], ["a", ["i", 0]]]},
            [[("lora", "a"), ("salt", "t"), ("mm", "i", 3), ("key", b"d")], [("mm", "i", 0)]],
        ),
        ({"extra_keys": [[b"d"], [5]]}, [[("key", b"d")], [("key", pack(5))]]),
        ({"extra_keys": [None, [["i", True], [1]]]}, [[], [("key", pack(["i", True])), ("key", pack([1]))]]),
        ({"extra_keys": [[], None]}, []),
        ({"extra_keys": []}, []),
        ({"extra_keys": None}, []),
    ],
)
def test_extras(fields: dict[str, Any], extras: list[list[Any]]) -> None:
    """LoRA, then salt, in a prompt's first block; images and what is not explained in the block they stand in."""
    want = tuple(b"".join(pack_extra(*item) for item in block) for block in extras)
    assert stored(**fields).extras == want


def test_extras_that_cannot_be_packed_are_malformed() -> None:
    """An extension, or what is nested beyond measure, is no extra key."""
    deep: list[Any] = []
    for _ in range(600):
        deep = [deep]
    assert refused(STORED | {"extra_keys": [[msgpack.ExtType(5, b"1")], None]})
    batch = read(STORED | {"extra_keys": [[deep], None]})  # depends on the version of msgpack
    assert batch.malformed + sum(len(event.extras) == 2 for event in batch.events if isinstance(event, Stored)) == 1


_IDS = STORED["token_ids"]
_RIGHT = int.from_bytes(hashlib.sha256(words(10, 11)).digest()[:8], "big")
_SALTED = (pack_extra("salt", "t"), b"")


@pytest.mark.parametrize(
    ("engine", "event", "extras", "is_told"),
    [
        ("sglang", bare(), (), False),
        ("auto", bare(), (), False),
        ("vllm", bare(), (), False),
        ("auto", STORED, (), True),
        ("auto", STORED | {"extra_keys": None}, (), False),
        ("auto", STORED | {"extra_keys": None, "parent_block_hash": 9}, (), False),
        ("sglang", bare(block_hashes=[_RIGHT, 2]), (), True),
        ("auto", bare(block_hashes=[_RIGHT - TOP if _RIGHT >= 2**63 else _RIGHT, 2]), (), True),
        ("sglang", bare(parent_block_hash=9), (), True),
        ("vllm", bare(parent_block_hash=9), (), False),
        ("sglang", bare(cache_salt="t"), _SALTED, True),
        ("sglang", bare(lora_name="a"), (pack_extra("lora", "a"), b""), True),
        ("sglang", bare(token_ids=[], block_size=0), (), True),
        ("auto", ["BlockStored", [1, -2], None, _IDS, 2, None, "GPU"], (), False),
        ("auto", ["BlockStored", [1, 2], None, _IDS, 2, None, "GPU"], (), False),
        ("auto", ["BlockStored", [_RIGHT, 2], None, _IDS, 2, None, "GPU"], (), True),
        ("sglang", ["BlockStored", [1, 2], None, _IDS, 2], (), False),
        ("sglang", ["BlockStored", [1, 2], None, _IDS, 2, None, "GPU", "t"], _SALTED, True),
        ("auto", ["BlockStored", [1, 2], None, _IDS, 2, None, "GPU", {"cache_salt": "t"}], _SALTED, True),
        ("auto", ["BlockStored", [1, 2], None, _IDS, 2, None, "GPU", None, [None, None]], (), True),
    ],
)
def test_an_event_tells_what_its_blocks_depend_on_or_does_not(
    engine: str, event: Any, extras: tuple[bytes, ...], *, is_told: bool
) -> None:
    """Extra keys tell it, and of SGLang a field or the hash of a first block; else it is told of a plain fleet only."""
    (made,) = read(event, engine=engine).events
    assert isinstance(made, Stored)
    assert (made.extras, made.is_told) == (extras, is_told)
    (plain,) = decode(pack([1.5, [event], 0]), engine=engine, is_plain=True).events
    assert plain == made._replace(is_told=True)


def test_pairs_of_eagle_are_tokens() -> None:
    """SGLang with EAGLE tells each token with the one that follows it, and hashes both of each."""
    pairs = [[10, 11], [11, 12], [12, 13], [13, 14]]
    hashed = int.from_bytes(hashlib.sha256(words(10, 11, 11, 12)).digest()[:8], "big")
    made = stored("sglang", token_ids=pairs, block_hashes=[hashed, 2], extra_keys=None)
    assert (made.tokens, made.block_size, made.is_told) == (words(10, 11, 12, 13), 2, True)
    assert not stored("sglang", token_ids=pairs, extra_keys=None).is_told
    bad: list[Any] = [[10], [10, 11, 12], 10, [11, 11], [10, -1], [10, True], None]
    assert refused(*[STORED | {"token_ids": [value, [12, 13]]} for value in bad])


def test_a_batch_may_be_a_map() -> None:
    """A batch whose parts have names is the same batch, however large it is and whatever else it has."""
    for filler in (b"", b"a" * (2 * _MIB)):
        for rank in ("data_parallel_rank", "attn_dp_rank"):
            made = {"more": filler, "ts": 1.5, "events": [STORED, REMOVED], rank: 3}
            assert decode(pack(made)) == read(STORED, REMOVED)._replace(rank=3)
        assert decode(pack({b"events": [REMOVED], "more": filler})) == Batch(0.0, None, read(REMOVED).events, 0, 0)
        for wrong in ({"ts": 1.5, "more": filler}, {"events": {}, "more": filler}, {"events": 1, "more": filler}):
            with pytest.raises(EventFormatError, match=r"\w"):
                decode(pack(wrong))


def test_the_envelope_of_rfc_1527_is_read() -> None:
    """Mooncake's events say by a salt, or nil for none, what their blocks depend on."""
    envelope = {"event_id": 1, "event_type": "stored", "block_size": 2, "tenant_id": "default", "medium": "gpu"}
    envelope |= {"seq_hashes": [1, 2], "parent_hash": None, "token_ids": _IDS, "base_block_idx": 0}
    (plain,) = read(STORED).events
    assert isinstance(plain, Stored)
    assert read(envelope | {"additional_salt": None}).events == (plain,)
    assert read(envelope | {"additional_salt": "t"}).events == (plain._replace(extras=_SALTED),)
    assert read(envelope).events == (plain._replace(is_told=False),)
    (named,) = read(envelope | {"token_ids": None}).events
    assert named == plain._replace(tokens=b"", block_size=0)
    assert read({"event_type": "removed", "seq_hashes": [1], "medium": "cpu"}, {"event_type": "cleared"}).events == (
        Removed((1,), "cpu", 0),
        Cleared(),
    )


@pytest.mark.parametrize(
    ("event", "medium"),
    [
        ({"type": "TierBlocksCleared", "medium": "CPU"}, "cpu"),
        ({"type": "BlocksEvicted"}, None),
        ({"type": "ResetPrefixCache", "medium": 3}, None),
        (["BlocksDropped", "CPU"], None),
        ({"event_type": "expired", "medium": b"DISK"}, "disk"),
    ],
)
def test_an_unknown_kind_that_takes_away_clears_what_it_names(event: Any, medium: str | None) -> None:
    """Of a removal that nobody understands, all that it could concern is no longer relied on."""
    assert read(event) == Batch(1.5, 0, (Cleared(medium),), 1, 0, 1)


def test_a_clear_may_name_a_medium() -> None:
    """A clear without a medium concerns all of them."""
    assert read({"type": "AllBlocksCleared", "medium": "CPU"}).events == (Cleared("cpu"),)
    assert read({"type": "AllBlocksCleared", "medium": None}).events == (Cleared(),)


def test_sglang_hashes_agree_with_the_corpus() -> None:
    """The rule in the package and the one of the conformance cases, written apart, give one hash."""
    ids = list(range(70_000, 70_016))
    assert first_hash(words(*ids), 16) == sglang_hashes(ids)[0] % TOP


def test_duplicate_keys_and_bad_text() -> None:
    """The last of two equal fields counts, and text that is no UTF-8 spoils nothing."""
    twice = b"\x84" + pack("type") + pack("BlockRemoved") + (pack("block_hashes") + pack([3])) * 2
    twice += pack("block_hashes") + pack([4])
    assert decode(b"\x92\x01\x91" + twice).events == (Removed((4,), "gpu", 0),)
    bad = pack([1.0, [STORED | {"lora_name": "xx"}], 0]).replace(b"\xa2xx", b"\xa2\xff\xfe")
    (event,) = decode(bad).events
    assert isinstance(event, Stored)
    assert event.extras == (b"\x92\xa4lora\xa2\xff\xfe", b"")
