"""The tiny family in the public folder layouts, read by the code that reads FLUX.1-dev.

flux/transformer, flux/vae      diffusers
qwen                            transformers, with the tokenizer
alignnet                        raw state dict
"""

import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from converters.alignnet import alignnet_table
from converters.flux_diffusers import flux_table
from converters.qwen2_5_vl import qwen_table
from converters.save import save
from converters.vae_diffusers import vae_table
from x2jax.alignnet import AlignNet, AlignNetConfig
from x2jax.encoders.qwen2_5_vl import QWEN_TINY
from x2jax.encoders.vae import VAEConfig
from x2jax.flux import FLUX_TINY, Flux
from x2jax.trees import Params, state_params

ALIGNNET_TINY = AlignNetConfig(
    QWEN_TINY.states, QWEN_TINY.width, FLUX_TINY.text_width, FLUX_TINY.pooled_width
)
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_flux(params: Params, root: Path, dtype: Any) -> None:
    """Paths relative to `flux/`."""
    folder = root / "flux" / "transformer"
    _config(folder, FLUX_TINY.to_diffusers())
    save(params, flux_table(FLUX_TINY), folder / WEIGHTS, dtype=dtype)


def write_vae(params: Params, cfg: VAEConfig, root: Path, dtype: Any) -> None:
    """Paths relative to `vae/`."""
    folder = root / "flux" / "vae"
    _config(folder, cfg.to_diffusers())
    save(params, vae_table(cfg), folder / WEIGHTS, dtype=dtype)


def write_qwen(params: Params, root: Path, dtype: Any) -> None:
    """Paths relative to `mllm/`; the tokenizer is saved beside by `x2jax.tiny.language`."""
    folder = root / "qwen"
    ids = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    _config(folder, {"model_type": "qwen2_5_vl", **QWEN_TINY.to_transformers(), **ids})
    save(params, qwen_table(QWEN_TINY), folder / "model.safetensors", dtype=dtype)


def write_alignnet(params: Params, root: Path, dtype: Any) -> None:
    """Paths relative to `alignnet/`."""
    folder = root / "alignnet"
    folder.mkdir(parents=True, exist_ok=True)
    table = alignnet_table(ALIGNNET_TINY.states, ALIGNNET_TINY.mixing)
    save(params, table, folder / WEIGHTS, dtype=dtype)


def write_untrained(root: Path, seed: int = 0) -> None:
    """FLUX and AlignNet as initialised."""
    f32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)
    flux = Flux(FLUX_TINY, **f32, rngs=nnx.Rngs(seed))
    write_flux(state_params(flux), root, "bfloat16")
    align = AlignNet(ALIGNNET_TINY, **f32, rngs=nnx.Rngs(seed))
    write_alignnet(state_params(align), root, "bfloat16")
