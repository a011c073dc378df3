"""Our own folder: parameters under our paths, and what they are.

params.safetensors    path -> array, stacked and laid out as `x2jax` uses them
x2jax.json            {"format": ..., "config": ...}, their source, the hash of each file
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters import safetensors_io
from converters.rules import WeightsError
from converters.safetensors_io import Spec, Tensors
from converters.shards import replace_text

PARAMS = "params.safetensors"
ABOUT = "x2jax.json"


def is_native(path: Path) -> bool:
    """Whether a folder is one that `python -m converters import` wrote."""
    return (path / ABOUT).is_file()


def write(
    out: Path,
    about: Mapping[str, Any],
    specs: Mapping[str, Spec],
    read: Callable[[str], Any],
    resume: str | None = None,
) -> list[Path]:
    """Writes parameters piece by piece, then what they are: a folder without it is incomplete.

    Args:
      out: folder.
      about: at least format and config.
      specs, read, resume: as `safetensors_io.write` takes them.
    """
    files = safetensors_io.write(out / PARAMS, specs, read, resume=resume)
    hashes = {
        f.name: safetensors_io.recorded_sha256(f) for f in files if f.suffix == ".safetensors"
    }
    replace_text(out / ABOUT, json.dumps({**about, "sha256": hashes}, indent=2) + "\n")
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
        found = json.loads(about.read_bytes())
        hashes = found["sha256"].items()
        config, name = found["config"], found["format"]
        if not isinstance(config, dict) or not isinstance(name, str):
            raise ValueError("its config or format is something else")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        reason = f"{ABOUT} is not what import writes: {type(e).__name__}: {ascii(str(e))[:200]}"
        raise WeightsError(f"damaged folder {path}", [reason]) from None
    sharded = path / (PARAMS + safetensors_io.INDEX)
    tensors = safetensors_io.open_tensors(sharded if sharded.is_file() else path / PARAMS)
    wrong = [
        f"{file} and {ABOUT} are of two different imports: import again"
        for file, digest in hashes
        if not (path / file).is_file() or safetensors_io.recorded_sha256(path / file) != digest
    ]
    if wrong:
        raise WeightsError(f"damaged folder {path}", wrong)
    return tensors, found
