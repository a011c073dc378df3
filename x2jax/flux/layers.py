"""FLUX.1 blocks. An adapter adds a delta to a named projection and changes nothing else."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float

from x2jax.flux.attention import attention
from x2jax.flux.config import FluxConfig
from x2jax.flux.rope import apply_rope


class Context(NamedTuple):
    """What every block of one forward pass shares.

    Attributes:
      vec_B2D: conditioning vector at the sampled timestep (row 0) and at timestep 0 (row 1).
      is_source_BI: image-stream tokens that are modulated at timestep 0.
      angles_BLh: rotary angles of the joint sequence.
      lengths_B: valid tokens of the joint sequence.
      task_BD: task embedding that routes the adapters' experts; None without adapters.
    """

    vec_B2D: Float[Array, "B 2 D"]
    is_source_BI: Bool[Array, "B I"]
    angles_BLh: Float[Array, "B L half"]
    lengths_B: Array
    task_BD: Any


class Modulation(NamedTuple):
    """Shift, scale and gate of one residual branch, a vector a token or a sample."""

    shift: Array
    scale: Array
    gate: Array

    def modulate(self, x):
        return x * (1 + self.scale) + self.shift


class DoubleTaps(NamedTuple):
    """What a probe may see of a double block; what it does not use costs nothing.

    Attributes:
      img_attn_BID, txt_attn_BTD: attention output of either stream after its output projection and
        before the gate.
      img_BID: the image stream after the block.
    """

    img_attn_BID: Float[Array, "B I D"]
    txt_attn_BTD: Float[Array, "B T D"]
    img_BID: Float[Array, "B I D"]


class SingleTaps(NamedTuple):
    """What a probe may see of a single block.

    Attributes:
      attn_BLD: attention output of the joint sequence before any output projection: the heads side
        by side.
    """

    attn_BLD: Float[Array, "B L D"]


def layer_norm(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """LayerNorm without affine, eps 1e-6, in float32; returns x's dtype."""
    y = x.astype(jnp.float32)
    mean = y.mean(-1, keepdims=True)
    variance = jnp.square(y - mean).mean(-1, keepdims=True)
    return ((y - mean) * jax.lax.rsqrt(variance + 1e-6)).astype(x.dtype)


def select_rows(rows_B2D, is_source_BL):
    """Row 1 for source tokens, row 0 for all others: (B, L, D)."""
    return jnp.where(is_source_BL[..., None], rows_B2D[:, 1:], rows_B2D[:, :1])


def project(linear, x, adapters: Mapping | None, name: str, task_BD):
    """`linear(x)` plus the delta of the adapter called `name`, if there is one.

    A series adapter reads the projection's output instead of its input: h + delta(h).
    """
    y = linear(x)
    adapter = None if adapters is None else adapters.get(name)
    if adapter is None:
        return y
    return y + adapter(y if adapter.series else x, task_BD)


class RMSNorm(nnx.Module):
    """RMS norm over the head dimension, eps 1e-6, in float32."""

    def __init__(self, dim: int, *, param_dtype):
        self.scale = nnx.Param(jnp.ones((dim,), param_dtype))

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + 1e-6)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class ModulationLayer(nnx.Module):
    """The conditioning vector to `count` modulations."""

    def __init__(self, width: int, count: int, *, dtype, param_dtype, rngs):
        self.count = count
        self.lin = nnx.Linear(
            width, 3 * count * width, dtype=dtype, param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, vec_B2D, is_source_BL=None) -> list[Modulation]:
        """Modulations by token, or by sample (row 0) where no roles are given."""
        rows = self.lin(jax.nn.silu(vec_B2D))
        if is_source_BL is None:
            parts = jnp.split(rows[:, :1], 3 * self.count, axis=-1)
        else:
            parts = [select_rows(r, is_source_BL) for r in jnp.split(rows, 3 * self.count, axis=-1)]
        return [Modulation(*parts[3 * i : 3 * i + 3]) for i in range(self.count)]


