"""Where every caption lies: made once and memory-mapped, so any number of captions opens at once.

Captions come one a line (`.txt`), as JSON lines with a key (`.jsonl`), in tar shards (`.tar`:
members named `*.txt`, `*.KEY`, or `*.json` with the key) or in a column of `.parquet`. A row of
parquet cannot be read without decoding its group, so those captions are copied once, one a line.
"""

import collections
import dataclasses
import glob
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from x2jax.data.index import Report
from x2jax.data.tar_walk import walk

VERSION = 1
ENTRY = np.dtype(
    [("offset", "<i8"), ("hash", "<u8"), ("size", "<i4"), ("file", "<i4"), ("json", "?")]
)
"""One caption: its bytes in a file, a hash of its text, and whether they are a JSON object."""
LONGEST = 1 << 20
"""Bytes beyond which a caption is taken for damage."""


class BadCaption(Exception):
    """A caption that is not used; the message is the reason under which it is counted."""


class Found(NamedTuple):
    """Bytes that may hold a caption, and where they lie."""

    name: str
    offset: int
    data: bytes
    json: bool


@dataclasses.dataclass(frozen=True)
class CaptionIndex:
    """Captions by number.

    Attributes:
      files: that the entries point into.
      entries: of dtype `ENTRY`.
      key: JSON key or column of the captions.
      report: of the making of this index.
    """

    files: tuple[str, ...]
    entries: np.ndarray
    key: str
    report: Report

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, number: int) -> str:
        """A caption.

        Raises:
          ValueError: its file has changed since the index was made.
        """
        entry = self.entries[number]
        path, why = self.files[entry["file"]], ""
        try:
            with open(path, "rb") as file:
                file.seek(int(entry["offset"]))
                text = parse(file.read(int(entry["size"])), self.key if entry["json"] else None)
            if hash_of(text) == entry["hash"]:
                return text
        except (OSError, BadCaption) as e:
            why = f" ({e})"
        raise ValueError(
            f"{path} has changed since its captions were indexed{why}: restore it, or delete the "
            "index folder in the workdir to index again"
        )

    @property
    def fingerprint(self) -> str:
        """Hash of all captions in order; not of where their files lie."""
        digest = hashlib.sha256()
        for start in range(0, len(self.entries), 1 << 20):
            digest.update(np.ascontiguousarray(self.entries["hash"][start : start + (1 << 20)]))
        return digest.hexdigest()[:16]


def hash_of(text: str) -> int:
    """64 bits that tell captions apart."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def parse(data: bytes, key: str | None) -> str:
    """The caption in some bytes, stripped; `key` is that of a JSON object, None for plain text.

    Raises:
      BadCaption: there is none, by reason.
    """
    if len(data) > LONGEST:
        raise BadCaption(f"longer than {LONGEST} bytes")
    try:
        text: Any = data.decode("utf-8-sig")
        if key is not None:
            text = json.loads(text)[key]
    except UnicodeDecodeError:
        raise BadCaption("not UTF-8") from None
    except (KeyError, TypeError):
        raise BadCaption(f"no {key!r} in the JSON") from None
    except ValueError:
        raise BadCaption("not JSON") from None
    if not isinstance(text, str):
        raise BadCaption(f"{key!r} is not text")
    if not text.strip():
        raise BadCaption("empty")
    return text.strip()


def _lines(path: str, key: str, problems: list[str]) -> Iterator[Found]:
    offset, is_json = 0, path.endswith(".jsonl")
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            yield Found(f"line {number}", offset, line, is_json)
            offset += len(line)


def _members(path: str, key: str, problems: list[str]) -> Iterator[Found]:
    with open(path, "rb") as file:
        for member in walk(file, problems):
            suffix = member.name.rpartition(".")[2]
            if suffix in ("txt", "json", key):
                file.seek(member.offset)
                data = file.read(min(member.size, LONGEST + 1))
                yield Found(member.name, member.offset, data, suffix == "json")


SCANNERS: dict[str, Callable[[str, str, list[str]], Iterator[Found]]] = {
    ".txt": _lines,
    ".jsonl": _lines,
    ".tar": _members,
}


def find_files(patterns: str | Sequence[str]) -> tuple[str, ...]:
    """Files of captions from globs, sorted.

    Raises:
      FileNotFoundError: a pattern that matches nothing. ValueError: a file of another kind.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        wanted = os.path.expanduser(pattern)
        paths = [wanted] if os.path.isfile(wanted) else glob.glob(wanted, recursive=True)
        paths = [p for p in paths if os.path.isfile(p)]
        if not paths:
            raise FileNotFoundError(f"no file matches --config.data={pattern}: check the glob")
        found.update(paths)
    known = (*SCANNERS, ".parquet")
    other = sorted(p for p in found if not p.endswith(known))
    if other:
        raise ValueError(f"{other[0]}: captions come as {', '.join(known)}, by the file's ending")
    return tuple(sorted(found))


