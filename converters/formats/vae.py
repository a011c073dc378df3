"""FLUX.1's autoencoder."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from converters.formats.base import DIFFUSERS, F32, Format, Part, class_is, shapes_of
from converters.vae_diffusers import vae_table
from x2jax.encoders.vae import VAE, VAEConfig
from x2jax.sources import read_config


def _diffusers(config: Mapping[str, Any]) -> list[Part]:
    cfg = VAEConfig.from_diffusers(config)
    shapes = shapes_of(lambda: VAE(cfg, **F32, rngs=nnx.Rngs(0)))
    return [Part(DIFFUSERS, vae_table(cfg), shapes)]


FORMATS = (
    Format(
        "vae-diffusers",
        "vae/ of a diffusers folder of FLUX.1",
        read_config,
        _diffusers,
        class_is("AutoencoderKL"),
        has_config=True,
    ),
)
