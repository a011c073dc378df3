"""Rectified flow as FLUX trains and samples it (spec x2edit.md sections 4 and 5)."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

DENSITIES = ("uniform", "logit_normal", "mode", "cosmap", "sigma_sqrt")


def sample_u(
    key: PRNGKeyArray,
    shape: tuple[int, ...],
    scheme: str = "uniform",
    *,
    mean: float = 0.0,
    std: float = 1.0,
    mode_scale: float = 1.29,
) -> Float[Array, "..."]:
    """Draws u in [0, 1) from a density scheme (SD3, arXiv 2403.03206, section 3.1).

    Args:
      key: PRNG key.
      shape: shape of the draw.
      scheme: one of `DENSITIES`. "sigma_sqrt" and "cosmap" draw uniformly: see `weight`.
      mean, std: of the normal under "logit_normal".
      mode_scale: of "mode".

    Raises:
      ValueError: unknown scheme.
    """
    if scheme == "logit_normal":
        return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))
    u = jax.random.uniform(key, shape)
    if scheme in ("uniform", "sigma_sqrt"):
        return u
    if scheme == "mode":
        return 1 - u - mode_scale * (jnp.cos(math.pi * u / 2) ** 2 - 1 + u)
    if scheme == "cosmap":
        # The weighting of this density is in `weight`, as the published implementation has it.
        return u
    raise ValueError(f"unknown density scheme {scheme!r}: use one of {', '.join(DENSITIES)}")


def sigma_from_u(u: Float[Array, "..."]) -> Float[Array, "..."]:
    """The training grid: sigma = (1000 - floor(1000 u)) / 1000, in (0, 1]."""
    return (1000 - jnp.minimum(jnp.floor(1000 * u), 999)) / 1000


def weight(sigma: Float[Array, "..."], scheme: str) -> Float[Array, "..."]:
    """Loss weight that goes with a density scheme; 1 but for "sigma_sqrt" and "cosmap"."""
    if scheme == "sigma_sqrt":
        return sigma**-2.0
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
    return jnp.ones_like(sigma)


def noised(
    x0_BIC: Float[Array, "B I C"], noise_BIC: Float[Array, "B I C"], sigma_B: Float[Array, "B"]
) -> Float[Array, "B I C"]:
    """x_t = (1 - sigma) x0 + sigma noise."""
    sigma = sigma_B[:, None, None]
    return (1 - sigma) * x0_BIC + sigma * noise_BIC


def shift_mu(tokens: Float[Array, "*b"] | int) -> Float[Array, "*b"]:
    """Resolution shift: linear in target tokens from (256, 0.5) to (4096, 1.15)."""
    return 0.5 + (jnp.asarray(tokens, jnp.float32) - 256) * (1.15 - 0.5) / (4096 - 256)


def sample_sigmas(steps: int, mu: Float[Array, "*b"] | None) -> Float[Array, "*b {steps}+1"]:
    """Sigmas of an Euler sampler: linspace(1, 1/steps), shifted by mu, then 0.

    mu None leaves them unshifted, as schnell has it.
    """
    sigma = jnp.linspace(1.0, 1.0 / steps, steps)
    if mu is not None:
        e = jnp.exp(jnp.asarray(mu))[..., None]
        sigma = e / (e + (1 / sigma - 1))
    return jnp.concatenate([sigma, jnp.zeros((*sigma.shape[:-1], 1))], axis=-1)


def euler(
    velocity: Callable[[Array, Array], Array],
    noise_BIC: Float[Array, "B I C"],
    sigmas_Bs: Float[Array, "B steps+1"],
) -> Float[Array, "B I C"]:
    """Integrates dx / dsigma = velocity(x, sigma) from noise to latents, in float32."""

    def body(x, pair):
        sigma, following = pair
        v = velocity(x, sigma).astype(jnp.float32)
        return x + (following - sigma)[:, None, None] * v, None

    pairs = (sigmas_Bs[:, :-1].T, sigmas_Bs[:, 1:].T)
    return jax.lax.scan(body, noise_BIC.astype(jnp.float32), pairs)[0]
