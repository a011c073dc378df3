"""Our own folder: parameters under our paths, and what they are.

params.safetensors    path -> array, stacked and laid out as `x2jax` uses them
x2jax.json            {"format": ..., "config": ...}, and where they came from
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from converters import safetensors_io
from converters.rules import WeightsError
from converters.safetensors_io import Spec, Tensors

PARAMS = "params.safetensors"
ABOUT = "x2jax.json"


def is_native(path: Path) -> bool:
    """Whether a folder is one that `python -m converters import` wrote."""
    return (path / ABOUT).is_file()


def write(
    out: Path,
    about: Mapping[str, Any],
    specs: Mapping[str, Spec],
    read: Callable[[str], np.ndarray],
) -> list[Path]:
    """Writes parameters one at a time, then what they are: a folder without it is incomplete."""
    (out / ABOUT).unlink(missing_ok=True)
    files = safetensors_io.write(out / PARAMS, specs, read)
    (out / ABOUT).write_text(json.dumps(about, indent=2) + "\n")
    return [*files, out / ABOUT]


def open_folder(path: Path) -> tuple[Tensors, dict[str, Any]]:
    """Parameters (memory-mapped) by our path, and what they are.

    Raises:
      FileNotFoundError: not such a folder. WeightsError: damaged.
    """
    about = path / ABOUT
    if not about.is_file():
        raise FileNotFoundError(f"{about} is missing: was {path} written by converters import?")
    try:
        found = json.loads(about.read_text())
    except ValueError as e:
        raise WeightsError(f"damaged folder {path}", [f"{ABOUT} is not JSON: {e}"]) from None
    sharded = path / (PARAMS + safetensors_io.INDEX)
    return safetensors_io.open_tensors(sharded if sharded.is_file() else path / PARAMS), found
