"""Frozen weights by name: "tiny", or folders in the public layouts. One loading path for both."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from converters.load import open_weights
from converters.rules import Table

TINY = Path(__file__).parent / "tiny" / "weights"
MAX_JSON = 16 << 20
"""Bytes of the largest config read."""


class Source(NamedTuple):
    """Where one child of a model comes from.

    Attributes:
      path: file or folder of weights.
      table: rule table that reads it; None for files in our own naming.
      config: the architecture that the folder's config describes.
    """

    path: Path
    table: Table | None
    config: Any


HOW = {
    "flux": "a diffusers folder of FLUX.1 with transformer/ and vae/, as `hf download "
    "black-forest-labs/FLUX.1-dev --local-dir DIR` makes it",
    "mllm": "a transformers folder of Qwen2.5-VL, as `hf download Qwen/Qwen2.5-VL-7B-Instruct "
    "--local-dir DIR` makes it",
    "alignnet": "an AlignNet file (diffusion_pytorch_model.bin or .safetensors) of X2I or X2Edit, "
    "as `hf download OPPOer/X2Edit --local-dir DIR` makes it",
    "data": "a glob of X2Edit tar shards such as 'X2Edit_data/*/*/*.tar', as `hf download "
    "OPPOer/X2Edit-Dataset --repo-type dataset --local-dir X2Edit_data` makes it",
}


def require(
    config: Mapping[str, Any], names: tuple[str, ...], how: Mapping[str, str] | None = None
) -> None:
    """Raises ValueError naming every empty source, with how to get each; `how` overrides `HOW`."""
    missing = [n for n in names if not config[n]]
    if missing:
        words = HOW | dict(how or {})
        lines = [f"  --config.{n}=...  {words[n]}" for n in missing]
        raise ValueError("this config needs sources that are not set:\n" + "\n".join(lines))


def folder(name: str, option: str, tiny: str) -> Path:
    """The folder of a source; "tiny" stands for the embedded family.

    Raises:
      FileNotFoundError: it does not exist.
    """
    path = TINY / tiny if name == "tiny" else Path(name).expanduser()
    if not path.exists():
        raise FileNotFoundError(
            f"--config.{option}={name}: {path} does not exist; needs {HOW[option]}"
        )
    return path


def fingerprint(path: Path) -> str:
    """A short hash of the weights in a file or folder, that reads little of them.

    Of every tensor: name, type, shape, first and last values. So it tells models and their
    fine-tunes apart, and costs a few seconds for the largest.

    Raises:
      FileNotFoundError, WeightsError: as `converters.load.open_weights`.
    """
    digest = hashlib.sha256()
    for name, x in sorted(open_weights(path).items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        flat = x.reshape(-1)
        for part in (flat[:512], flat[-512:]):
            digest.update(np.ascontiguousarray(part).tobytes())
    return digest.hexdigest()[:16]


def read_config(directory: Path) -> dict[str, Any]:
    """`config.json` of a folder.

    Raises:
      FileNotFoundError: there is none. ValueError: it is not JSON.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: is {directory.parent} a model folder?")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object in a file of reasonable size.

    Raises:
      OSError: it cannot be read. ValueError: it is something else, or larger than `MAX_JSON`.
    """
    size = path.stat().st_size
    if size > MAX_JSON:
        raise ValueError(f"{path} has {size} bytes: too large for a config (limit {MAX_JSON})")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path} is not JSON: {ascii(str(e))[:200]}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} is not a JSON object: it is a {type(found).__name__}")
    return found