def build_index(patterns: str | Sequence[str], cache: Path, key: str) -> CaptionIndex:
    """Reads the index of caption files from the folder `cache`, or makes it there.

    Args:
      patterns: globs of `.txt`, `.jsonl`, `.tar` or `.parquet`.
      cache: folder that keeps the index, its report, and what is copied from parquet.
      key: JSON key, tar suffix or parquet column.

    Raises:
      FileNotFoundError: a pattern matches nothing.
      ValueError: no caption is usable, an unknown kind of file, or a parquet file without the
        column or without pyarrow.
    """
    files = find_files(patterns)
    about = {
        "version": VERSION,
        "key": key,
        "files": [[p, os.stat(p).st_size, os.stat(p).st_mtime_ns] for p in files],
    }
    name = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    saved, entries = cache / f"captions-{name}.json", cache / f"captions-{name}.entries"
    if not saved.is_file():
        copied = [_as_text(p, key, cache) if p.endswith(".parquet") else p for p in files]
        report = _make(copied, key, entries)
        temporary = saved.with_suffix(f".{os.getpid()}")
        temporary.write_text(
            json.dumps({"files": copied, "report": vars(report), "about": about}, indent=1) + "\n"
        )
        os.replace(temporary, saved)  # the report comes last: it says that the index is whole
    raw = json.loads(saved.read_text())
    counters = {k: collections.Counter(raw["report"][k]) for k in ("kept", "dropped", "languages")}
    report = Report(**raw["report"] | counters)
    print(report, flush=True)
    if not report.kept.total():
        raise ValueError(f"no usable caption in {len(files)} files:\n{report}")
    table = np.memmap(entries, dtype=ENTRY, mode="r")
    return CaptionIndex(tuple(raw["files"]), table, key, report)


def _make(files: Sequence[str], key: str, path: Path) -> Report:
    """Writes the entries of all files; returns what was kept and dropped."""
    report = Report()
    temporary = path.with_suffix(f".{os.getpid()}")
    with open(temporary, "wb") as out:
        for number, name in enumerate(tqdm(files, "indexing", unit="file")):
            problems: list[str] = []
            for found in SCANNERS[os.path.splitext(name)[1]](name, key, problems):
                try:
                    text = parse(found.data, key if found.json else None)
                except BadCaption as e:
                    report.drop(str(e), f"{name}: {found.name}")
                    continue
                entry = (found.offset, hash_of(text), len(found.data), number, found.json)
                out.write(np.array(entry, ENTRY).tobytes())
                report.kept["captions"] += 1
            report.problems += [(name, p) for p in problems]
    os.replace(temporary, path)
    return report


def _as_text(path: str, key: str, cache: Path) -> str:
    """Copies a column of a parquet file, one caption a line; returns the copy's path."""
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise ValueError(f"{path} needs pyarrow: pip install 'x2jax[parquet]'") from None
    file = parquet.ParquetFile(path)
    if key not in file.schema_arrow.names:
        raise ValueError(
            f"{path} has no column {key!r}; it has {', '.join(file.schema_arrow.names)}: choose "
            "with --config.captions.key"
        )
    state = os.stat(path)
    name = hashlib.sha256(f"{path}{state.st_size}{state.st_mtime_ns}{key}".encode()).hexdigest()
    copy = cache / f"{Path(path).stem}-{name[:12]}.txt"
    temporary = copy.with_suffix(f".{os.getpid()}")
    with open(temporary, "w", encoding="utf-8") as out:
        for batch in file.iter_batches(columns=[key]):
            for text in batch.column(0).to_pylist():
                out.write(" ".join(str(text or "").split()) + "\n")
    os.replace(temporary, copy)
    return str(copy)
