"""Layers that the decoder and the vision tower share."""

import jax
import jax.numpy as jnp
from flax import nnx


class RMSNorm(nnx.Module):
    """RMS norm in float32."""

    def __init__(self, width: int, eps: float, *, param_dtype):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, x):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(-1, keepdims=True) + self.eps)
        return (self.scale[...] * y.astype(x.dtype)).astype(x.dtype)


class MLP(nnx.Module):
    """SwiGLU."""

    def __init__(self, width: int, hidden: int, *, use_bias: bool, dtype, param_dtype, rngs):
        kw = dict(use_bias=use_bias, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.gate_proj = nnx.Linear(width, hidden, **kw)
        self.up_proj = nnx.Linear(width, hidden, **kw)
        self.down_proj = nnx.Linear(hidden, width, **kw)

    def __call__(self, x):
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def rotate_half(x, cos, sin):
    """Rotary embedding of (first half, second half) pairs, in float32; returns x's dtype."""
    y = x.astype(jnp.float32)
    a, b = jnp.split(y, 2, axis=-1)
    return (y * cos + jnp.concatenate([-b, a], axis=-1) * sin).astype(x.dtype)
