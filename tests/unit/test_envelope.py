"""The header before payloads: what it finds, what it copies, and what a hostile one can cost."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any, cast

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from distprefix.errors import DamagedPayloadError, DistPrefixError, InvalidInputError, UnreadablePayloadError
from distprefix.tiers import envelope
from distprefix.tiers.codecs import CODECS, RAW, codec_named
from distprefix.tiers.encryption import OVERHEAD, KeyRing
from distprefix.tiers.envelope import HEADER_BYTES, MAX_PAYLOAD, open_into, read_header, seal

_CHUNK, _OTHER = bytes(range(16)), bytes(range(1, 17))
_ZSTD = codec_named("zstd")
_KEYS = KeyRing.from_text(f"7:{'5a' * 16}")
_LOSSLESS = [codec_named(name) for name in ("raw", "zstd", "lz4")]
_PAYLOAD = np.arange(400, dtype=np.uint16).tobytes()
_KINDS = [(codec, keys) for codec in _LOSSLESS for keys in (None, _KEYS)]


def sealed(chunk: bytes, payload: Any, codec: Any, keys: KeyRing | None = None) -> tuple[bytes, bytes]:
    """Header and body, as they come back from a server."""
    header, body = seal(chunk, payload, codec, keys)
    return header, bytes(cast("memoryview", body))


def opened(chunk: bytes, header: bytes, body: Any, size: int, keys: KeyRing | None = None) -> bytes:
    """The payload; what lies behind it in the target is as it was."""
    target = memoryview(bytearray(b"\xee" * (size + 64)))
    try:
        length = open_into(chunk, header, body, target, keys)
    except DistPrefixError:
        assert target[size:] == b"\xee" * 64
        raise
    assert target[length:] == b"\xee" * (size + 64 - length)
    return bytes(target[:length])


def forged(header: bytes, body: bytes, **changes: int) -> bytes:
    """The header with other fields, and with both checks as one who knows how would make them."""
    names = ("magic", "version", "codec", "values", "key_id", "length", "stored", "upload")
    fields = dict(zip(names, struct.unpack_from("<4sBBHIII8s", header), strict=True)) | {"stored": len(body)} | changes
    start = struct.pack("<4sBBHIII8s", *fields.values())
    start += struct.pack("<I", xxhash.xxh3_64_intdigest(_CHUNK + start) & 0xFFFFFFFF)
    return start + struct.pack("<Q", xxhash.xxh3_64_intdigest(_CHUNK + start + body))


@given(st.binary(min_size=1, max_size=3000) | st.binary(min_size=1, max_size=9).map(lambda part: part * 400))
def test_what_goes_in_comes_out(payload: bytes) -> None:
    """Every lossless codec, encrypted or not, gives back just the bytes, and never stores more than they are."""
    for codec, keys in _KINDS:
        header, body = sealed(_CHUNK, payload, codec, keys)
        told = read_header(_CHUNK, header + body)
        assert (told.length, told.stored, told.key_id) == (len(payload), len(body), 7 if keys else 0)
        assert len(body) <= len(payload) + (OVERHEAD if keys else 0)
        assert opened(_CHUNK, header, body, len(payload), keys) == payload


def test_the_format_stays() -> None:
    """A header of today is byte for byte what other versions of this package read."""
    header, body = seal(_CHUNK, b"payload", RAW)
    assert header.hex() == "44504b560300010000000000070000000700000000000000000000005b8291d283e99a07eb2dcf0f"
    assert (len(header), HEADER_BYTES, body) == (40, 40, b"payload")


@pytest.mark.parametrize(("codec", "keys"), _KINDS)
def test_every_flipped_bit_is_found(codec: Any, keys: KeyRing | None) -> None:
    """One bit anywhere in header or body makes the payload damaged; one in the header's fields already its header."""
    header, body = sealed(_CHUNK, _PAYLOAD, codec, keys)
    for bit in range(8 * (HEADER_BYTES + len(body))):
        value = bytearray(header + body)
        value[bit // 8] ^= 1 << bit % 8
        if bit < 8 * 24:
            with pytest.raises(DamagedPayloadError):
                read_header(_CHUNK, value)
        with pytest.raises(DamagedPayloadError):
            opened(_CHUNK, bytes(value[:HEADER_BYTES]), value[HEADER_BYTES:], len(_PAYLOAD), keys)


@pytest.mark.parametrize(("codec", "keys"), _KINDS)
def test_every_cut_is_found(codec: Any, keys: KeyRing | None) -> None:
    """A payload of any other length is damaged: cut in the header, cut behind it, or longer."""
    header, body = sealed(_CHUNK, _PAYLOAD, codec, keys)
    for size in range(HEADER_BYTES):
        with pytest.raises(DamagedPayloadError, match="cut"):
            read_header(_CHUNK, header[:size])
    for other in (*(body[:size] for size in range(len(body))), body + b"\0"):
        with pytest.raises(DamagedPayloadError, match=rf"{len(other)} bytes behind its header instead of {len(body)}"):
            opened(_CHUNK, header, other, len(_PAYLOAD), keys)


@pytest.mark.parametrize(("codec", "keys"), _KINDS)
def test_a_payload_of_another_chunk_is_found(codec: Any, keys: KeyRing | None) -> None:
    """A valid payload under the wrong chunk is found by its header alone, and so is a body behind another header."""
    header, body = sealed(_OTHER, _PAYLOAD, codec, keys)
    with pytest.raises(DamagedPayloadError, match="another chunk"):
        read_header(_CHUNK, header)
    own, _ = sealed(_CHUNK, _PAYLOAD[::-1], codec, keys)
    with pytest.raises(DamagedPayloadError):
        opened(_CHUNK, own, body, len(_PAYLOAD), keys)


@pytest.mark.parametrize("codec", _LOSSLESS)
def test_a_wrong_codec_byte_is_found(codec: Any) -> None:
    """Another codec in the header is found by the check, and by the body itself where the checks were forged."""
    header, body = sealed(_CHUNK, _PAYLOAD, codec)
    for number in set(range(256)) - {codec.number}:
        with pytest.raises(DamagedPayloadError):
            opened(_CHUNK, header[:5] + bytes([number]) + header[6:], body, len(_PAYLOAD))
        with pytest.raises(DamagedPayloadError):
            opened(_CHUNK, forged(header, body, codec=number), body, len(_PAYLOAD))
    assert opened(_CHUNK, forged(header, body), body, len(_PAYLOAD)) == _PAYLOAD


def test_keys_must_be_those_of_the_payload() -> None:
    """Another key under the same id, an unknown id, no keys, none where there have to be: this cannot be read."""
    header, body = sealed(_CHUNK, _PAYLOAD, _ZSTD, _KEYS)
    for keys, text in (
        (KeyRing.from_text(f"7:{'5b' * 16}"), "cannot be decrypted with key 7"),
        (KeyRing.from_text(f"8:{'5a' * 16}"), "key 7, which is not configured"),
        (None, "encrypted with key 7, and no keys are configured"),
    ):
        with pytest.raises(UnreadablePayloadError, match=text):
            opened(_CHUNK, header, body, len(_PAYLOAD), keys)
    plain = sealed(_CHUNK, _PAYLOAD, _ZSTD)
    with pytest.raises(UnreadablePayloadError, match="not encrypted, but keys are configured"):
        opened(_CHUNK, *plain, len(_PAYLOAD), _KEYS)


def test_keys_rotate() -> None:
    """With a new key in front, old payloads still open, and new ones are of the new key."""
    old = sealed(_CHUNK, _PAYLOAD, RAW, _KEYS)
    both = KeyRing.from_text(f"8:{'c3' * 32},7:{'5a' * 16}")
    new = sealed(_CHUNK, _PAYLOAD, RAW, both)
    assert (read_header(_CHUNK, old[0]).key_id, read_header(_CHUNK, new[0]).key_id) == (7, 8)
    assert opened(_CHUNK, *old, len(_PAYLOAD), both) == opened(_CHUNK, *new, len(_PAYLOAD), both) == _PAYLOAD


@pytest.mark.parametrize("field", ["codec", "length", "stored", "key_id"])
def test_encryption_covers_the_header(field: str) -> None:
    """Whoever can make both checks still cannot change a header or move a body when payloads are encrypted."""
    keys = KeyRing.from_text(f"7:{'5a' * 16},8:{'5a' * 16}")
    header, body = sealed(_CHUNK, bytes(range(100)), RAW, keys)
    changes = {"codec": {"codec": 1, "length": 101}, "length": {"codec": 2, "length": 200}, "key_id": {"key_id": 8}}
    body = body[:-1] if field == "stored" else body
    changes["stored"] = {"length": 99}
    opened(_CHUNK, *sealed(_CHUNK, b"any", RAW, keys), 300, keys)  # the keys are the right ones
    opened(_CHUNK, *sealed(_CHUNK, b"any", RAW, KeyRing.from_text(f"8:{'5a' * 16}")), 300, keys)
    with pytest.raises(DamagedPayloadError, match="cannot be decrypted"):
        opened(_CHUNK, forged(header, body, **changes[field]), body, 300, keys)


@pytest.mark.parametrize(
    "changes",
    [
        {"length": 0},
        {"length": MAX_PAYLOAD + 1},
        {"length": MAX_PAYLOAD + 1, "stored": MAX_PAYLOAD + 1},
        {"length": 2**32 - 1, "codec": 1},
        {"stored": 2**32 - 1},
        {"stored": 0},
        {"key_id": 1},
        {"values": 0},
        {"values": 2},
        {"version": 1},
        {"codec": 5},
        {"codec": 1, "length": 7},
        {"codec": 3},
    ],
)
def test_an_impossible_header_is_refused_before_anything_is_allocated(changes: dict[str, int]) -> None:
    """Lengths out of bounds, or that do not go together, cost nothing even where the checks were forged."""
    header = forged(seal(_CHUNK, b"payload", RAW)[0], b"payload", **changes)
    tracemalloc.start()
    try:
        with pytest.raises(DamagedPayloadError):
            read_header(_CHUNK, header)
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("claimed", [1 << 20, MAX_PAYLOAD, 2**31 - 1])
def test_a_bomb_does_not_go_off(claimed: int) -> None:
    """A body that says it unpacks to more than the header says is refused: nothing behind the target is touched."""
    header, body = sealed(_CHUNK, _PAYLOAD, _ZSTD)
    bomb = body[:4] + struct.pack("<i", claimed) + body[8:]
    with pytest.raises(DamagedPayloadError):
        opened(_CHUNK, forged(header, bomb), bomb, len(_PAYLOAD))
    zeros = sealed(_CHUNK, bytes(1 << 20), _ZSTD)[1]
    with pytest.raises(DamagedPayloadError):
        opened(_CHUNK, forged(header, zeros), zeros, len(_PAYLOAD))


def test_a_payload_belongs_to_its_context() -> None:
    """Brought from another namespace, a payload is damaged there, encrypted or not, though its chunk is the same."""
    for keys in (None, KeyRing.from_text(f"7:{'5a' * 16}")):
        header, body = seal(_CHUNK, b"payload", RAW, keys, context=b"a" * 16)
        target = memoryview(bytearray(7))
        assert open_into(_CHUNK, header, body, target, keys, context=b"a" * 16) == 7
        for other in (b"b" * 16, b""):
            with pytest.raises(DamagedPayloadError, match="another chunk or namespace"):
                open_into(_CHUNK, header, body, target, keys, context=other)


def test_encryption_covers_the_context() -> None:
    """Whoever can make both checks still cannot bring an encrypted payload to another namespace."""
    keys = KeyRing.from_text(f"7:{'5a' * 16}")
    header, body = sealed(_CHUNK, b"payload", RAW, keys)
    opened(_CHUNK, header, body, 7, keys)
    stolen, _ = seal(_CHUNK, b"payload", RAW, keys, context=b"a" * 16)
    bound = b"b" * 16 + _CHUNK
    start = stolen[:28] + struct.pack("<I", xxhash.xxh3_64_intdigest(bound + stolen[:28]) & 0xFFFFFFFF)
    whole = start + struct.pack("<Q", xxhash.xxh3_64_intdigest(bound + start + bytes(body)))
    with pytest.raises(DamagedPayloadError, match="cannot be decrypted"):
        open_into(_CHUNK, whole, body, memoryview(bytearray(7)), keys, context=b"b" * 16)


@pytest.mark.parametrize("codec", [_ZSTD, codec_named("lz4")])
def test_what_shrinks_like_a_bomb_is_stored_raw(codec: Any) -> None:
    """No payload is stored in less than a 256th of its length, so that a reader can refuse whatever claims to be."""
    for size in (100, 8 << 10, 1 << 20):
        header, body = seal(_CHUNK, bytes(size), codec)
        told = read_header(_CHUNK, header)
        assert size <= 256 * told.stored
        assert opened(_CHUNK, header, bytes(body), size) == bytes(size)


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec is not RAW])
def test_a_small_target_is_told(codec: Any) -> None:
    """A target that is too small, or cannot be written, is the caller's mistake, and both sizes are named."""
    header, body = sealed(_CHUNK, _PAYLOAD, codec)
    with pytest.raises(InvalidInputError, match=r"too small: it has 799 bytes for a payload of 800"):
        open_into(_CHUNK, header, body, memoryview(bytearray(799)))
    with pytest.raises(InvalidInputError, match="read-only"):
        open_into(_CHUNK, header, body, memoryview(bytes(800)))


