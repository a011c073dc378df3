"""The formats that `python -m converters` knows: what each holds, and the tables that read it.

To add one: a table file in `converters/`, a module here with a tuple `FORMATS`, and its name in
`MODULES`.
"""

from pathlib import Path

from converters.formats import (
    alignnet,
    flux,
    lightcontrol,
    qwen2_5_vl,
    qwen3,
    text_encoders,
    vae,
    x2edit,
)
from converters.formats.base import Format, Part
from converters.load import open_weights
from converters.rules import WeightsError

__all__ = ["FORMATS", "Format", "Part", "detect"]

MODULES = (x2edit, flux, vae, qwen2_5_vl, qwen3, text_encoders, alignnet, lightcontrol)
"""In the order in which a path is tried."""
FORMATS: dict[str, Format] = {f.name: f for module in MODULES for f in module.FORMATS}


def detect(path: Path) -> Format:
    """The format of a file or folder.

    Raises:
      FileNotFoundError: nothing there.
      WeightsError: damaged, or none fits; the formats are listed.
    """
    if not path.exists():
        raise FileNotFoundError(f"no such file or folder: {path}")
    found = next((f for f in FORMATS.values() if f.is_here(path)), None)
    if found is None:
        open_weights(path)  # a damaged file looks like no format: it says so itself
        known = [f"{f.name}: {f.what}" for f in FORMATS.values()]
        raise WeightsError(f"{path} is of no format known here", known)
    return found
