"""Qwen2.5-VL's vision tower: images and videos of any size, one compiled program.

Patches of all images and frames of a sample lie one after another, window by window, padding last.
What belongs together travels as data: segment ids of frames and of windows, made on the host by
`x2jax.encoders.qwen2_5_vl.preprocess.pack`. Axes beside `x2jax/shapes.py`: P patches of a sample,
M tokens of a sample (merged patches), here C values of a patch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from x2jax.encoders.layers import MLP, RMSNorm, rotate_half
from x2jax.encoders.qwen2_5_vl import segments
from x2jax.encoders.qwen2_5_vl.vision_config import VisionConfig
from x2jax.flux.model import stack


class VisionInputs(NamedTuple):
    """Attributes:
    patches_BPC: normalised pixels, channels x frames x height x width; in window order.
    positions_BP2: row and column of a patch in its frame.
    frames_BP: which frame a patch belongs to, across all images and videos; 0 is padding.
    windows_BP: which window a patch belongs to; 0 is padding.
    order_BM: where a token lies in window order; tokens in the order of the images, row by row.
    """

    patches_BPC: Float[Array, "B P C"]
    positions_BP2: Int[Array, "B P 2"]
    frames_BP: Int[Array, "B P"]
    windows_BP: Int[Array, "B P"]
    order_BM: Int[Array, "B M"]


class VisionAttention(nnx.Module):
    """Attention with rotary positions."""

    def __init__(self, cfg: VisionConfig, *, dtype, param_dtype, rngs):
        self.head_dim = cfg.head_dim
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.q = nnx.Linear(cfg.width, cfg.width, **kw)
        self.k = nnx.Linear(cfg.width, cfg.width, **kw)
        self.v = nnx.Linear(cfg.width, cfg.width, **kw)
        self.proj = nnx.Linear(cfg.width, cfg.width, **kw)

    def __call__(self, x_BPD, cos, sin, attend):
        """`attend` is the attention of q, k and v (B, P, H, K)."""

        def heads(y):
            return y.reshape(*y.shape[:2], -1, self.head_dim)

        q = rotate_half(heads(self.q(x_BPD)), cos, sin)
        k = rotate_half(heads(self.k(x_BPD)), cos, sin)
        return self.proj(attend(q, k, heads(self.v(x_BPD))).reshape(x_BPD.shape))


class VisionBlock(nnx.Module):
    """One pre-norm block."""

    def __init__(self, cfg: VisionConfig, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm1 = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.attn = VisionAttention(cfg, **kw)
        self.norm2 = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.mlp = MLP(cfg.width, cfg.mlp_width, use_bias=True, **kw)

    def __call__(self, x, cos, sin, attend):
        x = x + self.attn(self.norm1(x), cos, sin, attend)
        return x + self.mlp(self.norm2(x))


class PatchMerger(nnx.Module):
    """Neighbouring patches (2 x 2) side by side through an MLP: one token of the language model."""

    def __init__(self, cfg: VisionConfig, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.merged_width = cfg.width * cfg.merge**2
        self.ln_q = RMSNorm(cfg.width, cfg.rms_eps, param_dtype=param_dtype)
        self.mlp_in = nnx.Linear(self.merged_width, self.merged_width, **kw)
        self.mlp_out = nnx.Linear(self.merged_width, cfg.out_width, **kw)

    def __call__(self, x_BPD):
        x_BMD = self.ln_q(x_BPD).reshape(x_BPD.shape[0], -1, self.merged_width)
        return self.mlp_out(jax.nn.gelu(self.mlp_in(x_BMD), approximate=False))


class VisionTower(nnx.Module):
    """Patches to tokens of the language model."""

    def __init__(self, cfg: VisionConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.cfg, self.dtype = cfg, dtype
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        # A convolution whose stride is its kernel is one matrix product.
        self.patch_embed = nnx.Linear(cfg.patch_width, cfg.width, use_bias=False, rngs=rngs, **kw)
        self.blocks = stack(lambda r: VisionBlock(cfg, rngs=r, **kw), cfg.layers, rngs)
        self.merger = PatchMerger(cfg, rngs=rngs, **kw)

    def __call__(self, inputs: VisionInputs) -> Float[Array, "B M D"]:
        """Tokens in the order of the images, row by row; finite and meaningless at padding."""
        cos, sin = self._rotary(inputs.positions_BP2)
        full_L = jnp.asarray(np.isin(np.arange(self.cfg.layers), self.cfg.full_blocks))

        # Padding is a segment of its own, so no softmax row is empty.
        def in_frames(q, k, v):
            return segments.chunked(q, k, v, inputs.frames_BP)

        def in_windows(q, k, v):
            return segments.windowed(q, k, v, inputs.windows_BP, self.cfg.window_patches)

        def body(x, layer):
            block, full = layer

            def attend(q, k, v):
                return jax.lax.cond(full, in_frames, in_windows, q, k, v)

            return block(x, cos, sin, attend), None

        x_BPD = self.patch_embed(inputs.patches_BPC.astype(self.dtype))
        x_BPD, _ = jax.lax.scan(body, x_BPD, (self.blocks, full_L))
        return jnp.take_along_axis(self.merger(x_BPD), inputs.order_BM[..., None], axis=1)

    def _rotary(self, positions_BP2):
        """Cosine and sine: rows turn the first quarter of a head's pairs, columns the second."""
        quarter = self.cfg.head_dim // 4
        exponents = jnp.arange(quarter, dtype=jnp.float32) / quarter
        frequencies = 1.0 / self.cfg.rope_theta**exponents
        angles = positions_BP2[..., None].astype(jnp.float32) * frequencies
        angles = angles.reshape(*angles.shape[:2], 2 * quarter)
        angles = jnp.concatenate([angles, angles], axis=-1)[:, :, None]
        return jnp.cos(angles), jnp.sin(angles)
