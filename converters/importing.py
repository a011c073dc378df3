"""Published files -> our parameters by path, checked as a whole."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import native
from converters.formats import Format
from converters.load import importer
from converters.rules import WeightsError
from x2jax import trained


def import_(source: Path, fmt: Format, out: Path, dtype: str | None = None) -> list[Path]:
    """Reads a format strictly and writes our parameters; returns the files written.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `open_weights` and `WeightsError` say.
    """
    config = fmt.read(source)
    specs, readers, ignored = {}, {}, []
    for part, (entries, read, left_out) in open_parts(source, fmt, config):
        head = f"{part.prefix}/" if part.prefix else ""
        for path, spec in entries.items():
            specs[head + path] = spec._replace(dtype=np.dtype(dtype)) if dtype else spec
            readers[head + path] = (read, path)
        ignored += left_out
    about = {"format": fmt.name, "config": config, "source": str(source)}
    if fmt.name == "x2edit":
        about["meta"] = trained.trio_meta(source, config)

    def read_one(path: str) -> np.ndarray:
        read, name = readers[path]
        return read(name)

    files = native.write(out, about, specs, read_one)
    if ignored:
        print(f"left out, known and not needed: {some(ignored)}")
    return files


def open_parts(source: Path, fmt: Format, config: Mapping[str, Any]):
    """Every part with what it will give; the offenders of all files are reported together."""
    found, problems = [], []
    for part in fmt.parts(config):
        try:
            found.append((part, importer(fmt.locate(source, part), part.table, part.shapes)))
        except WeightsError as e:
            problems += [f"{part.file}: {p}" for p in e.problems]
    if problems:
        raise WeightsError(f"{fmt.name} in {source}", problems)
    return found


def some(names: Iterable[str], shown: int = 3) -> str:
    """The first few names, and how many more."""
    names = list(names)
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + rest
