"""An index of tar shards, made once: where every usable sample lies, and why others are not used.

Adjacent members of one stem are a sample. "edits" are X2Edit-Dataset's: `STEM.1.0.jpg` or
`STEM.1.jpg` (source), `STEM.2.jpg` (target) and `STEM.json`. "pictures" are the targets of these
shards with their captions, or those of a plain WebDataset: `STEM.jpg` (png, jpeg, webp) with its
caption in `STEM.json` or `STEM.txt`.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import glob
import hashlib
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from tqdm import tqdm

from x2jax.data import records, tasks, transforms
from x2jax.data.index import COLUMNS, Index, Report
from x2jax.data.index import split_held_out as split_held_out
from x2jax.data.tar_walk import Member, walk

VERSION = 2
IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
_HEADER = 1 << 16


def find_shards(patterns: str | Path | Sequence[str | Path]) -> tuple[str, ...]:
    """Paths of tars, sorted, from globs, files and folders.

    Raises:
      FileNotFoundError: a pattern that matches nothing.
    """
    found: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, (str, Path)) else patterns:
        wanted = os.path.expanduser(str(pattern))
        wanted = os.path.join(wanted, "**", "*.tar") if os.path.isdir(wanted) else wanted
        # A plain path may hold glob characters.
        paths = [wanted] if os.path.isfile(wanted) else glob.glob(wanted, recursive=True)
        paths = [p for p in paths if os.path.isfile(p)]
        if not paths:
            raise FileNotFoundError(
                f"no tar shard matches {str(pattern)!r}: check the path or glob"
            )
        found.update(paths)
    return tuple(sorted(found))


def build_index(
    patterns: str | Path | Sequence[str | Path],
    cache: str | Path | None = None,
    *,
    layout: str = records.EDITS,
    filters: records.Filters | None = records.Filters(),  # noqa: B008  (frozen)
    workers: int = 8,
    progress: bool = True,
) -> Index:
    """Reads the index of the shards from `cache`, or makes it and saves it there.

    Args:
      patterns: globs, files or folders of tars.
      cache: folder for `index.npz` and `index_report.json`; None keeps nothing.
      layout: what a sample is, one of `records.LAYOUTS`.
      filters: score thresholds; None uses every sample.
      workers: threads.
      progress: prints the report and a progress bar.

    Raises:
      FileNotFoundError: a pattern matches nothing.
      ValueError: no sample is usable, or an unknown layout.
    """
    if layout not in records.LAYOUTS:
        known = ", ".join(records.LAYOUTS)
        raise ValueError(f"unknown layout {layout!r} of a data set: use one of {known}")
    shards = find_shards(patterns)
    key = _cache_key(shards, layout, filters)
    cached = None if cache is None else Path(cache) / "index.npz"
    index = _load(cached, key, layout) if cached is not None else None
    if index is None:
        index = _make(shards, layout, filters, workers, progress)
        if cached is not None:
            _save(index, cached, key)
    if progress:
        print(index.report, flush=True)
    if not len(index):
        raise ValueError(f"no usable sample in {len(shards)} shards:\n{index.report}")
    return index


def _cache_key(shards: tuple[str, ...], layout: str, filters: records.Filters | None) -> str:
    files = [(p, os.stat(p).st_size, os.stat(p).st_mtime_ns) for p in shards]
    settings = dataclasses.asdict(filters) if filters else None
    text = json.dumps([VERSION, layout, files, settings, sorted(tasks.ALIASES.items())])
    return hashlib.sha256(text.encode()).hexdigest()


def _groups(file: BinaryIO, problems: list[str]) -> Iterator[tuple[str, dict[str, Member]]]:
    """(stem, members by suffix) of adjacent members; a repeated suffix starts the next sample."""
    stem, run, members = "", -1, {}
    for member in walk(file, problems):
        folder, _, base = member.name.rpartition("/")
        first, _, suffix = base.partition(".")
        name = f"{folder}/{first}" if folder else first
        if (name, member.run) != (stem, run) or suffix in members:
            if members:
                yield stem, members
            stem, run, members = name, member.run, {}
        members[suffix] = member
    if members:
        yield stem, members


def _make(
    shards: tuple[str, ...],
    layout: str,
    filters: records.Filters | None,
    workers: int,
    progress: bool,
) -> Index:
    report, rows, stems = Report(), collections.defaultdict(list), []
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        results = pool.map(
            lambda n: _index_shard(n, shards[n], layout, filters), range(len(shards))
        )
        for found, names, part in tqdm(
            results, "indexing", len(shards), unit="shard", disable=not progress
        ):
            for row in found:
                for key, value in row.items():
                    rows[key].append(value)
            stems += names
            report.add(part)
    pairs = ("target", "source", "record", "target_size", "source_size")
    columns = {
        k: np.array(rows[k], dtype).reshape((-1, 2) if k in pairs else (-1,))
        for k, dtype in COLUMNS.items()
    }
    names = np.array(stems, np.bytes_)
    return Index(shards, columns, names, np.arange(len(stems)), report, layout)


def _index_shard(
    number: int, path: str, layout: str, filters: records.Filters | None
) -> tuple[list[dict[str, Any]], list[bytes], Report]:
    report, rows, stems, problems = Report(), [], [], []
    with open(path, "rb") as file:
        for stem, members in _groups(file, problems):
            try:
                row = _INDEXERS[layout](file, members, filters)
            except records.Dropped as e:
                report.drop(str(e), f"{path}:{stem}")
                continue
            rows.append({"shard": number} | row)
            stems.append(stem.encode())
            report.kept[tasks.TASKS[row["task"]]] += 1
            for bit, language in ((records.ENGLISH, "en"), (records.CHINESE, "zh")):
                report.languages[language] += bool(row["languages"] & bit)
    report.problems = [(path, p) for p in problems]
    return rows, stems, report


def _index_edit(
    file: BinaryIO, members: dict[str, Member], filters: records.Filters | None
) -> dict[str, Any]:
    if "json" not in members:
        raise records.Dropped("no JSON")
    data = _read(file, members["json"])
    record = records.parse(data)
    row = {"task": records.task_of(record), "languages": sum(records.texts(data, records.EDITS))}
    if filters is not None:
        records.check_scores(record, filters)
    row["record"] = members["json"][1:3]
    for role, stems in (("target", ("2",)), ("source", ("1.0", "1"))):
        row |= _picture(file, members, role, stems)
    return row


def _index_picture(
    file: BinaryIO, members: dict[str, Member], filters: records.Filters | None
) -> dict[str, Any]:
    edit = any(f"2.{suffix}" in members for suffix in IMAGE_SUFFIXES)
    # The text beside an edit is its instruction, which does not describe the target.
    text, languages = None, 0
    for name in ("json",) if edit else ("json", "txt"):
        if name not in members:
            continue
        data = _read(file, members[name])
        if filters is not None and name == "json":
            records.check_scores(records.parse(data), filters)
        languages = sum(records.captions(data))
        if languages:
            text = members[name]
            break
    if text is None:
        raise records.Dropped("no caption")
    row = {"task": 0, "languages": languages, "record": text[1:3]}
    row |= {"source": (0, 0), "source_size": (0, 0)}
    return row | _picture(file, members, "target", ("2",) if edit else ("",))


_INDEXERS = {records.EDITS: _index_edit, records.PICTURES: _index_picture}


def _read(file: BinaryIO, member: Member) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _picture(
    file: BinaryIO, members: dict[str, Member], role: str, stems: Sequence[str]
) -> dict[str, Any]:
    names = [f"{s}.{suffix}" if s else suffix for s in stems for suffix in IMAGE_SUFFIXES]
    member = next((members[n] for n in names if n in members), None)
    if member is None:
        raise records.Dropped(f"no {role} image")
    return {role: member[1:3], f"{role}_size": _image_size(file, member, role)}


def _image_size(file: BinaryIO, member: Member, role: str) -> tuple[int, int]:
    for length in (min(member.size, _HEADER), member.size):  # a long EXIF block comes first
        file.seek(member.offset)
        try:
            return transforms.header_size(file.read(length))
        except transforms.BadImage:
            continue
    raise records.Dropped(f"{role} image has no header")


def _save(index: Index, path: Path, key: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(vars(index.report), ensure_ascii=False, indent=1)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with open(temporary, "wb") as file:
        np.savez(
            file,
            key=np.array(key),
            shards=np.array(index.shards),
            stems=index.stems,
            report=np.array(text),
            **{f"column_{k}": v for k, v in index.columns.items()},
        )
    os.replace(temporary, path)
    temporary = path.with_name(f".index_report.json.{os.getpid()}")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path.with_name("index_report.json"))


def _load(path: Path, key: str, layout: str) -> Index | None:
    """The saved index, or None where there is none for these shards and settings."""
    try:
        with np.load(path) as saved:
            if str(saved["key"]) != key:
                return None
            raw = json.loads(str(saved["report"]))
            columns = {k: saved[f"column_{k}"] for k in COLUMNS}
            shards, stems = tuple(map(str, saved["shards"])), saved["stems"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    counters = {k: collections.Counter(raw[k]) for k in ("kept", "dropped", "languages")}
    problems = [(s, p) for s, p in raw["problems"]]
    report = Report(**counters, names=raw["names"], problems=problems)
    return Index(shards, columns, stems, np.arange(len(stems)), report, layout)
