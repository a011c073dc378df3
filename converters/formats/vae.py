"""FLUX.1's autoencoder, as diffusers has it and as Black Forest Labs has it."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from converters import single_file, vae_bfl
from converters.formats.base import DIFFUSERS, F32, Format, Part, class_is, limited, shapes_of
from converters.load import open_weights
from converters.rules import Shape
from converters.safetensors_io import Tensors
from converters.vae_diffusers import vae_table
from x2jax.encoders.vae import VAE, VAEConfig
from x2jax.sources import read_config

FIRST = "encoder.mid.attn_1.q.weight"
PREFIXES = ("first_stage_model.", "vae.", "")
COUNTS = ("layers_per_block", "block_out_channels")


def _read_diffusers(folder: Path) -> dict[str, Any]:
    return limited(read_config(folder), open_weights(folder), *COUNTS)


@functools.cache
def _shapes(cfg: VAEConfig) -> dict[str, Shape]:
    return shapes_of(lambda: VAE(cfg, **F32, rngs=nnx.Rngs(0)))


def _diffusers(config: Mapping[str, Any]) -> list[Part]:
    cfg = VAEConfig.from_diffusers(config)
    return [Part(DIFFUSERS, vae_table(cfg), _shapes(cfg))]


def _open_bfl(path: Path) -> Tensors:
    return single_file.unwrap(open_weights(path), PREFIXES, FIRST)


def _read_bfl(path: Path) -> dict[str, Any]:
    tensors = _open_bfl(path)
    noted = single_file.noted_config(tensors.metadata)
    # A larger checkpoint's config is that of its transformer.
    if noted is not None and noted.get("_class_name") == "AutoencoderKL":
        return limited(noted, tensors, *COUNTS)
    return vae_bfl.sizes({n: tuple(x.shape) for n, x in tensors.items()})


def _bfl(config: Mapping[str, Any]) -> list[Part]:
    cfg = VAEConfig.from_diffusers(config)
    (part,) = _diffusers(config)
    metadata = {single_file.CONFIG: cfg.to_diffusers()}
    table = vae_bfl.vae_bfl_table(cfg)
    return [
        dataclasses.replace(
            part, file="ae.safetensors", table=table, max_shard=None, metadata=metadata
        )
    ]


def _is_bfl(path: Path) -> bool:
    try:
        return FIRST in _open_bfl(path)
    except (OSError, ValueError, ImportError):
        return False


FORMATS = (
    Format(
        "vae-diffusers",
        "vae/ of a diffusers folder of FLUX.1",
        _read_diffusers,
        _diffusers,
        class_is("AutoencoderKL"),
        has_config=True,
        kind="vae",
    ),
    Format(
        "vae-bfl",
        "FLUX.1's autoencoder in one file (ae.safetensors), as BFL publishes it",
        _read_bfl,
        _bfl,
        _is_bfl,
        kind="vae",
        open=_open_bfl,
    ),
)
