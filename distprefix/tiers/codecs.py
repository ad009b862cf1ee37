"""How payloads are packed. Pure: no Redis, no clock; the libraries come with distprefix[payloads], imported when used.

Only what a codec itself writes is handed to its library: sizes, filters and compressor of a body are looked at first.
Blosc2 works in one thread a call and, from the first use on, without the interpreter's lock (for all its users in the
process). All codecs but those named fp8 give back every bit. They expect 2-byte items, as bf16 and fp16 are, and take
any other bytes as well.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

from distprefix.errors import ConfigError, DamagedPayloadError, InvalidInputError

__all__ = ["CODECS", "RAW", "Codec", "codec_named", "codec_numbered"]

_CHUNK = struct.Struct("<4B3i7B7x2B")
"""How a chunk of Blosc2 begins: versions, flags, item size; three sizes; filters and compressor; more flags."""
_ITEM = 2
_VERSION = 5
_ORDINARY = (0x00, 0x10)
"""The last of these flags: packed bytes, zeros. Among the others is one that leaves its target as it was."""
_BLOCK = 128
"""Values that share one scale: the size of a head in most models."""
_PIECE = 1024 * _BLOCK
_E4M3_MAX = 448
_MAX_EXPANSION = 256
"""So many times its stored size a payload unpacks to at most: what claims more is a bomb. KV caches shrink by half."""


class Codec(NamedTuple):
    """One way to pack payloads."""

    name: str
    number: int
    """What the header says."""
    encode: Callable[[memoryview], memoryview | bytes | bytearray]
    """Gives back what it was given, or more bytes, where it cannot pack."""
    decode: Callable[[memoryview, memoryview], None]
    """Fills a buffer of just the unpacked size; DamagedPayloadError if the body is none of its own."""
    fits: Callable[[int, int], bool]
    """Whether so many bytes, unpacked, can be so many packed."""
    needs: tuple[str, ...] = ()
    """Modules that must be installed."""


def codec_named(name: str) -> Codec:
    """The codec of this name; ConfigError if there is none, or if what it needs is not installed."""
    codec = next((codec for codec in CODECS if codec.name == name), None)
    if codec is None:
        raise ConfigError(f"there is no codec {name!r}: allowed are {', '.join(one.name for one in CODECS)}")
    missing = [module for module in codec.needs if find_spec(module) is None]
    if missing:
        raise _not_installed(name, " and ".join(missing))
    return codec


def codec_numbered(number: int) -> Codec | None:
    """The codec that a header names."""
    return CODECS[number] if number < len(CODECS) else None


def _not_installed(who: str, what: str) -> ConfigError:
    return ConfigError(f"codec {who!r} needs {what}: pip install 'distprefix[payloads]'")


def _load(who: str, module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise _not_installed(who, module) from None


def _as_it_is(payload: memoryview) -> memoryview:
    return payload


def _copy(body: memoryview, target: memoryview) -> None:
    target[:] = body


def _same(raw: int, stored: int) -> bool:
    return stored == raw


def _smaller(raw: int, stored: int) -> bool:
    return _CHUNK.size <= stored < raw <= _MAX_EXPANSION * stored


def _blosc(name: str, number: int, compressor: str, level: int, chosen: str, form: int) -> Codec:
    """A codec of Blosc2; `form` is how its chunks number the compressor."""

    @cache
    def library() -> tuple[Any, dict[str, Any], list[int]]:
        blosc2 = _load(name, "blosc2")
        blosc2.set_releasegil(True)
        shuffle, codec = blosc2.Filter[chosen], blosc2.Codec[compressor]
        settings = {"codec": codec, "clevel": level, "filters": [shuffle], "filters_meta": [0]}
        return blosc2, {**settings, "typesize": _ITEM, "nthreads": 1}, [shuffle.value, 0, 0, 0, 0, 0, codec.value]

    def is_own(body: memoryview, raw: int) -> bool:
        if len(body) < _CHUNK.size:
            return False
        version, _, flags, item, unpacked, block, packed, *steps, zero, kind = _CHUNK.unpack_from(body)
        return (
            (version, unpacked, packed, item, flags >> 5, zero) == (_VERSION, raw, len(body), _ITEM, form, 0)
            and 0 < block <= raw
            and steps == library()[2]
            and kind in _ORDINARY
        )

    def encode(payload: memoryview) -> memoryview | bytes:
        blosc2, settings, _ = library()
        try:
            body: bytes = blosc2.compress2(payload, **settings)
        except RuntimeError:  # nothing that this payload or another one could not do without
            return payload
        return body if is_own(memoryview(body), len(payload)) else payload  # as when BLOSC_FILTER is in the environment

    def decode(body: memoryview, target: memoryview) -> None:
        blosc2, _, _ = library()
        if not is_own(body, len(target)):  # the library itself trusts the size in the chunk, not that of the target
            raise DamagedPayloadError(f"the body is not what codec {name!r} writes for {len(target)} bytes")
        try:
            blosc2.decompress2(body, dst=target, nthreads=1)
        except (RuntimeError, ValueError) as error:
            raise DamagedPayloadError(f"codec {name!r} cannot read the body: {error}") from None

    return Codec(name, number, encode, decode, _smaller, ("blosc2",))


class _Float8:
    """Values as float8_e4m3fn behind one float32 scale for each 128 of them."""

    def __init__(self, name: str, source: str) -> None:
        self._name, self._source = name, source

    def encode(self, payload: memoryview) -> bytearray:
        numpy, wide, narrow, codes_of, _ = _float8(self._name, self._source)
        if len(payload) % _ITEM:
            raise InvalidInputError(f"codec {self._name!r} packs 2-byte values: {len(payload)} bytes are no such")
        values = numpy.frombuffer(payload, numpy.uint16).view(wide)
        body = bytearray(_float8_size(len(payload)))
        scales, codes = _scales_and_codes(numpy, body, len(values))
        for at, blocks in _pieces(len(values)):
            piece = _in_blocks(numpy, values[at].astype(numpy.float32))
            most = numpy.abs(piece).max(axis=1)
            if not numpy.isfinite(most).all():
                raise InvalidInputError(f"codec {self._name!r} cannot hold infinities or NaN: choose a lossless one")
            scales[blocks] = scale = numpy.maximum(most / _E4M3_MAX, numpy.finfo(numpy.float32).tiny)
            near = (piece / scale[:, None]).astype(narrow).view(numpy.uint16).reshape(-1)[: len(codes[at])]
            numpy.take(codes_of, near, out=codes[at], mode="clip")
        return body

    def decode(self, body: memoryview, target: memoryview) -> None:
        numpy, wide, _, _, values_of = _float8(self._name, self._source)
        if not _fits_float8(len(target), len(body)):
            raise DamagedPayloadError(f"the body is not what codec {self._name!r} writes for {len(target)} bytes")
        values = numpy.frombuffer(target, numpy.uint16)
        scales, codes = _scales_and_codes(numpy, body, len(values))
        if not numpy.isfinite(scales).all():
            raise DamagedPayloadError(f"the body has a scale that codec {self._name!r} never writes")
        with numpy.errstate(all="ignore"):  # forged scales may be of any size
            for at, blocks in _pieces(len(values)):
                piece = _in_blocks(numpy, numpy.take(values_of, codes[at], mode="clip")) * scales[blocks][:, None]
                values[at] = piece.reshape(-1)[: len(codes[at])].astype(wide).view(numpy.uint16)


@cache
def _float8(name: str, source: str) -> tuple[Any, Any, Any, Any, Any]:
    """NumPy, the type of the values, bfloat16, the code of each bfloat16, and what each of the 256 codes stands for.

    Rounding to bfloat16 first costs a thirtieth of the precision at most and makes a table of 64 KiB do, which is three
    times faster than a conversion.
    """
    numpy, ml_dtypes = _load(name, "numpy"), _load(name, "ml_dtypes")
    bfloat16, float8 = numpy.dtype(ml_dtypes.bfloat16), numpy.dtype(ml_dtypes.float8_e4m3fn)
    with numpy.errstate(all="ignore"):
        codes_of = numpy.arange(1 << 16, dtype=numpy.uint16).view(bfloat16).astype(float8).view(numpy.uint8)
    values_of = numpy.arange(1 << 8, dtype=numpy.uint8).view(float8).astype(numpy.float32)
    return numpy, numpy.dtype(numpy.float16) if source == "fp16" else bfloat16, bfloat16, codes_of, values_of


def _scales_and_codes(numpy: Any, body: memoryview | bytearray, values: int) -> tuple[Any, Any]:
    blocks = -(-values // _BLOCK)
    return numpy.frombuffer(body, "<f4", blocks), numpy.frombuffer(body, numpy.uint8, values, 4 * blocks)


def _pieces(values: int) -> Iterator[tuple[slice, slice]]:
    """Where values and their scales lie, some at a time, so that what is made of them in between stays small."""
    for start in range(0, values, _PIECE):
        yield slice(start, start + _PIECE), slice(start // _BLOCK, (start + _PIECE) // _BLOCK)


def _in_blocks(numpy: Any, piece: Any) -> Any:
    return numpy.pad(piece, (0, -len(piece) % _BLOCK)).reshape(-1, _BLOCK)


def _float8_size(raw: int) -> int:
    values = raw // _ITEM
    return values + 4 * -(-values // _BLOCK)


def _fits_float8(raw: int, stored: int) -> bool:
    return raw % _ITEM == 0 and stored == _float8_size(raw)


def _fp8(number: int, source: str) -> Codec:
    name = f"fp8-{source}"
    both = _Float8(name, source)
    return Codec(name, number, both.encode, both.decode, _fits_float8, ("numpy", "ml_dtypes"))


RAW = Codec("raw", 0, _as_it_is, _copy, _same)
CODECS = (
    RAW,
    _blosc("zstd", 1, "ZSTD", 1, "SHUFFLE", 4),
    _blosc("lz4", 2, "LZ4", 9, "BITSHUFFLE", 1),
    _fp8(3, "bf16"),
    _fp8(4, "fp16"),
)
"""All codecs, in the order of their numbers, which never change."""
