"""Data compared with the hashes that were recorded of it when it was written."""

import json
from pathlib import Path
from typing import NamedTuple

from converters import pickles
from converters.rules import WeightsError
from converters.safetensors_io import data_sha256, file_sha256, recorded_sha256
from x2jax.trained import SIDECAR


class Hash(NamedTuple):
    """SHA-256 of one file, as recorded (None: nowhere) and as found (None: not computed)."""

    file: str
    recorded: str | None
    found: str | None


def hashes(path: Path) -> list[Hash]:
    """Hashes of the weights in a file, or a folder: of headers, or of an export's sidecar.

    Raises:
      WeightsError: a damaged header, or sidecar.
    """
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.is_file())
    sidecar = path / SIDECAR
    listed = {}
    if sidecar.is_file():
        try:
            listed = dict(json.loads(sidecar.read_bytes()).get("sha256", {}))
        except (ValueError, TypeError, AttributeError, RecursionError):
            raise WeightsError(f"damaged {sidecar}", ["not the JSON that export writes"]) from None
    out = []
    for file in files:
        if file.name in listed:
            out.append(Hash(file.name, listed[file.name], file_sha256(file)))
        elif file.suffix == ".safetensors":
            recorded = recorded_sha256(file)
            out.append(Hash(file.name, recorded, data_sha256(file) if recorded else None))
        elif file.suffix in pickles.SUFFIXES:
            out.append(Hash(file.name, None, None))
    return out


def check_hashes(path: Path) -> None:
    """Raises WeightsError, naming every file whose data is not what its hash was recorded of."""
    wrong = [
        f"{h.file}: sha256 is {h.found}, recorded is {h.recorded}: it changed since it was written"
        for h in hashes(path)
        if h.recorded != h.found
    ]
    if wrong:
        raise WeightsError(f"hashes of {path}", wrong)
