"""Layers of the autoencoder, NHWC. `sizes_B2` are valid (height, width) at a layer's resolution.

What lies outside the valid area is arbitrary between layers: whoever mixes pixels (convolutions,
group statistics, attention) masks its input. None for the sizes costs nothing.
"""

import jax
import jax.numpy as jnp
from flax import nnx

# Queries at a time in the attention: at 1456x1456 the full score matrix is 33124 x 33124.
QUERY_CHUNK = 1024


def conv3(cin: int, cout: int, **kw) -> nnx.Conv:
    """A 3x3 convolution that keeps the resolution."""
    return nnx.Conv(cin, cout, (3, 3), padding=((1, 1), (1, 1)), **kw)


def mask_canvas(x_BHWC, sizes_B2):
    """Zero outside each sample's valid (height, width); x itself where sizes are None."""
    if sizes_B2 is None:
        return x_BHWC
    return jnp.where(_valid(x_BHWC.shape, sizes_B2)[..., None], x_BHWC, 0)


def _valid(shape, sizes_B2):
    rows_BH = jnp.arange(shape[1]) < sizes_B2[:, :1]
    columns_BW = jnp.arange(shape[2]) < sizes_B2[:, 1:]
    return rows_BH[:, :, None] & columns_BW[:, None, :]


