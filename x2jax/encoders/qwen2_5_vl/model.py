"""Qwen2.5-VL with all hidden states; stacked layers under one scan.

In text the three rotary position rows are equal, so mrope is ordinary rotary embedding. Images and
videos bring positions of their own, and the tokens that the optional vision tower makes of them.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from x2jax.encoders.qwen2_5_vl import mixing
from x2jax.encoders.qwen2_5_vl.config import QwenConfig
from x2jax.encoders.qwen2_5_vl.layers import MLP, RMSNorm, rotate_half
from x2jax.encoders.qwen2_5_vl.vision import VisionInputs, VisionTower
from x2jax.encoders.qwen2_5_vl.vision_config import VisionConfig
from x2jax.flux.model import stack


def text_positions(mask_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that count valid tokens; pads get 1, as transformers has it (nothing sees them)."""
    count = jnp.cumsum(mask_BT.astype(jnp.int32), axis=-1) - 1
    return jnp.where(mask_BT, count, 1)


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


class Layer(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, cfg: QwenConfig, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.input_layernorm = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.self_attn = SelfAttention(cfg, **kw)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.mlp = MLP(cfg.width, cfg.mlp_width, use_bias=False, **kw)

    def __call__(self, x, cos, sin, mask):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Qwen2_5_VL(nnx.Module):
    """Qwen2.5-VL's text path, with the vision tower as `visual` if `vision` says what it is.

    Raises:
      ValueError: the tower's tokens are not as wide as the language model.
    """

    def __init__(
        self,
        cfg: QwenConfig,
        vision: VisionConfig | None = None,
        *,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
    ):
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
        if vision is not None and vision.out_width != cfg.width:
            raise ValueError(
                f"the vision tower makes tokens of width {vision.out_width}, the language model's "
                f"is {cfg.width}: take both configs from one folder"
            )
        # Last, so that the text path is initialised alike with and without it.
        self.visual = (
            None
            if vision is None
            else VisionTower(vision, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        )

    def hidden_states(
        self,
        ids_BT: Int[Array, "B T"],
        mask_BT: Bool[Array, "B T"],
        *,
        positions_BT3: Int[Array, "B T 3"] | None = None,
        vision: VisionInputs | None = None,
    ) -> Float[Array, "N B T D"]:
        """Embeddings, the states after every layer, the last one after the final norm.

        Args:
          ids_BT: token ids, left-padded.
          mask_BT: True at tokens. States at pads are finite: a pad attends to itself.
          positions_BT3: temporal, row and column positions (`mrope_positions`); None counts tokens.
          vision: images and videos (`pack`); their tokens replace the embeddings of the image and
            video tokens, in order.

        Raises:
          ValueError: `vision` without a tower, or without positions.
        """
        x, step = self.enter(ids_BT, mask_BT, positions_BT3, vision)

        def body(x, layer):
            y = step(layer, x)
            return y, y

        last, states = jax.lax.scan(body, x, self.layers)
        return jnp.concatenate([x[None], states[:-1], self.norm(last)[None]])

    def mixed_states(
        self,
        add: mixing.Add,
        weights_N: Float[Array, "N ..."],
        ids_BT: Int[Array, "B T"],
        mask_BT: Bool[Array, "B T"],
        *,
        positions_BT3: Int[Array, "B T 3"] | None = None,
        vision: VisionInputs | None = None,
    ) -> Float[Array, "B T D"]:
        """A float32 sum over the states of `hidden_states` that never holds them all at once.

        No gradient enters this model; that of `weights_N` is exact.

        Args:
          add: (sum, state, weight) -> sum, as `x2jax.alignnet.add_state`.
          weights_N: a weight for each state.

        Raises:
          ValueError: as `hidden_states`.
        """
        start = jnp.zeros((*ids_BT.shape, self.cfg.width), jnp.float32)
        return mixing.mix(self, add, weights_N, start, (ids_BT, mask_BT, positions_BT3, vision))

    def enter(self, ids_BT, mask_BT, positions_BT3, vision) -> tuple[Array, Callable]:
        """The embeddings, and the function (layer, x) -> x that the scans run."""
        cos, sin = self._rotary(mask_BT, positions_BT3)
        length = ids_BT.shape[1]
        causal = jnp.tril(jnp.ones((length, length), bool))
        allowed = (causal & mask_BT[:, None, :]) | jnp.eye(length, dtype=bool)
        x = self.embed_tokens(ids_BT)
        if vision is not None:
            x = self._splice(x, ids_BT, mask_BT, positions_BT3, vision)
        return x, lambda layer, x: layer(x, cos, sin, allowed[:, None])

    def _rotary(self, mask_BT, positions_BT3):
        half = self.cfg.head_dim // 2
        frequencies = 1.0 / self.cfg.rope_theta ** (jnp.arange(half, dtype=jnp.float32) / half)
        if positions_BT3 is None:
            angles = text_positions(mask_BT)[..., None].astype(jnp.float32) * frequencies
        else:
            row = np.repeat(np.arange(3), self.cfg.mrope_section)
            angles = positions_BT3[..., row].astype(jnp.float32) * frequencies
        angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
        return jnp.cos(angles), jnp.sin(angles)

    def _splice(self, x_BTD, ids_BT, mask_BT, positions_BT3, vision: VisionInputs):
        if self.visual is None:
            raise ValueError("this model has no vision tower: build it with a VisionConfig")
        if positions_BT3 is None:
            raise ValueError("images and videos need positions_BT3: make them by mrope_positions")
        cfg, seen_BMD = self.visual.cfg, self.visual(vision)
        is_seen_BT = ((ids_BT == cfg.image_token) | (ids_BT == cfg.video_token)) & mask_BT
        at_BT = jnp.clip(jnp.cumsum(is_seen_BT, axis=1) - 1, 0, seen_BMD.shape[1] - 1)
        seen_BTD = jnp.take_along_axis(seen_BMD, at_BT[..., None], axis=1)
        return jnp.where(is_seen_BT[..., None], seen_BTD.astype(x_BTD.dtype), x_BTD)

    def logits(self, state_BTD: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """Next-token logits of the last hidden state."""
        if self.lm_head is None:
            return self.embed_tokens.attend(state_BTD)
        return self.lm_head(state_BTD)