def test_raw_payloads_are_not_copied() -> None:
    """The body of a raw payload is the caller's memory, also where packing would not have helped."""
    noise = np.random.default_rng(1).integers(0, 256, 4096, dtype=np.uint8)
    for payload, codec in ((np.zeros((8, 512), np.float16), RAW), (noise, _ZSTD), (noise, codec_named("lz4"))):
        header, body = seal(_CHUNK, cast("Any", payload), codec)
        assert np.shares_memory(np.frombuffer(cast("memoryview", body), np.uint8), payload)
        assert read_header(_CHUNK, header).codec is RAW


def test_a_body_that_lies_in_the_target_is_only_verified() -> None:
    """8 MiB received into the target are opened where they are; damage there is found."""
    target = memoryview(bytearray(b"kv" * (4 << 20)))
    header, _ = seal(_CHUNK, target[: 8 << 20], RAW)
    tracemalloc.start()
    try:
        for body in (target, target[: 8 << 20], target.obj):
            assert open_into(_CHUNK, header, cast("memoryview", body), target) == 8 << 20
        assert open_into(_CHUNK, header, target.toreadonly(), target) == 8 << 20
        assert tracemalloc.get_traced_memory()[1] < 64 << 10
    finally:
        tracemalloc.stop()
    assert target == b"kv" * (4 << 20)
    target[5] ^= 1
    with pytest.raises(DamagedPayloadError):
        open_into(_CHUNK, header, target, target)


