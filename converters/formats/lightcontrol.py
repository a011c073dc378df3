"""LightControl: the control nets of X2I, a list of them in one pickle."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from converters import lightcontrol
from converters.formats.base import Format, Part, shapes_of
from converters.load import open_weights
from converters.rules import WeightsError
from x2jax.control import ControlConfig, LightControl
from x2jax.flux import FLUX_DEV


def read(path: Path) -> dict[str, Any]:
    """Sizes of the nets in a file or folder, as `converters.lightcontrol.sizes` has them.

    Raises:
      WeightsError: it is not a LightControl.
    """
    try:
        return lightcontrol.sizes({n: tuple(x.shape) for n, x in open_weights(path).items()})
    except ValueError as e:
        raise WeightsError(f"weights in {path}", [str(e)]) from None


def parts(config: Mapping[str, Any]) -> list[Part]:
    """The one file of a LightControl."""
    sizes = dict(config)
    blocks, width, prefix = (sizes.pop(k) for k in ("blocks", "width", "prefix"))
    # Groups change no shape, and one group fits every width.
    cfg = ControlConfig(**sizes, groups=(1,) * len(sizes["widths"]))
    # Heads change none either.
    heads = dict(heads=1, head_dim=width, axes=(0, 0, width))
    flux = dataclasses.replace(FLUX_DEV, double_blocks=blocks, width=width, **heads)
    shapes = shapes_of(lambda: LightControl(cfg, flux, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    return [Part(lightcontrol.FILE, lightcontrol.control_table(cfg, blocks, prefix), shapes)]


def _is_here(path: Path) -> bool:
    try:
        return bool(read(path))
    except (OSError, ValueError, ImportError):
        return False


FORMATS = (
    Format(
        "lightcontrol",
        "LightControl state dict of X2I (diffusion_pytorch_model.bin); a file or its folder",
        read,
        parts,
        _is_here,
    ),
)
