"""FLUX.1: 12 B parameters compile as two blocks, scanned."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from x2jax.flux.config import FluxConfig
from x2jax.flux.latents import PAD, SOURCE, ImageStream
from x2jax.flux.layers import Context, DoubleBlock, SingleBlock, layer_norm
from x2jax.flux.rope import rope_angles, timestep_features
from x2jax.flux.scan import TAPS, Lane, Probe, scan_blocks


class FluxOutput(NamedTuple):
    """Attributes:
    velocity_BIC: predicted noise - latents of every image token; meaningful at target tokens.
    seen: what the probe saw.
    """

    velocity_BIC: Float[Array, "B I C"]
    seen: "Seen"


class Seen(NamedTuple):
    """What a probe returned, stacked over blocks on axis 0; None without one.

    Attributes:
      double, single: of the double and the single blocks.
    """

    double: Any
    single: Any


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
        control: Any = None,
        task_BD: Float[Array, "B D"] | None = None,
        probe: Probe | None = None,
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
          control: an `x2jax.control.Control`, or None: what it adds to target tokens after every
            double block.
          task_BD: task embedding, required by adapters with routed experts.
          probe: looks at every block; it gets one lane's taps.
          remat: "none" or a key of `REMAT_POLICIES`.

        Raises:
          ValueError: guidance given to a model without it, or missing; unknown remat policy.
        """
        lane = self._lane(img, txt_BTD, pooled_BP, timesteps_B, guidance_B, task_BD)
        nets = delta = None
        if control is not None:
            nets, delta = control.nets, lambda net: control.delta(net, img, timesteps_B)
        (lane,), seen = self._blocks((lane,), adapters, probe, remat, nets=nets, delta=delta)
        velocity = self.final_layer(lane.img_BID, lane.ctx.vec_B2D[:, 0])
        return FluxOutput(velocity, seen)

    def lockstep(
        self,
        img: ImageStream,
        teacher: tuple[Float[Array, "B T text_width"], Float[Array, "B pooled_width"]],
        student: tuple[Float[Array, "B T text_width"], Float[Array, "B pooled_width"]],
        timesteps_B: Float[Array, "B"],
        guidance_B: Float[Array, "B"] | None = None,
        *,
        probe: Probe,
        remat: str = "none",
        segment: int = 0,
    ) -> Seen:
        """Two conditionings of the same latents through the same blocks, block by block.

        Nothing outlives a block but what the probe returns. No gradient reaches the teacher.

        Args:
          img, timesteps_B, guidance_B: as in `__call__`.
          teacher, student: text features and pooled vector of either.
          probe: called with the taps of the teacher and of the student.
          remat: "none" or a key of `REMAT_POLICIES`.
          segment: with remat, both lanes are kept at every so many blocks only and computed again
            in the backward pass; 0 keeps the teacher's taps of every block (`scan_blocks`).

        Raises:
          ValueError: as `__call__`.
        """
        old = self._lane(img, *teacher, timesteps_B, guidance_B, None)
        old = jax.lax.stop_gradient(old)._replace(passive=True)
        new = self._lane(img, *student, timesteps_B, guidance_B, None)
        return self._blocks((old, new), None, probe, remat, segment)[1]

    def _lane(self, img, txt_BTD, pooled_BP, timesteps_B, guidance_B, task_BD) -> Lane:
        ctx = self._context(img, txt_BTD.shape[1], pooled_BP, timesteps_B, guidance_B, task_BD)
        x_BID = self.img_in(img.tokens_BIC.astype(self.dtype))
        return Lane(ctx, self.txt_in(txt_BTD.astype(self.dtype)), x_BID)

    def _blocks(
        self,
        lanes: tuple[Lane, ...],
        adapters,
        probe: Probe | None,
        remat: str,
        segment: int = 0,
        nets: Any = None,
        delta: Callable[[Any], Array] | None = None,
    ) -> tuple[tuple[Lane, ...], Seen]:
        """All lanes through all blocks; a `delta` of each block's net joins the image streams."""

        def look(how, taps):
            named = [
                checkpoint_name(tap, TAPS) if lane.passive else tap
                for lane, tap in zip(lanes, taps, strict=True)
            ]
            return how(*named)

        def double(streams, layer):
            block, adapter, net = layer

            def through(lane, txt, x):
                txt, x, taps = block(txt, x, lane.ctx, adapter)
                return txt, x if delta is None else x + delta(net).astype(x.dtype), taps

            outs = [through(lane, *stream) for lane, stream in zip(lanes, streams, strict=True)]
            seen = None if probe is None else look(probe.double, [taps for _, _, taps in outs])
            return tuple((txt, x) for txt, x, _ in outs), seen

        def single(joints, layer):
            block, adapter = layer
            outs = [block(x, lane.ctx, adapter) for lane, x in zip(lanes, joints, strict=True)]
            seen = None if probe is None else look(probe.single, [taps for _, taps in outs])
            return tuple(x for x, _ in outs), seen

        of = (None, None) if adapters is None else (adapters.double_blocks, adapters.single_blocks)
        how: Any = dict(passive=tuple(a.passive for a in lanes), remat=remat, segment=segment)
        streams, seen_double = scan_blocks(
            double,
            tuple((lane.txt_BTD, lane.img_BID) for lane in lanes),
            (self.double_blocks, of[0], nets),
            **how,
        )
        joints, seen_single = scan_blocks(
            single,
            tuple(jnp.concatenate(pair, axis=1) for pair in streams),
            (self.single_blocks, of[1]),
            **how,
        )
        text = lanes[0].txt_BTD.shape[1]
        after = tuple(
            lane._replace(txt_BTD=x[:, :text], img_BID=x[:, text:])
            for lane, x in zip(lanes, joints, strict=True)
        )
        return after, Seen(seen_double, seen_single)

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
