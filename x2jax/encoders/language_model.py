"""A language model from its folder, whichever of the known kinds it is."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from converters.load import load, open_weights
from converters.qwen2_5_vl import qwen_table
from converters.qwen3 import qwen3_table
from x2jax import sharding, sources
from x2jax.encoders.qwen2_5_vl import Qwen2_5_VL, QwenConfig
from x2jax.encoders.qwen3 import Qwen3, Qwen3Config
from x2jax.trees import Params, Skeleton, prefixed

KINDS = ("qwen2_5_vl", "qwen3")
"""`model_type` of a folder's config."""


def load_decoder(
    value: str, *, dtype: str, mesh: Mesh, option: str = "mllm"
) -> tuple[Skeleton, Params, Path]:
    """The text path of Qwen2.5-VL, or a Qwen3, with its weights on the devices.

    Args:
      value: transformers folder, or "tiny".
      dtype: of weights and arithmetic.
      mesh: where the weights lie, by the rules of `x2jax.sharding`.
      option: how the user named it, for messages.

    Returns:
      The model's skeleton, its parameters, and the folder, for a tokenizer.

    Raises:
      FileNotFoundError: no such folder, or no config in it.
      ValueError: a model of another kind, or weights that do not fit.
    """
    root = sources.folder(value, option, "qwen")
    config = sources.read_config(root)
    kind = config.get("model_type")
    if kind not in KINDS:
        raise ValueError(f"{root} holds a model of type {kind!r}; known are {', '.join(KINDS)}")
    cfg: Any
    if kind == "qwen3":
        cfg = Qwen3Config.from_transformers(config)
        make, table = Qwen3, qwen3_table(cfg)
    else:
        cfg = QwenConfig.from_transformers(config)
        nested = any(n.startswith("model.language_model.") for n in open_weights(root))
        make, table = Qwen2_5_VL, qwen_table(cfg, nested=nested)
    kw = dict(dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
    skeleton = Skeleton(nnx.eval_shape(lambda: make(cfg, rngs=nnx.Rngs(0), **kw)))
    by_path = sharding.param_shardings(prefixed(skeleton.abstract, "mllm"), mesh)
    abstract = {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_path[f"mllm/{path}"])
        for path, x in skeleton.abstract.items()
    }
    return skeleton, load(root, table, abstract), root
