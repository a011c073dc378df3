"""Qwen3."""

from collections.abc import Mapping
from typing import Any

from flax import nnx

from converters.formats.base import F32, TRANSFORMERS, Format, Part, class_is, shapes_of
from converters.qwen3 import qwen3_table
from x2jax.encoders.qwen3 import Qwen3, Qwen3Config
from x2jax.sources import read_config


def _parts(config: Mapping[str, Any]) -> list[Part]:
    cfg = Qwen3Config.from_transformers(config)
    shapes = shapes_of(lambda: Qwen3(cfg, **F32, rngs=nnx.Rngs(0)))
    return [Part(TRANSFORMERS, qwen3_table(cfg), shapes)]


FORMATS = (
    Format(
        "qwen3",
        "transformers folder of a Qwen3 text model",
        read_config,
        _parts,
        class_is("qwen3"),
        has_config=True,
    ),
)
