"""The header of a safetensors file, checked before anything that it says is believed."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from converters.rules import WeightsError

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100 << 20
"""Bytes of the largest header accepted: the limit of the reference implementation."""
MAX_RANK = 32
SHA256 = "modelspec.hash_sha256"
"""Header key of the hash of all bytes after the header, as the ModelSpec convention has it."""


class Spec(NamedTuple):
    """Type and shape of a tensor to come."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class Header(NamedTuple):
    """Attributes:
    spans: name -> type and shape, first byte, byte after the last, both after `start`.
    metadata: strings by name.
    start: where the data begins in the file.
    size: bytes of the data.
    """

    spans: dict[str, tuple[Spec, int, int]]
    metadata: dict[str, str]
    start: int
    size: int


def read_header(path: Path) -> Header:
    """The header of a file, if every byte of the data belongs to exactly one tensor.

    Raises:
      WeightsError: damaged; every reason is listed.
    """
    raw, start, size = _read(path)
    metadata, problems = raw.pop("__metadata__", {}), []
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        problems.append("__metadata__ is not strings by name")
    spans = {}
    for name, entry in raw.items():
        found = _span(name, entry, size)
        if isinstance(found, str):
            problems.append(found)
        else:
            spans[name] = found
    last, before = 0, ""
    for name, (_, begin, end) in sorted(spans.items(), key=lambda kv: kv[1][1:]):
        if begin < last:
            problems.append(f"{name}: overlaps {before}")
        elif begin > last:
            problems.append(f"{begin - last} bytes before {name} belong to no tensor")
        last, before = max(last, end), name
    if not problems and last != size:
        problems.append(f"{size - last} bytes after the last tensor belong to none")
    if problems:
        raise WeightsError(f"damaged safetensors file {path}", problems)
    return Header(spans, metadata, start, size)


def _span(name: str, entry: Any, size: int) -> tuple[Spec, int, int] | str:
    """Where a tensor lies, or what is wrong with what the header says of it."""
    if not name.isprintable():  # nor could it be shown, or written to a terminal
        return f"{name!a}: a name with unprintable characters"
    wanted = ("dtype", "shape", "data_offsets")
    missing = [k for k in wanted if not isinstance(entry, dict) or k not in entry]
    if missing:
        return f"{name}: malformed header entry {ascii(entry)[:200]}: no {missing[0]!r}"
    kind, shape, offsets = (entry[k] for k in wanted)
    if not isinstance(kind, str) or kind not in DTYPES:
        return f"{name}: unknown dtype {ascii(kind)[:40]} (known: {', '.join(DTYPES)})"
    if not isinstance(shape, list) or not isinstance(offsets, list) or len(offsets) != 2:
        return f"{name}: malformed header entry {ascii(entry)[:200]}"
    if len(shape) > MAX_RANK or not all(type(n) is int and n >= 0 for n in (*shape, *offsets)):
        return f"{name}: negative or non-integer shape or offset {ascii(entry)[:200]}"
    (begin, end), spec = offsets, Spec(DTYPES[kind], tuple(shape))
    if max(shape, default=0) >= 1 << 63:
        return f"{name}: a shape of more than 63 bits"
    if end - begin != spec.nbytes:
        return f"{name}: {end - begin} bytes for {kind} {spec.shape}"
    if end > size:
        return (
            f"{name}: lies at bytes {begin}-{end} of a data part of {size} bytes; the file is "
            "truncated: fetch it again"
        )
    return spec, begin, end


def _read(path: Path) -> tuple[dict[str, Any], int, int]:
    """(what the header says, first byte of the data, bytes of the data)."""

    def damaged(reason: str) -> WeightsError:
        return WeightsError(f"damaged safetensors file {path}", [reason])

    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > MAX_HEADER or 8 + length > size:
            raise damaged(
                f"header of {length} bytes in a file of {size} (limit {MAX_HEADER}): not a "
                "safetensors file, a pointer to one, or truncated; fetch it again"
            )
        raw = f.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as e:
        raise damaged(f"the header is not JSON: {ascii(str(e))[:200]}") from None
    if not isinstance(header, dict):
        raise damaged("the header is not a JSON object")
    return header, 8 + length, size - 8 - length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        seen: set[str] = set()
        repeated = sorted({n for n, _ in pairs if n in seen or seen.add(n)})
        raise ValueError(f"repeated names {repeated[:5]}")
    return out


def text_of(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Header metadata as the format has it: values other than strings become JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in metadata.items()}
