"""What a file or folder is, what is in it, and what is wrong with it."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import formats, native
from converters.bundle import Bundle
from converters.formats import FORMATS, Format
from converters.importing import open_parts, some
from converters.load import open_weights
from converters.lora_names import LAYOUTS
from converters.rules import WeightsError, expand
from converters.verify import hashes


def inspect(
    path: Path,
    fmt: Format | None = None,
    config: Mapping[str, Any] | None = None,
    *,
    verify: bool = False,
    all_names: bool = False,
) -> bool:
    """Prints what a file or folder is; False if something is wrong with it.

    Args:
      path: file or folder.
      fmt: None for what it looks like.
      config: of the model; None for what the files say.
      verify: also compare the data with the hashes recorded of it.
      all_names: every tensor and where it goes, instead of the first few.

    Raises:
      OSError, ValueError: what is wrong with it, where it cannot be read as its format.
    """
    shown = None if all_names else 6
    if native.is_native(path):
        tensors, about = native.open_folder(path)
        print(f"{path}: our parameters, imported as {about['format']} from {about.get('source')}")
        print(json.dumps(about["config"], indent=2))
        _summary(tensors, {}, shown)
        return _verified(path) if verify else True
    try:
        fmt = fmt or formats.detect(path)
    except WeightsError:
        tensors = open_weights(path)
        print(f"{path}: tensors of no format known here")
        _summary(tensors, {}, shown)
        print(f"known formats:\n{known_formats()}")
        return False
    print(f"{path}: {fmt.name}, {fmt.what}")
    config = fmt.read(path) if config is None else config
    print(json.dumps(config, indent=2))
    parts = fmt.parts(config)
    for part in parts:
        file = path if len(parts) == 1 else fmt.locate(path, part)
        print(f"{file.name}, read by the table {part.table.name!r}:")
        tensors = fmt.open(path) if len(parts) == 1 else open_weights(file)
        goes = {n: ", ".join(map(str, ps)) for n, (_, ps) in expand(part.table).items()}
        _summary(tensors, goes, shown)
        if "x2jax" in tensors.metadata:
            print(f"  made by x2jax: {tensors.metadata['x2jax']}")
    for part, found in open_parts(path, fmt, config):
        count = sum(math.prod(s.shape) for s in found.specs.values())
        print(f"{part.file}: complete; fills {len(found.specs)} arrays, {count:,} parameters")
        if found.ignored:
            print(f"  left out, known and not needed: {some(found.ignored)}")
    return _verified(path) if verify else True


def _verified(path: Path) -> bool:
    """Prints the hash of every file; whether all are as recorded."""
    found = hashes(path)
    for h in found:
        if h.recorded is None:
            print(f"{h.file}: no hash of it is recorded")
        elif h.recorded == h.found:
            print(f"{h.file}: sha256 {h.found}, as recorded")
        else:
            print(f"{h.file}: sha256 {h.found}, recorded is {h.recorded}: it has changed")
    return all(h.recorded == h.found for h in found)


def _summary(tensors: Mapping[str, np.ndarray], goes: Mapping[str, str], shown: int | None) -> None:
    count = sum(x.size for x in tensors.values())
    kinds = sorted({str(x.dtype) for x in tensors.values()})
    print(f"  {len(tensors):,} tensors, {count:,} parameters, {', '.join(kinds)}")
    for name, x in list(tensors.items())[:shown]:
        print(f"    {name} {tuple(x.shape)}" + (f" -> {goes[name]}" if name in goes else ""))
    if shown is not None and len(tensors) > shown:
        print(f"    ... and {len(tensors) - shown:,} more (--all shows them)")


def known_formats() -> str:
    """A line for every format."""
    return "\n".join(
        f"  {f.name:18} {f.what}" for f in (*FORMATS.values(), *LAYOUTS.values(), Bundle())
    )
