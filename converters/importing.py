"""Published files -> our parameters by path, checked as a whole."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import native
from converters.formats import Format, Part
from converters.load import Imported, open_weights
from converters.rules import WeightsError
from converters.verify import check_hashes
from x2jax import trained


def import_(
    source: Path,
    fmt: Format,
    out: Path,
    dtype: str | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    verify: bool = False,
) -> list[Path]:
    """Reads a format strictly and writes our parameters; returns the files written.

    Args:
      source: file or folder.
      fmt: its format.
      out: folder for our parameters.
      dtype: of all of them; None keeps the file's.
      config: of the model; None for what the files say.
      verify: compare the data with the hashes recorded of it first.

    Raises:
      FileNotFoundError, ImportError, ValueError: as `open_weights` and `WeightsError` say.
    """
    if verify:
        check_hashes(source)
    config = fmt.read(source) if config is None else config
    specs, readers, ignored = {}, {}, []
    for part, found in open_parts(source, fmt, config, dtype):
        head = f"{part.prefix}/" if part.prefix else ""
        specs |= {head + path: spec for path, spec in found.specs.items()}
        readers |= {head + path: (found, path) for path in found.specs}
        ignored += found.ignored
    about = {"format": fmt.name, "config": config, "source": str(source)}
    if fmt.name == "x2edit":
        about["meta"] = trained.trio_meta(source, config)

    def read(path: str) -> Iterator[np.ndarray]:
        found, own = readers[path]
        return found.chunks(own)

    files = native.write(out, about, specs, read, resume=identity(source))
    if ignored:
        print(f"left out, known and not needed: {some(ignored)}")
    return files


def open_parts(
    source: Path, fmt: Format, config: Mapping[str, Any], dtype: str | None = None
) -> list[tuple[Part, Imported]]:
    """Every part with what it will give; the offenders of all files are reported together.

    Raises:
      WeightsError: what does not fit, in any of them.
    """
    found, problems = [], []
    parts = fmt.parts(config)
    for part in parts:
        try:
            path = source if len(parts) == 1 else fmt.locate(source, part)
            weights = fmt.open(path) if len(parts) == 1 else open_weights(path)
            found.append((part, Imported(weights, part.table, part.shapes, dtype)))
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


def identity(source: Path) -> str:
    """Names, sizes and times of the files of a source: changes when they do."""
    files = [source] if source.is_file() else sorted(p for p in source.iterdir() if p.is_file())
    return repr([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files])
