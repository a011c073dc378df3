"""FLUX.1 transformers, as diffusers has them and as Black Forest Labs has them."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from converters import flux_bfl, single_file
from converters.flux_diffusers import flux_table
from converters.formats.base import DIFFUSERS, F32, Format, Part, class_is, limited, shapes_of
from converters.load import open_weights
from converters.rules import Shape
from converters.safetensors_io import Tensors
from x2jax.flux import Flux, FluxConfig
from x2jax.sources import read_config

FIRST = "double_blocks.0.img_attn.norm.key_norm.scale"
PREFIXES = ("model.diffusion_model.", "")


def _read_diffusers(folder: Path) -> dict[str, Any]:
    return limited(read_config(folder), open_weights(folder), "num_layers", "num_single_layers")


@functools.cache
def _shapes(cfg: FluxConfig) -> dict[str, Shape]:
    return shapes_of(lambda: Flux(cfg, **F32, rngs=nnx.Rngs(0)))


def _diffusers(config: Mapping[str, Any]) -> list[Part]:
    cfg = FluxConfig.from_diffusers(config)
    return [Part(DIFFUSERS, flux_table(cfg), _shapes(cfg))]


def _open_bfl(path: Path) -> Tensors:
    return single_file.unwrap(open_weights(path), PREFIXES, FIRST)


def _read_bfl(path: Path) -> dict[str, Any]:
    tensors = _open_bfl(path)
    noted = single_file.noted_config(tensors.metadata)
    if noted is not None:
        return limited(noted, tensors, "num_layers", "num_single_layers")
    return flux_bfl.sizes({n: tuple(x.shape) for n, x in tensors.items()})


def _bfl(config: Mapping[str, Any]) -> list[Part]:
    cfg = FluxConfig.from_diffusers(config)
    (part,) = _diffusers(config)
    return [
        dataclasses.replace(
            part,
            file="flux1-dev.safetensors" if cfg.guidance else "flux1-schnell.safetensors",
            table=flux_bfl.flux_bfl_table(cfg),
            max_shard=None,
            metadata={single_file.CONFIG: cfg.to_diffusers()},
        )
    ]


def _is_bfl(path: Path) -> bool:
    try:
        return FIRST in _open_bfl(path)
    except (OSError, ValueError, ImportError):
        return False


FORMATS = (
    Format(
        "flux-diffusers",
        "transformer/ of a diffusers folder of FLUX.1",
        _read_diffusers,
        _diffusers,
        class_is("FluxTransformer2DModel"),
        has_config=True,
        kind="flux",
    ),
    Format(
        "flux-bfl",
        "FLUX.1 in one file, as BFL publishes it; also float8, also inside a larger checkpoint",
        _read_bfl,
        _bfl,
        _is_bfl,
        kind="flux",
        open=_open_bfl,
    ),
)