def test_other_overlaps_are_refused() -> None:
    """What must be unpacked or decrypted cannot lie in its target, nor a raw body elsewhere in it."""
    for codec, keys, start in ((_ZSTD, None, 0), (RAW, _KEYS, 0), (RAW, None, 8)):
        header, body = sealed(_CHUNK, _PAYLOAD, codec, keys)
        target = memoryview(bytearray(2000))
        target[start : start + len(body)] = body
        with pytest.raises(InvalidInputError, match="overlaps"):
            open_into(_CHUNK, header, target[start : start + len(body)], target, keys)
        assert open_into(_CHUNK, header, target[start : start + len(body)], target[1000:], keys) == len(_PAYLOAD)
        assert target[1000:1800] == _PAYLOAD


@pytest.mark.parametrize(("codec", "keys"), _KINDS)
def test_memory_is_bounded(codec: Any, keys: KeyRing | None) -> None:
    """Opening 8 MiB into a buffer takes no more than the decrypted body besides, and nothing without packing."""
    payload = np.arange(4 << 20, dtype=np.uint16) % 1000
    target = memoryview(bytearray(8 << 20))
    header, body = sealed(_CHUNK, payload, codec, keys)
    opened(_CHUNK, *sealed(_CHUNK, _PAYLOAD, codec, keys), len(_PAYLOAD), keys)  # imports what it needs
    tracemalloc.start()
    try:
        assert open_into(_CHUNK, header, body, target, keys) == 8 << 20
        allowed = len(body) if keys and codec is not RAW else 0
        assert tracemalloc.get_traced_memory()[1] < allowed + (64 << 10)
    finally:
        tracemalloc.stop()
    assert target == payload.tobytes()


