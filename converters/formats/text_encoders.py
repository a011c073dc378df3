"""T5's encoder and CLIP's text model, as a diffusers folder of FLUX.1 has them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from converters.clip import PUBLISHED, clip_table, prefix_of
from converters.formats.base import F32, TRANSFORMERS, Format, Part, class_is, limited, shapes_of
from converters.load import open_weights
from converters.t5 import SHARED, embedding_of, t5_table
from x2jax.encoders.clip import CLIPConfig, CLIPText
from x2jax.encoders.t5 import T5Config, T5Encoder
from x2jax.sources import read_config


def _read_t5(folder: Path) -> dict[str, Any]:
    tensors = open_weights(folder)
    name = embedding_of(tensors)
    return limited(read_config(folder), tensors, "num_layers") | (
        {"x2jax_embedding": name} if name != SHARED else {}
    )


def _t5(config: Mapping[str, Any]) -> list[Part]:
    cfg = T5Config.from_transformers(config)
    table = t5_table(cfg, embedding=config.get("x2jax_embedding", SHARED))
    shapes = shapes_of(lambda: T5Encoder(cfg, **F32, rngs=nnx.Rngs(0)))
    return [Part(TRANSFORMERS, table, shapes)]


def _read_clip(folder: Path) -> dict[str, Any]:
    tensors = open_weights(folder)
    prefix = prefix_of(tensors)
    return limited(read_config(folder), tensors, "num_hidden_layers") | (
        {"x2jax_prefix": prefix} if prefix != PUBLISHED else {}
    )


def _clip(config: Mapping[str, Any]) -> list[Part]:
    cfg = CLIPConfig.from_transformers(config)
    table = clip_table(cfg, prefix=config.get("x2jax_prefix", PUBLISHED))
    shapes = shapes_of(lambda: CLIPText(cfg, **F32, rngs=nnx.Rngs(0)))
    return [Part(TRANSFORMERS, table, shapes)]


FORMATS = (
    Format(
        "t5",
        "text_encoder_2/ of a diffusers folder of FLUX.1 (or a whole T5 v1.1: its encoder)",
        _read_t5,
        _t5,
        class_is("t5"),
        has_config=True,
    ),
    Format(
        "clip",
        "text_encoder/ of a diffusers folder of FLUX.1",
        _read_clip,
        _clip,
        class_is("clip_text_model"),
        has_config=True,
    ),
)