class GroupNorm(nnx.Module):
    """Group norm over the valid area, statistics in float32."""

    def __init__(self, channels: int, groups: int, *, eps: float = 1e-6, param_dtype):
        self.groups, self.eps = groups, eps
        self.scale = nnx.Param(jnp.ones((channels,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((channels,), param_dtype))

    def __call__(self, x_BHWC, sizes_B2):
        channels = x_BHWC.shape[-1]
        area = x_BHWC.shape[1] * x_BHWC.shape[2] if sizes_B2 is None else sizes_B2.prod(-1)
        count = jnp.maximum(area, 1)[..., None] * (channels // self.groups)

        def group_mean(y_BHWC):
            """Mean over valid pixels and the group, repeated to channels: (B, 1, 1, C)."""
            sums_BC = mask_canvas(y_BHWC, sizes_B2).sum((1, 2))
            sums_BG = sums_BC.reshape(sums_BC.shape[0], self.groups, -1).sum(-1)
            return jnp.repeat(sums_BG / count, channels // self.groups, axis=-1)[:, None, None]

        # Two passes, so that no cancellation; the casts fuse into the reductions and the result.
        mean = group_mean(x_BHWC.astype(jnp.float32))
        variance = group_mean(jnp.square(x_BHWC.astype(jnp.float32) - mean))
        y = (x_BHWC.astype(jnp.float32) - mean) * jax.lax.rsqrt(variance + self.eps)
        y = y * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return y.astype(x_BHWC.dtype)


class ResnetBlock(nnx.Module):
    """Two norm-SiLU-conv stages with a (projected) skip; a time vector enters between them."""

    def __init__(
        self, cin: int, cout: int, groups: int, *, time_width: int = 0, dtype, param_dtype, rngs
    ):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.norm1 = GroupNorm(cin, groups, param_dtype=param_dtype)
        self.conv1 = conv3(cin, cout, **kw)
        self.norm2 = GroupNorm(cout, groups, param_dtype=param_dtype)
        self.conv2 = conv3(cout, cout, **kw)
        self.conv_shortcut = nnx.Conv(cin, cout, (1, 1), **kw) if cin != cout else None
        self.time_emb_proj = nnx.Linear(time_width, cout, **kw) if time_width else None

    def __call__(self, x_BHWC, sizes_B2, time_BF=None):
        h = self.conv1(mask_canvas(jax.nn.silu(self.norm1(x_BHWC, sizes_B2)), sizes_B2))
        if self.time_emb_proj is not None:
            h += self.time_emb_proj(jax.nn.silu(time_BF))[:, None, None]
        h = self.conv2(mask_canvas(jax.nn.silu(self.norm2(h, sizes_B2)), sizes_B2))
        return h + (x_BHWC if self.conv_shortcut is None else self.conv_shortcut(x_BHWC))


class Attention(nnx.Module):
    """Single-head attention over the pixels of the lowest resolution, with a skip."""

    def __init__(self, channels: int, groups: int, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.group_norm = GroupNorm(channels, groups, param_dtype=param_dtype)
        self.to_q, self.to_k = (nnx.Linear(channels, channels, **kw) for _ in range(2))
        self.to_v, self.to_out = (nnx.Linear(channels, channels, **kw) for _ in range(2))

    def __call__(self, x_BHWC, sizes_B2):
        batch, height, width, channels = x_BHWC.shape
        x_BLC = self.group_norm(x_BHWC, sizes_B2).reshape(batch, height * width, channels)
        q_BLC, k_BLC, v_BLC = self.to_q(x_BLC), self.to_k(x_BLC), self.to_v(x_BLC)
        keys_BL = None
        if sizes_B2 is not None:
            keys_BL = _valid(x_BHWC.shape, sizes_B2).reshape(batch, height * width)

        def rows(q_BQC):
            scores = jnp.einsum("BQC,BLC->BQL", q_BQC, k_BLC, preferred_element_type=jnp.float32)
            scores = scores * channels**-0.5
            if keys_BL is not None:
                scores = jnp.where(keys_BL[:, None], scores, jnp.finfo(jnp.float32).min)
            return jax.nn.softmax(scores, axis=-1).astype(v_BLC.dtype) @ v_BLC

        out_BLC = _in_chunks(rows, q_BLC, QUERY_CHUNK)
        return x_BHWC + self.to_out(out_BLC).reshape(x_BHWC.shape)


def _in_chunks(rows, q_BLC, chunk):
    """rows(q) computed `chunk` queries at a time; a chunk's scores are not kept for gradients."""
    batch, length, channels = q_BLC.shape
    if length <= chunk:
        return rows(q_BLC)
    count = -(-length // chunk)
    q = jnp.pad(q_BLC, ((0, 0), (0, count * chunk - length), (0, 0)))
    q = q.reshape(batch, count, chunk, channels).swapaxes(0, 1)
    out = jax.lax.map(jax.checkpoint(rows), q).swapaxes(0, 1)
    return out.reshape(batch, count * chunk, channels)[:, :length]


class MidBlock(nnx.Module):
    """Resnet, attention, resnet."""

    def __init__(self, channels: int, groups: int, **kw):
        self.resnets = nnx.List([ResnetBlock(channels, channels, groups, **kw) for _ in range(2)])
        self.attention = Attention(channels, groups, **kw)

    def __call__(self, x, sizes_B2):
        x = self.attention(self.resnets[0](x, sizes_B2), sizes_B2)
        return self.resnets[1](x, sizes_B2)


class Level(nnx.Module):
    """Resnets of one resolution, then the convolution that halves or doubles it ("": neither)."""

    def __init__(self, cin: int, cout: int, layers: int, resample: str, groups: int, **kw):
        self.resample = resample
        self.resnets = nnx.List(
            [ResnetBlock(cin if i == 0 else cout, cout, groups, **kw) for i in range(layers)]
        )
        if resample == "down":
            # diffusers pads right and bottom only before its strided convolution.
            pad = ((0, 1), (0, 1))
            self.downsampler = nnx.Conv(cout, cout, (3, 3), strides=2, padding=pad, **kw)
        elif resample == "up":
            self.upsampler = conv3(cout, cout, **kw)

    def __call__(self, x_BHWC, sizes_B2):
        for block in self.resnets:
            x_BHWC = block(x_BHWC, sizes_B2)
        if not self.resample:
            return x_BHWC, sizes_B2
        x_BHWC = mask_canvas(x_BHWC, sizes_B2)
        if self.resample == "down":
            return self.downsampler(x_BHWC), None if sizes_B2 is None else sizes_B2 // 2
        x_BHWC = jnp.repeat(jnp.repeat(x_BHWC, 2, axis=1), 2, axis=2)
        return self.upsampler(x_BHWC), None if sizes_B2 is None else sizes_B2 * 2
