"""The header before every stored payload, and what it proves. Pure: no Redis, no clock.

40 bytes, little endian: magic ``DPKV`` · version u8 · codec u8 · values u16, in how many the payload is stored · key id
u32 (0: not encrypted) · unpacked length u32 · stored length u32 · upload, 8 bytes that tell this writing of the payload
from every other · check u32, of the context, the chunk's hash and all before · checksum u64, of the context, the
chunk's hash, all before and the stored bytes. Both are xxh3_64, the first cut to its low half. The context is 16 bytes
made of the namespace's key (`ChunkHasher.payload_context`): it covers the namespace's name, its identity and the salt.

So a payload that was flipped, cut, given another codec, put under another chunk's key or brought from another
namespace is found; the check finds what is wrong with the header alone, before its lengths are used. It takes
encryption to find all that an attacker may change: AES-GCM covers the context, the chunk's hash, the header and, as one
body, all values in their order.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, NamedTuple

import xxhash

from distprefix.chunking import HASH_BYTES
from distprefix.errors import DamagedPayloadError, InvalidInputError, UnreadablePayloadError
from distprefix.tiers.codecs import RAW, Codec, codec_numbered
from distprefix.tiers.encryption import OVERHEAD, KeyRing

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = [
    "HEADER_BYTES",
    "MAX_PAYLOAD",
    "PART_BYTES",
    "UPLOAD_BYTES",
    "Header",
    "longest_stored",
    "open_into",
    "parts_of",
    "read_header",
    "seal",
    "upload_of",
]

MAX_PAYLOAD = 512 << 20
_MAGIC = b"DPKV"
_VERSION = 3
UPLOAD_BYTES = 8
PART_BYTES = 8 * 1024 * 1024
"""Longer payloads are several values: a server that copies one of 512 MiB answers no other call meanwhile."""
_FIELDS = struct.Struct("<4sBBHIII8s")
_CHECK, _CHECKSUM = struct.Struct("<I"), struct.Struct("<Q")
_PROVEN = _FIELDS.size + _CHECK.size
HEADER_BYTES = _PROVEN + _CHECKSUM.size


class Header(NamedTuple):
    """What a header says."""

    codec: Codec
    key_id: int
    """0: not encrypted."""
    length: int
    """Bytes of the payload."""
    stored: int
    """Bytes that follow the header."""
    upload: bytes
    """Of which writing this is: parts of a long payload belong together only when they are of the same."""
    checksum: int


def parts_of(stored: int) -> int:
    """In how many values a payload is stored that has so many bytes behind its header."""
    return -(-(HEADER_BYTES + stored) // PART_BYTES)


def upload_of(data: Buffer) -> tuple[bytes, int]:
    """The upload that the header at the start of `data` names, and in how many values its payload is stored.

    For who looks after keys and does not know what payloads are bound to: nothing is proved. What is no header belongs
    to one value.
    """
    start = bytes(memoryview(data)[:HEADER_BYTES])
    if len(start) < HEADER_BYTES:
        return bytes(UPLOAD_BYTES), 1
    magic, version, _, _, _, _, stored, upload = _FIELDS.unpack_from(start)
    if magic != _MAGIC or version != _VERSION:
        return bytes(UPLOAD_BYTES), 1
    return upload, parts_of(min(stored, MAX_PAYLOAD + OVERHEAD))


def longest_stored(length: int) -> int:
    """The most bytes that a payload of this length takes in Redis, header and all: what codecs do not pack is raw."""
    return HEADER_BYTES + OVERHEAD + length


def seal(
    chunk: bytes,
    payload: Buffer,
    codec: Codec,
    keys: KeyRing | None = None,
    upload: bytes = bytes(UPLOAD_BYTES),
    *,
    context: bytes = b"",
) -> tuple[bytes, Buffer]:
    """Header and body to store for a chunk. The body is the caller's own memory if nothing is packed or encrypted.

    What a codec cannot make smaller is stored raw, and so is what it makes so small that a reader could not tell it
    from a bomb. With `keys`, the active one encrypts. `upload` tells this writing from every other; `context` is what
    the payload is bound to besides its chunk.
    """
    _check_chunk(chunk)
    data = _bytes_of(payload, "a payload")
    if not 0 < len(data) <= MAX_PAYLOAD:
        raise InvalidInputError(f"a payload has 1 byte to {MAX_PAYLOAD >> 20} MiB, not {len(data)} bytes")
    body = memoryview(codec.encode(data))
    if codec is not RAW and not (len(body) < len(data) and codec.fits(len(data), len(body))):
        codec = RAW
        body = data
    stored = len(body) + (OVERHEAD if keys else 0)
    key_id = keys.active if keys else 0
    fields = _FIELDS.pack(_MAGIC, _VERSION, codec.number, parts_of(stored), key_id, len(data), stored, upload)
    bound = context + chunk
    proven = fields + _CHECK.pack(_check(bound, fields))
    if keys:
        body = memoryview(keys.encrypt(body, bound + proven))
    return proven + _CHECKSUM.pack(_checksum(bound, proven, body)), body


def read_header(chunk: bytes, data: Buffer, *, context: bytes = b"") -> Header:
    """What the header at the start of `data` says; DamagedPayloadError if it is none, or not that of this chunk here.

    Its lengths are within bounds and go together with its codec.
    """
    _check_chunk(chunk)
    start = bytes(memoryview(data)[:HEADER_BYTES])
    if len(start) < HEADER_BYTES:
        raise DamagedPayloadError(f"the payload was cut: {len(start)} bytes are less than its header")
    magic, version, number, values, key_id, length, stored, upload = _FIELDS.unpack_from(start)
    if magic != _MAGIC:
        raise DamagedPayloadError("the payload does not begin with a header")
    if version != _VERSION:
        raise DamagedPayloadError(f"the payload has a header of version {version}: {_VERSION} can be read")
    if _CHECK.unpack_from(start, _FIELDS.size)[0] != _check(context + chunk, start[: _FIELDS.size]):
        raise DamagedPayloadError("the payload's header is damaged, or that of another chunk or namespace")
    codec = codec_numbered(number)
    if codec is None:
        raise DamagedPayloadError(f"the payload is packed with codec number {number}, which is not known")
    packed = stored - OVERHEAD if key_id else stored
    is_possible = 0 < packed <= length <= MAX_PAYLOAD and values == parts_of(stored) and codec.fits(length, packed)
    if not is_possible:
        raise DamagedPayloadError(f"the payload's header is impossible: {length} bytes as {stored} by {codec.name!r}")
    return Header(codec, key_id, length, stored, upload, *_CHECKSUM.unpack_from(start, _PROVEN))


def open_into(
    chunk: bytes,
    header: Buffer,
    body: Buffer,
    target: memoryview,
    keys: KeyRing | None = None,
    told: Header | None = None,
    *,
    context: bytes = b"",
) -> int:
    """Verify a stored payload and put it at the start of `target`; returns its length.

    `told` is what `read_header` says of the header, where the caller has asked already.

    `body` may already be the memory at the start of `target`: a raw payload is then only verified. Any other overlap
    of the two is refused with InvalidInputError, as is a target that is too small. Raises DamagedPayloadError for what
    is not the payload that was stored for this chunk; what `target` holds is undefined then. UnreadablePayloadError
    says that it is, and cannot be opened with these `keys`; ConfigError that the library of its codec is not installed.
    """
    told = told or read_header(chunk, header, context=context)
    bound = context + chunk
    stored, filled = _bytes_of(body, "a body"), _bytes_of(target, "a target")
    if len(stored) != told.stored:
        raise DamagedPayloadError(f"the payload has {len(stored)} bytes behind its header instead of {told.stored}")
    if filled.readonly or len(filled) < told.length:
        kind = "read-only" if filled.readonly else "too small"
        raise InvalidInputError(f"the target is {kind}: it has {len(filled)} bytes for a payload of {told.length}")
    filled = filled[: told.length]
    proven = bytes(memoryview(header)[:_PROVEN])
    if _checksum(bound, proven, stored) != told.checksum:
        raise DamagedPayloadError("the payload's checksum does not hold: it is damaged, or not of this chunk here")
    if bool(told.key_id) != bool(keys):
        kind = f"encrypted with key {told.key_id}, and no keys are" if told.key_id else "not encrypted, but keys are"
        raise UnreadablePayloadError(f"the payload is {kind} configured")
    apart = 0 if body is target else _distance(stored, filled)
    if apart == 0 and told.codec is RAW and not told.key_id:
        return told.length
    if apart is not None and -len(stored) < apart < len(filled):
        raise InvalidInputError("the body overlaps the target: only a raw payload may lie there, and at its start")
    if keys and told.codec is RAW:
        keys.decrypt(told.key_id, stored, bound + proven, filled)
        return told.length
    if keys:
        packed = memoryview(bytearray(told.stored - OVERHEAD))
        keys.decrypt(told.key_id, stored, bound + proven, packed)
        stored = packed
    told.codec.decode(stored, filled)
    return told.length


def _check_chunk(chunk: bytes) -> None:
    if len(chunk) != HASH_BYTES:
        raise InvalidInputError(f"a chunk hash has {HASH_BYTES} bytes, not {len(chunk)}")


def _bytes_of(buffer: Buffer, what: str) -> memoryview:
    """Its memory as bytes, not copied."""
    try:
        return memoryview(buffer).cast("B")
    except (TypeError, ValueError):
        raise InvalidInputError(
            f"{what} cannot be {type(buffer).__name__}: pass a contiguous buffer (of an array whose dtype is not "
            "NumPy's own, pass its .view(numpy.uint8))"
        ) from None


def _distance(one: memoryview, other: memoryview) -> int | None:
    """How many bytes `one` begins behind `other`; None if `one` is read-only, which a target never is."""
    if one.readonly:
        return None
    first, second = (ctypes.addressof(ctypes.c_char.from_buffer(view)) for view in (one, other))
    return first - second


def _check(bound: bytes, fields: bytes) -> int:
    return xxhash.xxh3_64_intdigest(bound + fields) & 0xFFFFFFFF


def _checksum(bound: bytes, proven: bytes, body: memoryview) -> int:
    state = xxhash.xxh3_64(bound + proven)
    state.update(body)
    return state.intdigest()
