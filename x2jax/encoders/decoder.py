"""The decoder-only transformer that Qwen's models share: every hidden state, cached or not.

One layer serves a whole prompt and one token at a time. Axes beside `x2jax/shapes.py`: S slots of
the cache (or the tokens that are attended to), here N layers in the cache.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from x2jax.encoders import mixing
from x2jax.encoders.layers import MLP, RMSNorm, rotate_half
from x2jax.flux.model import stack


class DecoderSizes(Protocol):
    """What the decoder needs of a config.

    Attributes:
      qkv_bias: whether q, k and v have biases.
      qk_norm: whether every head of q and k passes an RMS norm.
      tied: whether the embedding is the output head too.
      mrope_section: rotary pairs of the temporal, row and column position; None for one position.
      pad_attention: what left pads see, as `causal` has it.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab: int
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    mrope_section: tuple[int, int, int] | None
    pad_attention: str
    rope_theta: float
    rms_eps: float


class Cache(NamedTuple):
    """Keys and values of all layers; what a slot holds is the caller's to know."""

    keys_NBSHK: Float[Array, "N B S H K"]
    values_NBSHK: Float[Array, "N B S H K"]

    def write(self, layer, at, k_BTHK, v_BTHK) -> "Cache":
        """With the tokens at hand in the slots of a layer from `at` on."""
        start = (layer, 0, at, 0, 0)
        return Cache(
            jax.lax.dynamic_update_slice(self.keys_NBSHK, k_BTHK[None], start),
            jax.lax.dynamic_update_slice(self.values_NBSHK, v_BTHK[None], start),
        )


