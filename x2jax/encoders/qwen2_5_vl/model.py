"""The language model of Qwen2.5-VL with all hidden states; stacked layers under one scan.

Only text for now: its three rotary position rows are equal, so mrope is ordinary rotary embedding;
the sections are kept in the config for the vision path.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from x2jax.encoders.qwen2_5_vl.config import QwenConfig
from x2jax.flux.model import stack


class RMSNorm(nnx.Module):
    """RMS norm in float32."""

    def __init__(self, width: int, eps: float, *, param_dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (self.scale[...] * y.astype(x.dtype)).astype(x.dtype)


def text_positions(mask_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that count valid tokens; pads get 1, as transformers has it (nothing sees them)."""
    count = jnp.cumsum(mask_BT.astype(jnp.int32), axis=-1) - 1
    return jnp.where(mask_BT, count, 1)


def rotate_half(x, cos, sin):
    """Rotary embedding of (first half, second half) pairs, in float32; returns x's dtype."""
    y = x.astype(jnp.float32)
    a, b = jnp.split(y, 2, axis=-1)
    return (y * cos + jnp.concatenate([-b, a], axis=-1) * sin).astype(x.dtype)


class SelfAttention(nnx.Module):
    """Grouped-query attention with biases on q, k and v."""

    def __init__(self, cfg: QwenConfig, *, dtype, param_dtype, rngs):
        self.cfg = cfg
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        kv = cfg.kv_heads * cfg.head_dim
        self.q_proj = nnx.Linear(cfg.width, cfg.width, **kw)
        self.k_proj = nnx.Linear(cfg.width, kv, **kw)
        self.v_proj = nnx.Linear(cfg.width, kv, **kw)
        self.o_proj = nnx.Linear(cfg.width, cfg.width, use_bias=False, **kw)

    def __call__(self, x_BTD, cos, sin, mask_B1TT):
        def heads(y):
            return y.reshape(*y.shape[:2], -1, self.cfg.head_dim)

        q = rotate_half(heads(self.q_proj(x_BTD)), cos, sin)
        k = rotate_half(heads(self.k_proj(x_BTD)), cos, sin)
        v = heads(self.v_proj(x_BTD))
        out = jax.nn.dot_product_attention(q, k, v, mask=mask_B1TT, implementation="xla")
        return self.o_proj(out.reshape(x_BTD.shape))


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, cfg: QwenConfig, *, dtype, param_dtype, rngs):
        kw = dict(use_bias=False, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = nnx.Linear(cfg.width, cfg.mlp_width, **kw)
        self.up_proj = nnx.Linear(cfg.width, cfg.mlp_width, **kw)
        self.down_proj = nnx.Linear(cfg.mlp_width, cfg.width, **kw)

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, cfg: QwenConfig, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.input_layernorm = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.self_attn = SelfAttention(cfg, **kw)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.mlp = MLP(cfg, **kw)

    def __call__(self, x, cos, sin, mask):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2_5_VL(nnx.Module):
    """Qwen2.5-VL's text path."""

    def __init__(self, cfg: QwenConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.cfg, self.dtype = cfg, dtype
        self.embed_tokens = nnx.Embed(
            cfg.vocab, cfg.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )
        self.layers = stack(
            lambda r: Layer(cfg, dtype=dtype, param_dtype=param_dtype, rngs=r), cfg.layers, rngs
        )
        self.norm = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.lm_head = (
            None
            if cfg.tied
            else nnx.Linear(
                cfg.width,
                cfg.vocab,
                use_bias=False,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )
        )

    def hidden_states(
        self, ids_BT: Int[Array, "B T"], mask_BT: Bool[Array, "B T"]
    ) -> Float[Array, "N B T D"]:
        """Embeddings, the states after every layer, the last one after the final norm.

        Args:
          ids_BT: token ids, left-padded.
          mask_BT: True at tokens. States at pads are finite: a pad attends to itself.
        """
        half = self.cfg.head_dim // 2
        frequencies = 1.0 / self.cfg.rope_theta ** (jnp.arange(half, dtype=jnp.float32) / half)
        angles = text_positions(mask_BT)[..., None].astype(jnp.float32) * frequencies
        angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
        cos, sin = jnp.cos(angles), jnp.sin(angles)
        length = ids_BT.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        allowed = (causal & mask_BT[:, None, :]) | jnp.eye(length, dtype=bool)

        def body(x, layer):
            y = layer(x, cos, sin, allowed[:, None])
            return y, y

        x = self.embed_tokens(ids_BT)
        last, states = jax.lax.scan(body, x, self.layers)
        return jnp.concatenate([x[None], states[:-1], self.norm(last)[None]])

    def logits(self, state_BTD: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """Next-token logits of the last hidden state."""
        if self.lm_head is None:
            return self.embed_tokens.attend(state_BTD)
        return self.lm_head(state_BTD)
