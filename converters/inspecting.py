"""What a file or folder is, what is in it, and what is wrong with it."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from converters import formats, native
from converters.formats import FORMATS, Format
from converters.importing import open_parts, some
from converters.load import open_weights
from converters.rules import WeightsError


def inspect(path: Path, fmt: Format | None = None) -> bool:
    """Prints what a file or folder is; False if something is wrong with it."""
    if native.is_native(path):
        tensors, about = native.open_folder(path)
        print(f"{path}: our parameters, imported as {about['format']} from {about.get('source')}")
        _summary(tensors)
        return True
    try:
        fmt = fmt or formats.detect(path)
    except WeightsError:
        tensors = open_weights(path)
        print(f"{path}: tensors of no format known here")
        _summary(tensors)
        print(f"known formats:\n{known_formats()}")
        return False
    print(f"{path}: {fmt.name}, {fmt.what}")
    config = fmt.read(path)
    print(json.dumps(config, indent=2))
    parts = fmt.parts(config)
    for part in parts:
        file = fmt.locate(path, part)
        print(f"{file.name}:")
        _summary(open_weights(file))
    for part, (specs, _, ignored) in open_parts(path, fmt, config):
        count = sum(int(np.prod(s.shape)) for s in specs.values())
        print(f"{part.file}: complete; fills {len(specs)} arrays, {count:,} parameters")
        if ignored:
            print(f"  left out, known and not needed: {some(ignored)}")
    return True


def _summary(tensors: Mapping[str, np.ndarray], shown: int = 6) -> None:
    count = sum(x.size for x in tensors.values())
    kinds = sorted({str(x.dtype) for x in tensors.values()})
    print(f"  {len(tensors):,} tensors, {count:,} parameters, {', '.join(kinds)}")
    for name, x in list(tensors.items())[:shown]:
        print(f"    {name} {tuple(x.shape)}")
    if len(tensors) > shown:
        print(f"    ... and {len(tensors) - shown:,} more")


def known_formats() -> str:
    """A line for every format."""
    return "\n".join(f"  {f.name:15} {f.what}" for f in FORMATS.values())
