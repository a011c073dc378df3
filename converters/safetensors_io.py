"""Safetensors files: memory-mapped reading with a checked header, atomic streamed writing."""

import hashlib
import json
import mmap
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters.chunks import CHUNK
from converters.rules import WeightsError
from converters.safetensors_header import NAMES, SHA256, Spec, read_header, text_of
from converters.shards import Shards

__all__ = ["INDEX", "MAX_SHARD", "PT", "Spec", "Tensors", "open_file", "open_tensors", "write"]

MAX_SHARD = 10 << 30
"""Default bytes of the largest file written, as diffusers has it."""
PT = {"format": "pt"}
"""Header metadata that transformers asks for."""
INDEX = ".index.json"
MAX_INDEX = 100 << 20
"""Bytes of the largest index of shards accepted."""


class Tensors(dict[str, np.ndarray]):
    """Name -> array, memory-mapped and read-only where it comes from a safetensors file.

    Attributes:
      where: the file or folder, for messages.
      metadata: of the header; empty where there is none.
      spans: name -> the mapped file that a tensor lies in, and its first and last byte there.
      scales: name -> what a float8 tensor is to be multiplied with.
      ignored: names in the file that are known, and not needed.
    """

    def __init__(
        self,
        items: Any,
        where: str = "memory",
        metadata: Mapping[str, str] | None = None,
        *,
        spans: Mapping[str, tuple[mmap.mmap, int, int]] | None = None,
        scales: Mapping[str, float] | None = None,
        ignored: Iterable[str] = (),
    ):
        super().__init__(items)
        self.where, self.metadata = where, dict(metadata or {})
        self.spans, self.scales, self.ignored = dict(spans or {}), dict(scales or {}), [*ignored]

    def release(self, name: str) -> None:
        """Gives the memory of a mapped tensor back; it is read again where it is used again."""
        if name in self.spans:
            mapped, begin, end = self.spans[name]
            begin -= begin % mmap.PAGESIZE
            if end > begin:
                mapped.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def open_file(path: str | Path) -> Tensors:
    """Maps one safetensors file; no tensor is read until it is indexed or copied.

    Raises:
      WeightsError: the header is damaged or does not describe the file.
    """
    path = Path(path)
    header = read_header(path)
    if not header.size:
        empty = {name: np.empty(s.shape, s.dtype) for name, (s, _, _) in header.spans.items()}
        return Tensors(empty, str(path), header.metadata)
    with path.open("rb") as f:
        mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
    data, arrays, spans = np.frombuffer(mapped, np.uint8), {}, {}
    for name, (spec, begin, end) in header.spans.items():
        begin, end = begin + header.start, end + header.start
        arrays[name] = data[begin:end].view(spec.dtype).reshape(spec.shape)
        spans[name] = mapped, begin, end
    return Tensors(arrays, str(path), header.metadata, spans=spans)


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, as hexadecimal digits."""
    return _sha256(path, 0)


def data_sha256(path: Path) -> str:
    """SHA-256 of all bytes after the header, as hexadecimal digits."""
    return _sha256(path, read_header(path).start)


def _sha256(path: Path, start: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as f:
        f.seek(start)
        while block := f.read(CHUNK):
            digest.update(block)
    return digest.hexdigest()


def recorded_sha256(path: Path) -> str | None:
    """What the header says of its data's SHA-256, as hexadecimal digits; None if nothing."""
    return read_header(path).metadata.get(SHA256, "").removeprefix("0x").lower() or None


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
        if index.stat().st_size > MAX_INDEX:
            raise ValueError(f"larger than {MAX_INDEX} bytes")
        weight_map = json.loads(index.read_bytes())["weight_map"]
        if all(Path(s).name == s and s.endswith(".safetensors") for s in weight_map.values()):
            return weight_map
        reason = "a shard lies outside the folder, or is no .safetensors file"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f"no readable weight_map ({type(e).__name__}: {ascii(str(e))[:200]})"
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
        out.spans |= tensors.spans
    if problems:
        raise WeightsError(f"weights of {index}", problems)
    return out


def write(
    path: str | Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], Any],
    *,
    metadata: Mapping[str, Any] | None = PT,
    max_shard: int | None = MAX_SHARD,
    resume: str | None = None,
) -> list[Path]:
    """Writes tensors a few megabytes at a time, under other names until all of them are on disk.

    Args:
      path: the `.safetensors` file; above `max_shard` bytes it becomes shards and an index.
      specs: name -> type and shape of every tensor, in file order.
      read: gives the values of a tensor, called once each: an array, or the runs of its rows.
      metadata: for the header; values other than strings are written as JSON. The hash of the data
        is added. None for a header without metadata, and without a hash.
      max_shard: bytes of the largest shard; a larger single tensor has one of its own. None for
        one file, however large.
      resume: what the values come from, in words that change when the values do. Complete shards
        of a write that was cut short are then kept, checked and used by the next.

    Returns:
      The files written.

    Raises:
      OSError: no space, or another process writes the same file.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"cannot write {path}: give the name of a .safetensors file")
    path.parent.mkdir(parents=True, exist_ok=True)
    parts: list[dict[str, Spec]] = [{}]
    for name, spec in specs.items():
        size = sum(s.nbytes for s in parts[-1].values()) + spec.nbytes
        if max_shard is not None and parts[-1] and size > max_shard:
            parts.append({})
        parts[-1][name] = spec
    names = [path.name]
    if len(parts) > 1:
        count = len(parts)
        names = [f"{path.stem}-{k + 1:05}-of-{count:05}.safetensors" for k in range(count)]
    header = None if metadata is None else text_of(PT | dict(metadata) | {SHA256: ""})
    with Shards(path, sum(s.nbytes for s in specs.values()), resume) as shards:
        for name, part in zip(names, parts, strict=True):
            shards.write(name, _header(part, header), part, read)
        if len(parts) > 1:
            weight_map = {n: f for f, part in zip(names, parts, strict=True) for n in part}
            total = sum(s.nbytes for s in specs.values())
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            shards.write_text(path.name + INDEX, json.dumps(content, indent=2))
        final = shards.finish()
    # Shards of an earlier, differently cut file of this name would make the folder ambiguous.
    family = re.compile(re.escape(path.stem) + r"(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
    for f in path.parent.iterdir():
        if family.fullmatch(f.name) and f not in final:
            f.unlink()
    return final


def _header(specs: Mapping[str, Spec], metadata: Mapping[str, str] | None) -> bytes:
    """Length and header; the hash in it is zeros, of its final length."""
    header: dict[str, Any] = {}
    if metadata is not None:
        header["__metadata__"] = {**metadata, SHA256: "0x" + "0" * 64}
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
    return len(raw).to_bytes(8, "little") + raw
