"""T5 v1.1's encoder: FLUX's text features. Stacked blocks under one scan.

Axes beside `x2jax/shapes.py`: V vocabulary.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from x2jax.encoders.layers import RMSNorm
from x2jax.flux.model import stack


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Architecture of the encoder.

    Attributes:
      buckets: of relative positions, half of them for keys after the query.
      max_distance: tokens from which on all distances share the last bucket.
    """

    layers: int
    width: int
    heads: int
    head_dim: int
    mlp_width: int
    vocab: int
    buckets: int = 32
    max_distance: int = 128
    rms_eps: float = 1e-6

    def __post_init__(self):
        if self.buckets % 4 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                f"{self.buckets} buckets up to distance {self.max_distance}: buckets must be a "
                "multiple of 4, and a quarter of them less than the distance"
            )

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "T5Config":
        """Reads `text_encoder_2/config.json` of a diffusers FLUX folder.

        Raises:
          ValueError: another model type, T5 1.0 (no gate), or a missing key.
        """
        if config.get("model_type") != "t5":
            raise ValueError(
                f"expected the config of a t5 model, found {config.get('model_type')!r}"
            )
        act = config.get("feed_forward_proj")
        if act != "gated-gelu":
            raise ValueError(
                f"this is T5 1.1 (feed_forward_proj 'gated-gelu'), the config asks {act!r}"
            )
        try:
            return cls(
                layers=config["num_layers"],
                width=config["d_model"],
                heads=config["num_heads"],
                head_dim=config["d_kv"],
                mlp_width=config["d_ff"],
                vocab=config["vocab_size"],
                buckets=config["relative_attention_num_buckets"],
                max_distance=config.get("relative_attention_max_distance", 128),
                rms_eps=float(config["layer_norm_epsilon"]),
            )
        except KeyError as e:
            raise ValueError(f"the T5 config lacks {e.args[0]!r}") from None

    def to_transformers(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        return {
            "architectures": ["T5EncoderModel"],
            "model_type": "t5",
            "num_layers": self.layers,
            "d_model": self.width,
            "num_heads": self.heads,
            "d_kv": self.head_dim,
            "d_ff": self.mlp_width,
            "vocab_size": self.vocab,
            "relative_attention_num_buckets": self.buckets,
            "relative_attention_max_distance": self.max_distance,
            "layer_norm_epsilon": self.rms_eps,
            "feed_forward_proj": "gated-gelu",
            "is_encoder_decoder": True,
            "tie_word_embeddings": False,
            "pad_token_id": 0,
            "eos_token_id": 1,
        }


T5_XXL = T5Config(24, 4096, 64, 64, 10240, 32128)
T5_TINY = T5Config(2, 128, 4, 32, 256, 768)


def position_buckets(length: int, buckets: int, max_distance: int) -> Int[np.ndarray, "T T"]:
    """Bucket of (query, key): exact for near keys, logarithmic further off, by direction.

    Source: Raffel et al., arXiv 1910.10683, section 2.1, as transformers computes it.
    """
    half = buckets // 2
    exact = half // 2
    offset = np.arange(length)[None] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # float32 as in the reference: distances on the edge of a bucket must fall alike.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / np.float32(math.log(max_distance / exact)) * (half - exact)).astype(int)
    near_or_far = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return near_or_far + half * (offset > 0)


class SelfAttention(nnx.Module):
    """Attention without biases and without the scale; relative positions come as a bias."""

    def __init__(self, cfg: T5Config, *, dtype, param_dtype, rngs):
        self.head_dim = cfg.head_dim
        kw = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        inner = cfg.heads * cfg.head_dim
        self.q = nnx.Linear(cfg.width, inner, **kw)
        self.k = nnx.Linear(cfg.width, inner, **kw)
        self.v = nnx.Linear(cfg.width, inner, **kw)
        self.proj = nnx.Linear(inner, cfg.width, **kw)

    def __call__(self, x_BTD, bias_1HTT, mask_B11T):
        def heads(y):
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        q, k, v = heads(self.q(x_BTD)), heads(self.k(x_BTD)), heads(self.v(x_BTD))
        # The XLA path keeps logits and softmax in float32.
        out = jax.nn.dot_product_attention(
            q, k, v, bias=bias_1HTT, mask=mask_B11T, scale=1.0, implementation="xla"
        )
        return self.proj(out.reshape(*x_BTD.shape[:2], -1))


class GatedMLP(nnx.Module):
    """GELU (tanh form) of the gate times the value."""

    def __init__(self, cfg: T5Config, *, dtype, param_dtype, rngs):
        kw = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = nnx.Linear(cfg.width, cfg.mlp_width, **kw)
        self.up_proj = nnx.Linear(cfg.width, cfg.mlp_width, **kw)
        self.down_proj = nnx.Linear(cfg.mlp_width, cfg.width, **kw)

    def __call__(self, x):
        gate = jax.nn.gelu(self.gate_proj(x), approximate=True)
        return self.down_proj(gate * self.up_proj(x))


class Block(nnx.Module):
    """One pre-norm block."""

    def __init__(self, cfg: T5Config, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm1 = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.attn = SelfAttention(cfg, **kw)
        self.norm2 = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.mlp = GatedMLP(cfg, **kw)

    def __call__(self, x, bias, mask):
        x = x + self.attn(self.norm1(x), bias, mask)
        return x + self.mlp(self.norm2(x))


class T5Encoder(nnx.Module):
    """Token ids to features. FLUX uses the last state of 512 tokens, padded right, pads attended.

    Raises:
      ValueError: float16, which the residual stream of the published weights overflows; bfloat16
        has float32's range and is what FLUX's pipelines run.
    """

    def __init__(self, cfg: T5Config, *, dtype, param_dtype, rngs: nnx.Rngs):
        if jnp.dtype(dtype) == jnp.float16:
            raise ValueError("T5 overflows in float16: use bfloat16 or float32")
        self.cfg, self.dtype = cfg, dtype
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.shared = nnx.Embed(cfg.vocab, cfg.width, rngs=rngs, **kw)
        self.position_bias = nnx.Embed(
            cfg.buckets, cfg.heads, dtype=jnp.float32, param_dtype=param_dtype, rngs=rngs
        )
        self.blocks = stack(lambda r: Block(cfg, rngs=r, **kw), cfg.layers, rngs)
        self.final_norm = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)

    def __call__(
        self, ids_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"] | None = None
    ) -> Float[Array, "B T D"]:
        """The last hidden state, after the final norm.

        Args:
          ids_BT: token ids.
          mask_BT: True at tokens that may be attended; None attends all, as FLUX does.
        """
        cfg = self.cfg
        buckets = position_buckets(ids_BT.shape[1], cfg.buckets, cfg.max_distance)
        # One bias for all blocks: the first one's.
        bias_1HTT = jnp.moveaxis(self.position_bias(jnp.asarray(buckets)), -1, 0)[None]
        mask_B11T = None if mask_BT is None else mask_BT[:, None, None]

        def body(x, block):
            return block(x, bias_1HTT, mask_B11T), None

        x_BTD, _ = jax.lax.scan(body, self.shared(ids_BT), self.blocks)
        return self.final_norm(x_BTD)