def text_positions(mask_BT: Bool[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that count valid tokens; pads get 1, as transformers has it."""
    count = jnp.cumsum(mask_BT.astype(jnp.int32), axis=-1) - 1
    return jnp.where(mask_BT, count, 1)


def causal(mask_BT: Bool[Array, "B T"], pads: str) -> Bool[Array, "B T T"]:
    """Who sees whom: tokens see tokens up to themselves.

    Args:
      mask_BT: True at tokens.
      pads: what pads on the left see, whose states AlignNet reads like those of tokens: "all"
        positions, tokens and pads alike, or "self", each itself alone.

    The AlignNets of X2I and X2Edit were trained with "all": transformers 4.49 and 4.51 on CUDA,
    where `_unmask_unattended` opens rows to which nothing is left. So their pads are a summary of
    the whole text, equal among themselves.
    """
    # DIFFERS: such rows are zeros (sdpa) or the mean of all values (eager) in transformers 5.
    length = mask_BT.shape[1]
    seen = jnp.tril(jnp.ones((length, length), bool)) & mask_BT[:, None, :]
    if pads == "self":
        return seen | jnp.eye(length, dtype=bool)
    return seen | ~seen.any(axis=-1, keepdims=True)


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, cfg: DecoderSizes, *, dtype, param_dtype, rngs):
        self.head_dim = cfg.head_dim
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        inner, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
        self.q_proj = nnx.Linear(cfg.width, inner, use_bias=cfg.qkv_bias, **kw)
        self.k_proj = nnx.Linear(cfg.width, kv, use_bias=cfg.qkv_bias, **kw)
        self.v_proj = nnx.Linear(cfg.width, kv, use_bias=cfg.qkv_bias, **kw)
        self.o_proj = nnx.Linear(inner, cfg.width, use_bias=False, **kw)

        def norm():
            return RMSNorm(cfg.head_dim, cfg.rms_eps, param_dtype=param_dtype)

        self.q_norm, self.k_norm = (norm(), norm()) if cfg.qk_norm else (None, None)

    def __call__(self, x_BTD, cos, sin, mask_B1TS, cache: Cache | None = None, slot=(0, 0)):
        """Attends to the tokens at hand, or to the cache of layer slot[0] with them at slot[1]."""

        def heads(y, norm=None):
            y = y.reshape(*y.shape[:2], -1, self.head_dim)
            return y if norm is None else norm(y)

        q = rotate_half(heads(self.q_proj(x_BTD), self.q_norm), cos, sin)
        k = rotate_half(heads(self.k_proj(x_BTD), self.k_norm), cos, sin)
        v = heads(self.v_proj(x_BTD))
        if cache is not None:
            written: Cache = cache.write(*slot, k, v)
            k, v = written.keys_NBSHK[slot[0]], written.values_NBSHK[slot[0]]
            cache = written
        out = jax.nn.dot_product_attention(q, k, v, mask=mask_B1TS, implementation="xla")
        return self.o_proj(out.reshape(*x_BTD.shape[:2], -1)), cache


class Layer(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(self, cfg: DecoderSizes, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.input_layernorm = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.self_attn = SelfAttention(cfg, **kw)
        self.post_attention_layernorm = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.mlp = MLP(cfg.width, cfg.mlp_width, use_bias=False, **kw)

    def __call__(self, x, cos, sin, mask, cache: Cache | None = None, slot=(0, 0)):
        """The stream after this layer, and the cache with the tokens at hand in it."""
        y, cache = self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, slot)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Pass(NamedTuple):
    """What `Decoder.run` returns.

    Attributes:
      last_BTD: the state after the final norm: what `logits` takes.
      states_NBTD: as `Decoder.hidden_states`; None unless asked for.
      cache: with the tokens at hand in it.
    """

    last_BTD: Float[Array, "B T D"]
    states_NBTD: Any
    cache: Cache


class Decoder(nnx.Module):
    """Embedding, stacked layers under one scan, final norm and output head."""

    def __init__(self, cfg: DecoderSizes, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.cfg, self.dtype = cfg, dtype
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.embed_tokens = nnx.Embed(cfg.vocab, cfg.width, rngs=rngs, **kw)
        self.layers = stack(lambda r: Layer(cfg, rngs=r, **kw), cfg.layers, rngs)
        self.norm = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.lm_head = (
            None if cfg.tied else nnx.Linear(cfg.width, cfg.vocab, use_bias=False, rngs=rngs, **kw)
        )

    def hidden_states(
        self,
        ids_BT: Int[Array, "B T"],
        mask_BT: Bool[Array, "B T"],
        *,
        positions_BT3: Int[Array, "B T 3"] | None = None,
        vision: Any = None,
    ) -> Float[Array, "N B T D"]:
        """Embeddings, the states after every layer, the last one after the final norm.

        Args:
          ids_BT: token ids, left-padded.
          mask_BT: True at tokens. Pads have states too, as `causal` says.
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
        vision: Any = None,
        select_Bt: Int[Array, "B t"] | None = None,
    ) -> Float[Array, "B t D"]:
        """A float32 sum over the states of `hidden_states` that never holds them all at once.

        No gradient enters this model; that of `weights_N` is exact.

        Args:
          add: (sum, state, weight) -> sum, as `x2jax.alignnet.add_state`.
          weights_N: a weight for each state.
          select_Bt: places of the tokens whose states are added; None for all.

        Raises:
          ValueError: as `hidden_states`.
        """
        shape = ids_BT.shape if select_Bt is None else select_Bt.shape
        start = jnp.zeros((*shape, self.cfg.width), jnp.float32)
        inputs = (ids_BT, mask_BT, positions_BT3, vision)
        return mixing.mix(self, add, weights_N, start, inputs, select_Bt)

    def enter(self, ids_BT, mask_BT, positions_BT3, vision) -> tuple[Array, Callable]:
        """The embeddings, and the function (layer, x) -> x that the scans run."""
        x = self.embed(ids_BT, mask_BT, positions_BT3, vision)
        positions = text_positions(mask_BT) if positions_BT3 is None else positions_BT3
        cos, sin = self._rotary(positions)
        allowed = causal(mask_BT, self.cfg.pad_attention)[:, None]
        return x, lambda layer, x: layer(x, cos, sin, allowed)[0]

    def embed(self, ids_BT, mask_BT, positions_BT3=None, vision=None) -> Float[Array, "B T D"]:
        """Input of the first layer; arguments as `hidden_states` has them."""
        if vision is not None:
            raise ValueError("this model has no vision tower: build it with a VisionConfig")
        return self.embed_tokens(ids_BT)

    def run(
        self,
        x_BTD: Float[Array, "B T D"],
        positions: Int[Array, "B T *three"],
        allowed_BTS: Bool[Array, "B T S"],
        cache: Cache,
        at: Any = 0,
        *,
        keep_states: bool = True,
    ) -> Pass:
        """All layers over some tokens, after those whose keys and values are in the cache.

        Args:
          x_BTD: embeddings of the tokens at hand.
          positions: theirs: one a token, or three (temporal, row, column).
          allowed_BTS: which slots of the cache a token attends to, its own included.
          cache: of `empty_cache`, or of earlier tokens.
          at: first slot of the tokens at hand.
          keep_states: whether to return all hidden states.
        """
        cos, sin = self._rotary(positions)
        allowed = allowed_BTS[:, None]

        def body(carry, item):
            (x, cache), (layer, index) = carry, item
            x, cache = layer(x, cos, sin, allowed, cache, (index, at))
            return (x, cache), x if keep_states else None

        layers = (self.layers, jnp.arange(self.cfg.layers))
        (last, cache), states = jax.lax.scan(body, (x_BTD, cache), layers)
        last = self.norm(last)
        if states is not None:
            states = jnp.concatenate([x_BTD[None], states[:-1], last[None]])
        return Pass(last, states, cache)

    def empty_cache(self, batch: int, slots: int) -> Cache:
        """A cache of zeros."""
        cfg = self.cfg
        zeros = jnp.zeros((cfg.layers, batch, slots, cfg.kv_heads, cfg.head_dim), self.dtype)
        return Cache(zeros, zeros)

    def _rotary(self, positions):
        half = self.cfg.head_dim // 2
        frequencies = 1.0 / self.cfg.rope_theta ** (jnp.arange(half, dtype=jnp.float32) / half)
        if positions.ndim == 2:
            positions = positions[..., None]
        else:
            positions = positions[..., np.repeat(np.arange(3), self.cfg.mrope_section)]
        angles = positions.astype(jnp.float32) * frequencies
        angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
        return jnp.cos(angles), jnp.sin(angles)

    def logits(self, state_BTD: Float[Array, "B T D"]) -> Float[Array, "B T vocab"]:
        """Next-token logits of the last hidden state."""
        if self.lm_head is None:
            return self.embed_tokens.attend(state_BTD)
        return self.lm_head(state_BTD)
