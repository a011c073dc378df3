"""Qwen2.5-VL, with its vision tower where the folder has one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from converters.formats.base import F32, TRANSFORMERS, Format, Part, class_is, limited, shapes_of
from converters.load import open_weights
from converters.qwen2_5_vl import qwen_table
from x2jax.encoders.qwen2_5_vl import Qwen2_5_VL, QwenConfig, VisionConfig
from x2jax.sources import read_config


def _read(folder: Path) -> dict[str, Any]:
    tensors = open_weights(folder)
    config = limited(read_config(folder), tensors, "num_hidden_layers")
    config = limited(config, tensors, "num_hidden_layers", at="text_config")
    config = limited(config, tensors, "depth", at="vision_config")
    nested = any(n.startswith("model.language_model.") for n in tensors)
    return config | ({"x2jax_nested": True} if nested else {})


def _parts(config: Mapping[str, Any]) -> list[Part]:
    cfg = QwenConfig.from_transformers(config)
    vision = VisionConfig.from_transformers(config) if config.get("vision_config") else None
    table = qwen_table(cfg, nested=config.get("x2jax_nested", False), vision=vision)
    shapes = shapes_of(lambda: Qwen2_5_VL(cfg, vision, **F32, rngs=nnx.Rngs(0)))
    return [Part(TRANSFORMERS, table, shapes)]


FORMATS = (
    Format(
        "qwen2.5-vl",
        "transformers folder of Qwen2.5-VL, with its vision tower if config.json has one",
        _read,
        _parts,
        class_is("qwen2_5_vl"),
        has_config=True,
    ),
)
