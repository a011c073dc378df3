"""Qwen2.5-VL."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from converters.formats.base import F32, TRANSFORMERS, Format, Part, class_is, shapes_of
from converters.load import open_weights
from converters.qwen2_5_vl import qwen_table
from x2jax.encoders.qwen2_5_vl import Qwen2_5_VL, QwenConfig
from x2jax.sources import read_config


def _read(folder: Path) -> dict[str, Any]:
    nested = any(n.startswith("model.language_model.") for n in open_weights(folder))
    return read_config(folder) | ({"x2jax_nested": True} if nested else {})


def _parts(config: Mapping[str, Any]) -> list[Part]:
    cfg = QwenConfig.from_transformers(config)
    table = qwen_table(cfg, nested=config.get("x2jax_nested", False))
    shapes = shapes_of(lambda: Qwen2_5_VL(cfg, **F32, rngs=nnx.Rngs(0)))
    return [Part(TRANSFORMERS, table, shapes)]


FORMATS = (
    Format(
        "qwen2.5-vl",
        "transformers folder of Qwen2.5-VL (its text path)",
        _read,
        _parts,
        class_is("qwen2_5_vl"),
        has_config=True,
    ),
)
