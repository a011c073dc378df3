"""Safetensors files: memory-mapped reading with a checked header, atomic streamed writing."""

import json
import os
import re
from collections.abc import Callable, Mapping
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
MAX_SHARD = 10 << 30
"""Default bytes of the largest file written, as diffusers has it."""
PT = {"format": "pt"}
"""Header metadata that transformers asks for."""
INDEX = ".index.json"


class Spec(NamedTuple):
    """Type and shape of a tensor to come."""

    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * int(np.prod(self.shape, dtype=np.int64))


class Tensors(dict[str, np.ndarray]):
    """Name -> array, memory-mapped and read-only where it comes from a safetensors file.

    Attributes:
      where: the file or folder, for messages.
      metadata: of the header; empty where there is none.
    """

    def __init__(self, items, where: str = "memory", metadata: Mapping[str, str] | None = None):
        super().__init__(items)
        self.where, self.metadata = where, dict(metadata or {})


def open_file(path: str | Path) -> Tensors:
    """Maps one safetensors file; no tensor is read until it is indexed or copied.

    Raises:
      WeightsError: the header is damaged or does not describe the file.
    """
    path = Path(path)
    header, start = _header(path)
    size = path.stat().st_size - start
    metadata = header.pop("__metadata__", {})
    specs, problems = {}, []
    for name, entry in header.items():
        try:
            dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
            begin, end = entry["data_offsets"]
            spec = Spec(dtype, shape)
            if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)):
                problems.append(f"{name}: negative or non-integer shape or offset {entry}")
            elif end - begin != spec.nbytes:
                problems.append(f"{name}: {end - begin} bytes for {entry['dtype']} {shape}")
            elif end > size:
                problems.append(
                    f"{name}: lies at bytes {begin}-{end} of a data part of {size} bytes; the file "
                    "is truncated: fetch it again"
                )
            else:
                specs[name] = spec, begin, end
        except KeyError as e:
            known = ", ".join(DTYPES)
            problems.append(f"{name}: no or unknown {e.args[0]!r} in {entry} (dtypes: {known})")
        except (TypeError, ValueError):
            problems.append(f"{name}: malformed header entry {entry!r}")
    last, before = 0, ""
    for name, (_, begin, end) in sorted(specs.items(), key=lambda kv: kv[1][1:]):
        if begin < last:
            problems.append(f"{name}: overlaps {before}")
        if end > begin:
            last, before = end, name
    if not problems and last != size:
        problems.append(f"{size - last} bytes after the last tensor belong to none")
    if problems:
        raise WeightsError(f"damaged safetensors file {path}", problems)
    data = np.memmap(path, np.uint8, "r", start, (size,)) if size else np.empty(0, np.uint8)
    arrays = {
        name: data[begin:end].view(spec.dtype).reshape(spec.shape).view(np.ndarray)
        for name, (spec, begin, end) in specs.items()
    }
    return Tensors(arrays, str(path), metadata)


def _header(path: Path) -> tuple[dict[str, Any], int]:
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
    except (UnicodeDecodeError, ValueError) as e:
        raise damaged(f"the header is not JSON: {e}") from None
    if not isinstance(header, dict):
        raise damaged("the header is not a JSON object")
    return header, 8 + length


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"repeated names {sorted({n for n in names if names.count(n) > 1})[:5]}")
    return out


def open_tensors(path: str | Path) -> Tensors:
    """Maps a safetensors file, an index of shards, or the folder that holds either.

    Raises:
      FileNotFoundError: nothing there; what is there is listed.
      WeightsError: several candidates, shards missing, or a damaged file.
    """
    path = Path(path)
    path = find(path) if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}; give a .safetensors file or its folder")
    return _open_index(path) if path.name.endswith(INDEX) else open_file(path)


def find(folder: Path) -> Path:
    """The one index or safetensors file of a folder."""
    indexes = sorted(folder.glob(f"*.safetensors{INDEX}"))
    shards = {s for i in indexes for s in _weight_map(i).values()}
    files = [f for f in sorted(folder.glob("*.safetensors")) if f.name not in shards]
    found = indexes + files
    if len(found) == 1:
        return found[0]
    names = [f.name for f in found]
    if not found:
        there = sorted(p.name for p in folder.iterdir())[:20]
        raise FileNotFoundError(f"no .safetensors file in {folder}; it holds {there}")
    raise WeightsError(
        f"weights in {folder}", [f"ambiguous: {', '.join(names)}; name one file instead"]
    )


