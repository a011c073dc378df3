"""FLUX.1: 12 B parameters compile as two blocks, scanned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from x2jax.flux.config import FluxConfig
from x2jax.flux.latents import PAD, SOURCE, ImageStream
from x2jax.flux.layers import Context, DoubleBlock, SingleBlock, layer_norm
from x2jax.flux.rope import rope_angles, timestep_features

REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention", "attention_residuals"),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}
"""Remat policies by name; "none" keeps every activation."""


class FluxOutput(NamedTuple):
    """Attributes:
    velocity_BIC: predicted noise - latents of every image token; meaningful at target tokens.
    probes: what the probe returned for each double block, stacked on axis 0; None without one.
    """

    velocity_BIC: Float[Array, "B I C"]
    probes: Any


class Embedder(nnx.Module):
    """Linear, SiLU, linear: of timestep features, guidance features or the pooled vector."""

    def __init__(self, in_width: int, width: int, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.in_layer = nnx.Linear(in_width, width, **kw)
        self.out_layer = nnx.Linear(width, width, **kw)

    def __call__(self, x):
        return self.out_layer(jax.nn.silu(self.in_layer(x)))


class FinalLayer(nnx.Module):
    """Modulated layer norm and the projection to packed latents."""

    def __init__(self, cfg: FluxConfig, *, dtype, param_dtype, rngs):
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.linear = nnx.Linear(cfg.width, cfg.channels, **kw)
        self.adaLN_modulation = nnx.Linear(cfg.width, 2 * cfg.width, **kw)

    def __call__(self, x_BID, vec_BD):
        shift, scale = jnp.split(self.adaLN_modulation(jax.nn.silu(vec_BD))[:, None], 2, axis=-1)
        return self.linear(layer_norm(x_BID) * (1 + scale) + shift)


def stack(block: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """`count` independently initialised modules as one, parameters stacked on axis 0."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return block(rngs)

    return build(rngs)


class Flux(nnx.Module):
    """The FLUX.1 transformer (spec x2edit.md section 1) over a packed image stream."""

    def __init__(self, cfg: FluxConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.cfg = cfg
        self.dtype = dtype
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.img_in = nnx.Linear(cfg.channels, cfg.width, **kw)
        self.txt_in = nnx.Linear(cfg.text_width, cfg.width, **kw)
        self.time_in = Embedder(256, cfg.width, **kw)
        self.vector_in = Embedder(cfg.pooled_width, cfg.width, **kw)
        self.guidance_in = Embedder(256, cfg.width, **kw) if cfg.guidance else None
        blocks = dict(dtype=dtype, param_dtype=param_dtype)
        self.double_blocks = stack(
            lambda r: DoubleBlock(cfg, rngs=r, **blocks), cfg.double_blocks, rngs
        )
        self.single_blocks = stack(
            lambda r: SingleBlock(cfg, rngs=r, **blocks), cfg.single_blocks, rngs
        )
        self.final_layer = FinalLayer(cfg, **kw)

    def __call__(
        self,
        img: ImageStream,
        txt_BTD: Float[Array, "B T text_width"],
        pooled_BP: Float[Array, "B pooled_width"],
        timesteps_B: Float[Array, "B"],
        guidance_B: Float[Array, "B"] | None = None,
        *,
        adapters: Any = None,
        task_BD: Float[Array, "B D"] | None = None,
        probe: Callable[[Array], Any] | None = None,
        remat: str = "none",
    ) -> FluxOutput:
        """One evaluation of the velocity field.

        Args:
          img: noised target tokens, clean source tokens, padding last.
          txt_BTD: text features; all positions are attended, pads too.
          pooled_BP: pooled text vector.
          timesteps_B: sigma in [0, 1] of target and text tokens; sources are at timestep 0.
          guidance_B: guidance scale (3.5, not 3500); required if and only if the model has it.
          adapters: an `x2jax.adapters.Adapters`, or None for the base.
          task_BD: task embedding, required by adapters with routed experts.
          probe: called with the image stream (B, I, D) after every double block.
          remat: "none" or a key of `REMAT_POLICIES`.

        Raises:
          ValueError: guidance given to a model without it, or missing; unknown remat policy.
        """
        ctx = self._context(img, txt_BTD.shape[1], pooled_BP, timesteps_B, guidance_B, task_BD)
        x_BID = self.img_in(img.tokens_BIC.astype(self.dtype))
        txt = self.txt_in(txt_BTD.astype(self.dtype))

        def double(carry, layer):
            block, adapter = layer
            txt, x = block(*carry, ctx, adapter)
            return (txt, x), None if probe is None else probe(x)

        def single(x, layer):
            block, adapter = layer
            return block(x, ctx, adapter), None

        of = (None, None) if adapters is None else (adapters.double_blocks, adapters.single_blocks)
        (txt, x_BID), probes = jax.lax.scan(
            _remat(double, remat), (txt, x_BID), (self.double_blocks, of[0])
        )
        joint = jnp.concatenate([txt, x_BID], axis=1)
        joint, _ = jax.lax.scan(_remat(single, remat), joint, (self.single_blocks, of[1]))
        velocity = self.final_layer(joint[:, txt.shape[1] :], ctx.vec_B2D[:, 0])
        return FluxOutput(velocity, probes)

    def _context(self, img, text, pooled_BP, timesteps_B, guidance_B, task_BD) -> Context:
        if (guidance_B is None) == self.cfg.guidance:
            raise ValueError(
                "this FLUX has a guidance embedder: pass guidance_B"
                if self.cfg.guidance
                else "this FLUX has no guidance embedder (schnell): pass guidance_B=None"
            )
        t_B2 = jnp.stack([timesteps_B, jnp.zeros_like(timesteps_B)], axis=1)
        vec_B2D = self.time_in(timestep_features(t_B2).astype(self.dtype))
        rest_BD = self.vector_in(pooled_BP.astype(self.dtype))
        if self.guidance_in is not None:
            rest_BD += self.guidance_in(timestep_features(guidance_B).astype(self.dtype))
        batch = img.roles_BI.shape[0]
        positions = jnp.concatenate(
            [jnp.zeros((batch, text, 3), img.positions_BI3.dtype), img.positions_BI3], axis=1
        )
        return Context(
            vec_B2D=vec_B2D + rest_BD[:, None],
            is_source_BI=img.roles_BI == SOURCE,
            angles_BLh=rope_angles(positions, self.cfg.axes, self.cfg.theta),
            lengths_B=text + (img.roles_BI != PAD).sum(axis=1),
            task_BD=task_BD,
        )


def _remat(body, policy: str):
    if policy == "none":
        return body
    if policy not in REMAT_POLICIES:
        raise ValueError(f"unknown remat policy {policy!r}: use none, {', '.join(REMAT_POLICIES)}")
    # prevent_cse guards against merging across the checkpoint, which a scan already rules out.
    return jax.checkpoint(body, policy=REMAT_POLICIES[policy], prevent_cse=False)
