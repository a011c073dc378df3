"""Rotary position embedding over three axes, and sinusoidal timestep features. Both in float32."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def rope_angles(
    positions_BL3: Int[Array, "B L 3"], axes: tuple[int, int, int], theta: int
) -> Float[Array, "B L half"]:
    """Angles of every rotated pair; axis a owns axes[a] / 2 pairs of the head dimension.

    Float32 throughout: row + offset reaches 219 at 1024 px, where bf16 is off by degrees.
    """
    angles = []
    for axis, dim in enumerate(axes):
        frequencies = 1.0 / theta ** (jnp.arange(0, dim, 2, dtype=jnp.float32) / dim)
        angles.append(positions_BL3[..., axis, None].astype(jnp.float32) * frequencies)
    return jnp.concatenate(angles, axis=-1)


def apply_rope(
    x_BLHK: Float[Array, "B L H K"], angles_BLh: Float[Array, "B L half"]
) -> Float[Array, "B L H K"]:
    """Rotates neighbouring pairs (x0, x1), (x2, x3), ... by the angles; returns x's dtype."""
    cos, sin = jnp.cos(angles_BLh)[:, :, None], jnp.sin(angles_BLh)[:, :, None]
    pairs = x_BLHK.astype(jnp.float32).reshape(*x_BLHK.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    rotated = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return rotated.reshape(x_BLHK.shape).astype(x_BLHK.dtype)


def timestep_features(t_B: Float[Array, "*b"], dim: int = 256) -> Float[Array, "*b {dim}"]:
    """Sinusoidal features of timesteps in [0, 1], cosines first, as FLUX scales them (x 1000).

    Float32: in bf16 the largest error of t * 1000 * frequency is 2.0 (jax.md section 1.3).
    """
    half = dim // 2
    frequencies = jnp.exp(-jnp.log(10_000.0) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = (1000.0 * t_B.astype(jnp.float32))[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