def test_what_is_no_payload_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty, too large, scattered and strange payloads, and hashes of another size, are told apart."""
    strange = np.zeros(4, "datetime64[s]")
    for payload in (np.zeros((4, 4))[:, ::2], "text", strange):
        with pytest.raises(InvalidInputError, match="contiguous"):
            seal(_CHUNK, cast("Any", payload), RAW)
    with pytest.raises(InvalidInputError, match="1 byte to 512 MiB"):
        seal(_CHUNK, b"", RAW)
    monkeypatch.setattr(envelope, "MAX_PAYLOAD", 10)
    with pytest.raises(InvalidInputError, match="not 11 bytes"):
        seal(_CHUNK, bytes(11), RAW)
    for chunk in (b"", bytes(15), bytes(17)):
        with pytest.raises(InvalidInputError, match="16 bytes"):
            seal(chunk, b"payload", RAW)
        with pytest.raises(InvalidInputError, match="16 bytes"):
            read_header(chunk, bytes(HEADER_BYTES))


@given(st.binary(max_size=80))
def test_noise_is_no_payload(noise: bytes) -> None:
    """Whatever bytes come back from a server, the answer is a payload or DamagedPayloadError."""
    for value in (noise, b"DPKV" + noise, b"DPKV\x01" + noise):
        with pytest.raises(DamagedPayloadError):
            opened(_CHUNK, value[:HEADER_BYTES], value[HEADER_BYTES:], 64)
