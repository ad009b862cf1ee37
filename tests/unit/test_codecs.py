"""How payloads are packed: every bit back, or as near as fp8 comes; hostile bodies; libraries only when used."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distprefix.errors import ConfigError, DamagedPayloadError, InvalidInputError
from distprefix.tiers import codecs
from distprefix.tiers.codecs import CODECS, codec_named, codec_numbered

_PACKING = [codec_named("zstd"), codec_named("lz4")]
_FP8: list[tuple[Any, Any]] = [
    (codec_named("fp8-bf16"), np.dtype(ml_dtypes.bfloat16)),
    (codec_named("fp8-fp16"), np.dtype(np.float16)),
]


def values(dtype: Any, count: int = 50_000) -> memoryview:
    """Numbers as K and V have them."""
    numbers = np.random.default_rng(5).normal(0, 1, count)
    return memoryview(numbers.astype(dtype).tobytes())


def back(codec: Any, body: Any, size: int) -> bytes:
    """What a body unpacks to; nothing behind it is touched."""
    room = memoryview(bytearray(b"\xee" * (size + 64)))
    try:
        codec.decode(memoryview(body), room[:size])
    finally:
        assert room[size:] == b"\xee" * 64
    return bytes(room[:size])


def test_names_and_numbers_stay() -> None:
    """Numbers are written into every header: they mean the same for ever."""
    assert [(codec.number, codec.name) for codec in CODECS] == [
        (0, "raw"),
        (1, "zstd"),
        (2, "lz4"),
        (3, "fp8-bf16"),
        (4, "fp8-fp16"),
    ]
    assert [codec_numbered(number) for number in range(5)] == list(CODECS)
    assert codec_numbered(5) is codec_numbered(255) is None


def test_an_unknown_name_is_told() -> None:
    """There is no fp8 without the source dtype, and no other name than those that the message lists."""
    for name in ("fp8", "ZSTD", "", "gzip"):
        with pytest.raises(ConfigError, match="allowed are raw, zstd, lz4, fp8-bf16, fp8-fp16"):
            codec_named(name)


@pytest.mark.parametrize("name", ["zstd", "lz4", "fp8-bf16", "fp8-fp16"])
def test_what_to_install_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its library a codec is refused by name, with the command that installs it; raw needs nothing."""
    monkeypatch.setattr(codecs, "find_spec", lambda _module: None)  # pyright: ignore[reportUnknownLambdaType]
    with pytest.raises(ConfigError, match=rf"{name}.*pip install 'distprefix\[payloads\]'"):
        codec_named(name)
    assert codec_named("raw") is CODECS[0]


