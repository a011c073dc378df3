"""FLUX.1: the diffusion transformer over one packed image stream."""

from x2jax.flux.config import FLUX_DEV, FLUX_SCHNELL, FLUX_TINY, FluxConfig
from x2jax.flux.latents import PAD, SOURCE, TARGET, ImageStream
from x2jax.flux.model import Flux, FluxOutput, Seen
from x2jax.flux.scan import Probe

__all__ = [
    "FLUX_DEV",
    "FLUX_SCHNELL",
    "FLUX_TINY",
    "PAD",
    "SOURCE",
    "TARGET",
    "Flux",
    "FluxConfig",
    "FluxOutput",
    "ImageStream",
    "Probe",
    "Seen",
]
