"""LightControl: the control nets of X2I, a list of them in one file."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from converters import lightcontrol
from converters.formats.base import DIFFUSERS, Format, Part, by_shapes, shapes_of
from x2jax.control import ControlConfig, LightControl
from x2jax.flux import FLUX_DEV

read, _is_here = by_shapes(lightcontrol.sizes)


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
    return [Part(DIFFUSERS, lightcontrol.control_table(cfg, blocks, prefix), shapes)]


FORMATS = (
    Format(
        "lightcontrol",
        "LightControl state dict of X2I, a file or its folder",
        read,
        parts,
        _is_here,
    ),
)