def test_a_library_that_went_away_is_told() -> None:
    """A payload of a codec whose library is not there on this node gives ConfigError, not a damaged payload."""
    code = (
        "import sys; sys.modules.update(blosc2=None, ml_dtypes=None)\n"
        "from distprefix.errors import ConfigError\n"
        "from distprefix.tiers.codecs import CODECS\n"
        "for codec in CODECS[1:]:\n"
        "    try: codec.decode(memoryview(bytes(66)), memoryview(bytearray(124)))\n"
        "    except ConfigError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.count("pip install 'distprefix[payloads]'") == 4


def test_libraries_are_imported_only_when_used() -> None:
    """Whoever stores raw payloads, unencrypted, loads none of them."""
    code = (
        "import sys\n"
        "from distprefix.tiers import codecs, encryption, envelope\n"
        "codec = codecs.codec_named('raw')\n"
        "header, body = envelope.seal(bytes(16), b'payload', codec)\n"
        "assert envelope.open_into(bytes(16), header, body, memoryview(bytearray(7))) == 7\n"
        "print({'blosc2', 'ml_dtypes', 'numpy'} & set(sys.modules))\n"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert told.strip() == "set()"


@pytest.mark.parametrize("codec", _PACKING)
@pytest.mark.parametrize(("dtype", "ratio"), [(ml_dtypes.bfloat16, 1.2), (np.float16, 1.01)])
def test_floats_get_smaller(codec: Any, dtype: Any, ratio: float) -> None:
    """Packing is real: what the library writes is recognised as its own, and smaller."""
    payload = values(dtype)
    body = codec.encode(payload)
    assert len(payload) / len(body) > ratio
    assert codec.fits(len(payload), len(body))
    assert back(codec, body, len(payload)) == payload


@pytest.mark.parametrize("codec", _PACKING)
@given(payload=st.binary(min_size=1, max_size=5000) | st.binary(min_size=1, max_size=9).map(lambda part: part * 999))
def test_every_bit_comes_back(codec: Any, payload: bytes) -> None:
    """Any bytes, of odd sizes too, come back; what the library does not pack is handed back as it is."""
    body = codec.encode(memoryview(payload))
    if len(body) < len(payload):
        assert back(codec, body, len(payload)) == payload


@pytest.mark.parametrize("codec", _PACKING)
def test_hostile_bodies_do_no_harm(codec: Any) -> None:
    """Bytes changed behind the back of the checksum give an error or wrong bytes, but only in the target."""
    payload = values(np.float16, 3000)
    body, rng = codec.encode(payload), np.random.default_rng(3)
    refused = 0
    for i in range(2000):
        changed = bytearray(body)
        places = [i % 64] if i < 1000 else rng.integers(32, len(body), 3).tolist()
        for place in places:
            changed[place] = int(rng.integers(256))
        try:
            back(codec, changed, len(payload))
        except DamagedPayloadError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize("codec", _PACKING)
@pytest.mark.parametrize(("place", "value"), [(4, 255), (12, 1), (16, 3), (22, 160), (30, 1), (31, 0x40), (31, 8)])
def test_only_what_it_writes_itself_reaches_the_library(codec: Any, place: int, value: int) -> None:
    """Other sizes, filters, compressors (some load plug-ins) and kinds (one writes nothing at all) are refused."""
    body = bytearray(codec.encode(values(np.float16, 3000)))
    body[place] = value
    with pytest.raises(DamagedPayloadError, match="not what codec"):
        back(codec, body, 6000)


def test_a_setting_from_outside_does_not_spoil_payloads() -> None:
    """Blosc2 heeds variables of the environment: what it then writes is not stored as if it were ours."""
    code = (
        "import sys\n"
        "from distprefix.tiers.codecs import codec_named\n"
        "payload = memoryview(bytes(range(256)) * 64)\n"
        "codec, target = codec_named('zstd'), memoryview(bytearray(len(payload)))\n"
        "body = codec.encode(payload)\n"
        "if len(body) < len(payload): codec.decode(memoryview(body), target)\n"
        "else: target[:] = body\n"
        "assert target == payload\n"
    )
    for name, value in (("BLOSC_FILTER", "NOSHUFFLE"), ("BLOSC_COMPRESSOR", "lz4"), ("BLOSC_TYPESIZE", "4")):
        subprocess.run([sys.executable, "-c", code], check=True, env={name: value})


def test_threads_do_not_disturb_each_other() -> None:
    """Many threads pack and unpack at a time."""
    payloads = [values(np.float16, 20_000 + i) for i in range(16)]
    with ThreadPoolExecutor(8) as pool:
        for codec in _PACKING:
            bodies = list(pool.map(codec.encode, payloads * 4))
            sizes = [len(payload) for payload in payloads] * 4
            assert list(pool.map(back, [codec] * 64, bodies, sizes)) == payloads * 4


@pytest.mark.parametrize(("codec", "dtype"), _FP8)
@given(
    numbers=st.lists(st.floats(-60_000, 60_000, width=16) | st.floats(-1, 1, width=16), min_size=1, max_size=400),
    exponent=st.integers(-20, 0),
)
def test_fp8_is_near(codec: Any, dtype: Any, numbers: list[float], exponent: int) -> None:
    """Each value is within a sixteenth of itself, or within a step of the smallest that its block can hold."""
    given = (np.array(numbers) * 2.0**exponent).astype(dtype)
    body = codec.encode(memoryview(given.tobytes()))
    assert codec.fits(given.nbytes, len(body))
    got = np.frombuffer(back(codec, body, given.nbytes), np.uint16).view(dtype).astype(np.float64)
    exact = given.astype(np.float64)
    for start in range(0, len(exact), 128):
        block = exact[start : start + 128]
        step = max(float(np.abs(block).max()) / 448, 2.0**-126) / 512
        floor = 2.0**-24 if dtype == np.float16 else 0
        allowed = np.maximum(np.abs(block) * (1 / 16 + 1 / 128), step) + floor
        assert (np.abs(got[start : start + 128] - block) <= allowed).all()


@pytest.mark.parametrize(("codec", "dtype"), _FP8)
def test_fp8_halves(codec: Any, dtype: Any) -> None:
    """A payload of several pieces and a tail takes half the bytes and 4 a block of 128."""
    payload = values(dtype, 300_007)
    body = codec.encode(payload)
    assert len(body) == 300_007 + 4 * 2344
    got = np.frombuffer(back(codec, body, len(payload)), np.uint16).view(dtype).astype(np.float32)
    exact = np.frombuffer(payload, np.uint16).view(dtype).astype(np.float32)
    assert float(np.sqrt(((got - exact) ** 2).mean() / (exact**2).mean())) < 0.03


@pytest.mark.parametrize(("codec", "dtype"), _FP8)
def test_fp8_holds_the_ends(codec: Any, dtype: Any) -> None:
    """Zeros, the smallest and the largest of the dtype survive; infinities and NaN are refused rather than changed."""
    info = ml_dtypes.finfo(dtype)
    for number in (0.0, float(info.max), float(info.min), float(info.smallest_normal)):
        given = np.full(130, number).astype(dtype)
        assert back(codec, codec.encode(memoryview(given.tobytes())), 260) == given.tobytes()
    for number in (np.inf, -np.inf, np.nan):
        given = np.array([1, number, 2]).astype(dtype)
        with pytest.raises(InvalidInputError, match="infinities or NaN"):
            codec.encode(memoryview(given.tobytes()))
    with pytest.raises(InvalidInputError, match="33 bytes"):
        codec.encode(memoryview(bytes(33)))


@pytest.mark.parametrize(("codec", "dtype"), _FP8)
@given(body=st.binary(max_size=1200), size=st.integers(1, 2000))
def test_hostile_fp8_bodies_do_no_harm(codec: Any, dtype: Any, body: bytes, size: int) -> None:
    """Bodies of any bytes fill the target or are refused, without a warning."""
    fitting = (body * 2000)[: size + 4 * -(-size // 128)] if body else b""
    for one in (body, fitting):
        try:
            back(codec, one, 2 * size)
        except DamagedPayloadError:
            continue
        assert len(one) == size + 4 * -(-size // 128)
