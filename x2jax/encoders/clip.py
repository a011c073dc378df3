"""CLIP's text model: FLUX's pooled vector. Stacked blocks under one scan.

Axes beside `x2jax/shapes.py`: S tokens here.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from x2jax.flux.model import stack

LEGACY_EOS = 2
"""`eos_token_id` of configs that predate its correction; then the end is the highest id."""


@dataclasses.dataclass(frozen=True)
class CLIPConfig:
    """Architecture of the text model.

    Attributes:
      positions: tokens at most; positions are learned.
      eos_token: the end token's id as the config says it. 2 (`LEGACY_EOS`) is wrong in most
        published configs, FLUX's too, and means the highest id of a row.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    vocab: int
    positions: int = 77
    eos_token: int = LEGACY_EOS
    norm_eps: float = 1e-5

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(f"width {self.width} does not divide into {self.heads} heads")

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "CLIPConfig":
        """Reads `text_encoder/config.json` of a diffusers FLUX folder.

        Raises:
          ValueError: another model type or activation, or a missing key.
        """
        if config.get("model_type") != "clip_text_model":
            raise ValueError(
                f"expected the config of a clip_text_model, found {config.get('model_type')!r}"
            )
        act = config.get("hidden_act", "quick_gelu")
        if act != "quick_gelu":
            raise ValueError(f"this is CLIP-L's text model (quick_gelu), the config asks {act!r}")
        try:
            return cls(
                layers=config["num_hidden_layers"],
                width=config["hidden_size"],
                heads=config["num_attention_heads"],
                mlp_width=config["intermediate_size"],
                vocab=config["vocab_size"],
                positions=config["max_position_embeddings"],
                eos_token=config["eos_token_id"],
                norm_eps=float(config["layer_norm_eps"]),
            )
        except KeyError as e:
            raise ValueError(f"the CLIP config lacks {e.args[0]!r}") from None

    def to_transformers(self) -> dict[str, Any]:
        """The `config.json` that transformers reads."""
        return {
            "architectures": ["CLIPTextModel"],
            "model_type": "clip_text_model",
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "intermediate_size": self.mlp_width,
            "vocab_size": self.vocab,
            "max_position_embeddings": self.positions,
            "eos_token_id": self.eos_token,
            "layer_norm_eps": self.norm_eps,
            "hidden_act": "quick_gelu",
            "projection_dim": self.width,
            "bos_token_id": 0,  # as published; nothing reads the two
            "pad_token_id": 1,
        }


CLIP_L = CLIPConfig(12, 768, 12, 3072, 49408)
CLIP_TINY = CLIPConfig(2, 64, 4, 128, 1024)


class CLIPOutput(NamedTuple):
    """Attributes: states after the final norm, and the one at the end token."""

    states_BSD: Float[Array, "B S D"]
    pooled_BD: Float[Array, "B D"]


class SelfAttention(nnx.Module):
    """Causal attention with biases."""

    def __init__(self, cfg: CLIPConfig, *, dtype, param_dtype, rngs):
        self.heads = cfg.heads
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.q = nnx.Linear(cfg.width, cfg.width, **kw)
        self.k = nnx.Linear(cfg.width, cfg.width, **kw)
        self.v = nnx.Linear(cfg.width, cfg.width, **kw)
        self.proj = nnx.Linear(cfg.width, cfg.width, **kw)

    def __call__(self, x_BSD):
        def heads(y):
            return y.reshape(*y.shape[:2], self.heads, -1)

        q, k, v = heads(self.q(x_BSD)), heads(self.k(x_BSD)), heads(self.v(x_BSD))
        # The XLA path keeps logits and softmax in float32.
        out = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="xla")
        return self.proj(out.reshape(x_BSD.shape))


class MLP(nnx.Module):
    """With the sigmoid approximation of GELU."""

    def __init__(self, cfg: CLIPConfig, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.mlp_in = nnx.Linear(cfg.width, cfg.mlp_width, **kw)
        self.mlp_out = nnx.Linear(cfg.mlp_width, cfg.width, **kw)

    def __call__(self, x):
        h = self.mlp_in(x)
        return self.mlp_out(h * jax.nn.sigmoid(1.702 * h))


class Block(nnx.Module):
    """One pre-norm block."""

    def __init__(self, cfg: CLIPConfig, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        # Statistics are float32 whatever the dtype.
        self.norm1 = nnx.LayerNorm(cfg.width, epsilon=cfg.norm_eps, **kw)
        self.attn = SelfAttention(cfg, **kw)
        self.norm2 = nnx.LayerNorm(cfg.width, epsilon=cfg.norm_eps, **kw)
        self.mlp = MLP(cfg, **kw)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class CLIPText(nnx.Module):
    """Token ids to states and the pooled vector. FLUX uses the pooled vector of 77 tokens."""

    def __init__(self, cfg: CLIPConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.cfg, self.dtype = cfg, dtype
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.token_embedding = nnx.Embed(cfg.vocab, cfg.width, rngs=rngs, **kw)
        self.position_embedding = nnx.Embed(cfg.positions, cfg.width, rngs=rngs, **kw)
        self.blocks = stack(lambda r: Block(cfg, rngs=r, **kw), cfg.layers, rngs)
        self.final_norm = nnx.LayerNorm(cfg.width, epsilon=cfg.norm_eps, rngs=rngs, **kw)

    def __call__(self, ids_BS: Int[Array, "B S"]) -> CLIPOutput:
        """States and pooled vector.

        Args:
          ids_BS: token ids with start and end, padded right. Attention is causal, so pads do not
            reach the pooled vector, and S may be any number that holds the end token.

        Raises:
          ValueError: more tokens than learned positions.
        """
        length = ids_BS.shape[1]
        if length > self.cfg.positions:
            raise ValueError(f"{length} tokens, this CLIP has {self.cfg.positions} positions")
        x_BSD = self.token_embedding(ids_BS) + self.position_embedding(jnp.arange(length))
        x_BSD, _ = jax.lax.scan(lambda x, block: (block(x), None), x_BSD, self.blocks)
        states_BSD = self.final_norm(x_BSD)
        # The first of several: pads may be end tokens.
        legacy = self.cfg.eos_token == LEGACY_EOS
        ends_BS = ids_BS if legacy else ids_BS == self.cfg.eos_token
        at_B = jnp.argmax(ends_BS, axis=-1)
        pooled_BD = jnp.take_along_axis(states_BSD, at_B[:, None, None], axis=1)[:, 0]
        return CLIPOutput(states_BSD, pooled_BD)
