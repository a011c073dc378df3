"""FLUX.1 transformers."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from converters.flux_diffusers import flux_table
from converters.formats.base import DIFFUSERS, F32, Format, Part, class_is, shapes_of
from x2jax.flux import Flux, FluxConfig
from x2jax.sources import read_config


def _diffusers(config: Mapping[str, Any]) -> list[Part]:
    cfg = FluxConfig.from_diffusers(config)
    shapes = shapes_of(lambda: Flux(cfg, **F32, rngs=nnx.Rngs(0)))
    return [Part(DIFFUSERS, flux_table(cfg), shapes)]


FORMATS = (
    Format(
        "flux-diffusers",
        "transformer/ of a diffusers folder of FLUX.1",
        read_config,
        _diffusers,
        class_is("FluxTransformer2DModel"),
        has_config=True,
    ),
)