class Attention(nnx.Module):
    """Projections of one stream: q, k, v with RMS-normed heads, and the output projection."""

    def __init__(self, cfg: FluxConfig, *, dtype, param_dtype, rngs):
        self.heads = cfg.heads

        def linear():
            return nnx.Linear(cfg.width, cfg.width, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

        self.q, self.k, self.v, self.proj = linear(), linear(), linear(), linear()
        self.q_norm = RMSNorm(cfg.head_dim, param_dtype=param_dtype)
        self.k_norm = RMSNorm(cfg.head_dim, param_dtype=param_dtype)

    def qkv(self, x_BLD, adapters, task_BD):
        """Heads of q, k (normed, not yet rotated) and v: three (B, L, H, K)."""

        def heads(name):
            y = project(getattr(self, name), x_BLD, adapters, name, task_BD)
            return y.reshape(*y.shape[:2], self.heads, -1)

        return self.q_norm(heads("q")), self.k_norm(heads("k")), heads("v")


class MLP(nnx.Module):
    """Two linears around a tanh-approximated GELU."""

    def __init__(self, cfg: FluxConfig, *, out_bias=True, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.mlp_in = nnx.Linear(cfg.width, cfg.mlp_width, **kw)
        self.mlp_out = nnx.Linear(cfg.mlp_width, cfg.width, use_bias=out_bias, **kw)

    def __call__(self, x, adapters=None, task_BD=None):
        h = project(self.mlp_in, x, adapters, "mlp_in", task_BD)
        return project(self.mlp_out, jax.nn.gelu(h, approximate=True), adapters, "mlp_out", task_BD)


class DoubleBlock(nnx.Module):
    """Text and image streams with their own weights, attending jointly."""

    def __init__(self, cfg: FluxConfig, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.img_mod = ModulationLayer(cfg.width, 2, **kw)
        self.txt_mod = ModulationLayer(cfg.width, 2, **kw)
        self.img_attn, self.txt_attn = Attention(cfg, **kw), Attention(cfg, **kw)
        self.img_mlp, self.txt_mlp = MLP(cfg, **kw), MLP(cfg, **kw)

    def __call__(self, txt_BTD, img_BID, ctx: Context, adapters: Mapping | None = None):
        """Both streams after the block, and the block's `DoubleTaps`.

        `adapters` maps module names to projection adapters.
        """
        of = adapters if adapters is not None else {}
        attn1, mlp1 = self.img_mod(ctx.vec_B2D, ctx.is_source_BI)
        attn2, mlp2 = self.txt_mod(ctx.vec_B2D)
        img_in, txt_in = attn1.modulate(layer_norm(img_BID)), attn2.modulate(layer_norm(txt_BTD))
        img_qkv = self.img_attn.qkv(img_in, of.get("img_attn"), ctx.task_BD)
        txt_qkv = self.txt_attn.qkv(txt_in, of.get("txt_attn"), ctx.task_BD)
        q, k, v = (jnp.concatenate(p, axis=1) for p in zip(txt_qkv, img_qkv, strict=True))
        joint = _attend(q, k, v, ctx)
        txt_out, img_out = joint[:, : txt_BTD.shape[1]], joint[:, txt_BTD.shape[1] :]

        img_attn = project(self.img_attn.proj, img_out, of.get("img_attn"), "proj", ctx.task_BD)
        txt_attn = project(self.txt_attn.proj, txt_out, of.get("txt_attn"), "proj", ctx.task_BD)
        img_BID += attn1.gate * img_attn
        txt_BTD += attn2.gate * txt_attn
        img_BID += mlp1.gate * self.img_mlp(
            mlp1.modulate(layer_norm(img_BID)), of.get("img_mlp"), ctx.task_BD
        )
        txt_BTD += mlp2.gate * self.txt_mlp(
            mlp2.modulate(layer_norm(txt_BTD)), of.get("txt_mlp"), ctx.task_BD
        )
        return txt_BTD, img_BID, DoubleTaps(img_attn, txt_attn, img_BID)


class SingleBlock(nnx.Module):
    """Attention and MLP in parallel over the joint sequence.

    The published second linear is one matrix over [attention, MLP]; here it is two, `attn.proj`
    (with the bias) and `mlp.mlp_out`: the same sum without the wide concatenation.
    """

    def __init__(self, cfg: FluxConfig, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.modulation = ModulationLayer(cfg.width, 1, **kw)
        self.attn = Attention(cfg, **kw)
        self.mlp = MLP(cfg, out_bias=False, **kw)

    def __call__(self, x_BLD, ctx: Context, adapters: Mapping | None = None):
        """The joint sequence after the block, and the block's `SingleTaps`."""
        of = adapters if adapters is not None else {}
        text = x_BLD.shape[1] - ctx.is_source_BI.shape[1]
        is_source_BL = jnp.pad(ctx.is_source_BI, ((0, 0), (text, 0)))
        (mod,) = self.modulation(ctx.vec_B2D, is_source_BL)
        h = mod.modulate(layer_norm(x_BLD))
        attn = _attend(*self.attn.qkv(h, of.get("attn"), ctx.task_BD), ctx)
        out = project(self.attn.proj, attn, of.get("attn"), "proj", ctx.task_BD)
        x_BLD += mod.gate * (out + self.mlp(h, of.get("mlp"), ctx.task_BD))
        return x_BLD, SingleTaps(attn)


def _attend(q_BLHK, k_BLHK, v_BLHK, ctx: Context):
    q, k = apply_rope(q_BLHK, ctx.angles_BLh), apply_rope(k_BLHK, ctx.angles_BLh)
    out = checkpoint_name(attention(q, k, v_BLHK, ctx.lengths_B), "attention")
    return out.reshape(*out.shape[:2], -1)