def _weight_map(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text())["weight_map"]
        if all(Path(shard).name == shard for shard in weight_map.values()):
            return weight_map
        reason = "a shard lies outside the folder"
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        reason = f"no readable weight_map ({type(e).__name__}: {e})"
    raise WeightsError(f"damaged index {index}", [reason])


def _open_index(index: Path) -> Tensors:
    weight_map = _weight_map(index)
    out, problems = Tensors({}, str(index)), []
    for shard in sorted(set(weight_map.values())):
        if not (index.parent / shard).is_file():
            problems.append(f"missing shard: {shard}; fetch it into {index.parent}")
            continue
        tensors = open_file(index.parent / shard)
        out.metadata |= tensors.metadata
        listed = {name for name, s in weight_map.items() if s == shard}
        problems += [f"missing: {name} is not in {shard}" for name in sorted(listed - set(tensors))]
        problems += [
            f"ambiguous: {name} in {shard} is not what the index lists"
            for name in sorted(set(tensors) - listed)
        ]
        out.update((name, tensors[name]) for name in tensors if name in listed)
    if problems:
        raise WeightsError(f"weights of {index}", problems)
    return out


def write(
    path: str | Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray],
    *,
    metadata: Mapping[str, Any] | None = PT,
    max_shard: int = MAX_SHARD,
) -> list[Path]:
    """Writes tensors one at a time, under temporary names until all of them are on disk.

    Args:
      path: the `.safetensors` file; above `max_shard` bytes it becomes shards and an index.
      specs: name -> type and shape of every tensor, in file order.
      read: gives the values of a tensor, called once each.
      metadata: for the header; values other than strings are written as JSON. None for no header
        metadata.
      max_shard: bytes of the largest shard; a larger single tensor has one of its own.

    Returns:
      The files written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"cannot write {path}: give the name of a .safetensors file")
    path.parent.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        if shards[-1] and sum(s.nbytes for s in shards[-1].values()) + spec.nbytes > max_shard:
            shards.append({})
        shards[-1][name] = spec
    names = [path.name]
    if len(shards) > 1:
        names = [
            f"{path.stem}-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))
        ]
    header = None if metadata is None else {k: _text(v) for k, v in (PT | dict(metadata)).items()}
    final = [path.parent / name for name in names]
    temporary = [f.with_name(f".{f.name}.{os.getpid()}.tmp") for f in final]
    index = path.with_name(path.name + INDEX)
    try:
        for target, shard in zip(temporary, shards, strict=True):
            _write_file(target, shard, read, header)
        if len(shards) > 1:
            final.append(index)
            temporary.append(index.with_name(f".{index.name}.{os.getpid()}.tmp"))
            weight_map = {n: f for f, shard in zip(names, shards, strict=True) for n in shard}
            total = sum(s.nbytes for s in specs.values())
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            temporary[-1].write_text(json.dumps(content, indent=2))
        for source, target in zip(temporary, final, strict=True):
            source.replace(target)
    finally:
        for f in temporary:
            f.unlink(missing_ok=True)
    # Shards of an earlier, differently cut file of this name would make the folder ambiguous.
    family = re.compile(re.escape(path.stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for f in path.parent.iterdir():
        if family.fullmatch(f.name) and f not in final:
            f.unlink()
    return final


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _write_file(
    path: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray],
    metadata: Mapping[str, str] | None,
) -> None:
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    offset = 0
    for name, spec in specs.items():
        header[name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as f:
        f.write(len(raw).to_bytes(8, "little"))
        f.write(raw)
        for name, spec in specs.items():
            array = np.ascontiguousarray(read(name), spec.dtype).reshape(spec.shape)
            f.write(array.reshape(-1).view(np.uint8).data)
        f.flush()
        os.fsync(f.fileno())
