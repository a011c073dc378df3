"""The tiny family in the public folder layouts, read by the code that reads FLUX.1-dev.

flux                  diffusers: FluxPipeline.from_pretrained reads the folder
  transformer, vae
  text_encoder(_2)    transformers: CLIP and T5; their tokenizers beside, tokenizer(_2)
qwen                  transformers, with the tokenizer and the vision tower
alignnet              raw state dict
"""

import json
from pathlib import Path
from typing import Any

from converters.alignnet import alignnet_table
from converters.clip import clip_table
from converters.flux_diffusers import flux_table
from converters.qwen2_5_vl import qwen_table
from converters.save import save
from converters.t5 import t5_table
from converters.vae_diffusers import vae_table
from x2jax.alignnet import AlignNetConfig
from x2jax.encoders.clip import CLIP_TINY
from x2jax.encoders.qwen2_5_vl import QWEN_TINY, VisionConfig
from x2jax.encoders.qwen2_5_vl.preprocess import IMAGE_PIXELS, MEAN, STD
from x2jax.encoders.t5 import T5_TINY
from x2jax.encoders.vae import VAEConfig
from x2jax.flux import FLUX_TINY
from x2jax.trees import Params

ALIGNNET_TINY = AlignNetConfig(
    QWEN_TINY.states, QWEN_TINY.width, FLUX_TINY.text_width, FLUX_TINY.pooled_width
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
PIPELINE = {
    "_class_name": "FluxPipeline",
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "T5TokenizerFast"],
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SCHEDULER = {
    "_class_name": "FlowMatchEulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "shift": 3.0,
    "use_dynamic_shifting": True,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
"""As FLUX.1-dev has them."""


def _config(folder: Path, config: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _json(folder / "config.json", config)


def _json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_flux(params: Params, root: Path, dtype: Any) -> None:
    """Paths relative to `flux/`."""
    folder = root / "flux" / "transformer"
    _config(folder, FLUX_TINY.to_diffusers())
    save(params, flux_table(FLUX_TINY), folder / WEIGHTS, dtype=dtype)
    _json(root / "flux" / "model_index.json", PIPELINE)
    (root / "flux" / "scheduler").mkdir(exist_ok=True)
    _json(root / "flux" / "scheduler" / "scheduler_config.json", SCHEDULER)


def write_t5(params: Params, root: Path, dtype: Any) -> None:
    """Paths relative to `t5/`; `x2jax.tiny.tokenizers` saves the tokenizers."""
    folder = root / "flux" / "text_encoder_2"
    _config(folder, T5_TINY.to_transformers())
    save(params, t5_table(T5_TINY), folder / "model.safetensors", dtype=dtype)


def write_clip(params: Params, root: Path, dtype: Any) -> None:
    """Paths relative to `clip/`."""
    folder = root / "flux" / "text_encoder"
    _config(folder, CLIP_TINY.to_transformers())
    save(params, clip_table(CLIP_TINY), folder / "model.safetensors", dtype=dtype)


def write_vae(params: Params, cfg: VAEConfig, root: Path, dtype: Any) -> None:
    """Paths relative to `vae/`."""
    folder = root / "flux" / "vae"
    _config(folder, cfg.to_diffusers())
    save(params, vae_table(cfg), folder / WEIGHTS, dtype=dtype)


def write_qwen(params: Params, root: Path, dtype: Any, vision: VisionConfig | None = None) -> None:
    """Paths relative to `mllm/`; the tokenizer is saved beside by `x2jax.tiny.language`."""
    folder = root / "qwen"
    config = {"model_type": "qwen2_5_vl", **QWEN_TINY.to_transformers()}
    config |= {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    if vision is not None:
        # Start, end, image and video are the last of the vocabulary (`language.VISION`).
        first = vision.image_token - 2
        config |= {"vision_start_token_id": first, "vision_end_token_id": first + 1}
        config |= vision.to_transformers()
        processor = {
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen2_5_VLProcessor",
            "patch_size": vision.patch,
            "temporal_patch_size": vision.temporal_patch,
            "merge_size": vision.merge,
            "min_pixels": IMAGE_PIXELS[0],
            "max_pixels": IMAGE_PIXELS[1],
            "image_mean": [float(str(x)) for x in MEAN],
            "image_std": [float(str(x)) for x in STD],
        }
        folder.mkdir(parents=True, exist_ok=True)
        _json(folder / "preprocessor_config.json", processor)
    _config(folder, config)
    table = qwen_table(QWEN_TINY, vision=vision)
    save(params, table, folder / "model.safetensors", dtype=dtype)


def write_alignnet(params: Params, root: Path, dtype: Any) -> None:
    """Paths relative to `alignnet/`."""
    folder = root / "alignnet"
    folder.mkdir(parents=True, exist_ok=True)
    table = alignnet_table(ALIGNNET_TINY.states, ALIGNNET_TINY.mixing)
    save(params, table, folder / WEIGHTS, dtype=dtype)
