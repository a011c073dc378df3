"""LightControl: a small conv net per double block shows FLUX the source (spec x2i.md section 4).

Every net reads the source picture and the timestep, and its output is added to the image stream
after its double block. Nothing else of FLUX changes.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from x2jax.encoders.vae_layers import GroupNorm, ResnetBlock, conv3, mask_canvas
from x2jax.flux.config import FluxConfig
from x2jax.flux.latents import TARGET, ImageStream
from x2jax.flux.model import Embedder, stack
from x2jax.flux.rope import timestep_features

# torch.nn.GroupNorm's; the residual blocks have 1e-6, as diffusers sets them.
EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class ControlConfig:
    """Sizes of a control net; the defaults are the published ones.

    Attributes:
      stem: channels of the three convolutions on pixels, the first of stride 2.
      widths: channels of the residual levels, each with a convolution of stride 2 at its end.
      groups: of the group norms of each level.
      time_features: sinusoidal features of a timestep.
      time_width: what an MLP makes of them, for the residual levels.
      zero: start with an output of zero, so that an untrained control changes nothing.
    """

    stem: tuple[int, int, int] = (64, 64, 128)
    widths: tuple[int, ...] = (128, 256)
    groups: tuple[int, ...] = (4, 8)
    time_features: int = 128
    time_width: int = 256
    zero: bool = True

    def __post_init__(self):
        # Configs are lists after JSON; a dataclass that jit closes over must hash.
        for name in ("stem", "widths", "groups"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.stem) != 3 or not self.widths or len(self.widths) != len(self.groups):
            raise ValueError(
                f"a control net has three stem convolutions and a group count for each width, "
                f"found stem {self.stem}, widths {self.widths}, groups {self.groups}"
            )
        inputs = (self.stem[-1], *self.widths[:-1])
        pairs = [
            *zip(inputs, self.groups, strict=True),
            *zip(self.widths, self.groups, strict=True),
        ]
        pairs += [(c, STEM_GROUPS) for c in self.stem] + [(self.widths[-1], MID_GROUPS)]
        uneven = [f"{c} channels in {g} groups" for c, g in pairs if c % g]
        if uneven:
            raise ValueError(f"group norms need channels that divide evenly: {', '.join(uneven)}")

    @property
    def factor(self) -> int:
        """Pixels per token along an edge: stem, levels and the last convolution halve each."""
        return 2 ** (len(self.widths) + 2)


STEM_GROUPS, MID_GROUPS = 2, 8
LIGHT_CONTROL = ControlConfig()


def _halving(cin: int, cout: int, **kw) -> nnx.Conv:
    """A 3x3 convolution of stride 2, padded on every side."""
    return nnx.Conv(cin, cout, (3, 3), strides=2, padding=((1, 1), (1, 1)), **kw)


class ControlNet(nnx.Module):
    """Pixels and timesteps to a delta of every token of the canvas."""

    def __init__(self, cfg: ControlConfig, width: int, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.cfg, self.dtype = cfg, dtype
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        norm = dict(eps=EPS, param_dtype=param_dtype)
        a, b, c = cfg.stem
        self.time_in = Embedder(cfg.time_features, cfg.time_width, **kw)
        self.stem_convs = nnx.List([_halving(3, a, **kw), conv3(a, b, **kw), conv3(b, c, **kw)])
        self.stem_norms = nnx.List([GroupNorm(n, STEM_GROUPS, **norm) for n in cfg.stem])
        sizes = list(zip((c, *cfg.widths[:-1]), cfg.widths, cfg.groups, strict=True))
        self.down_res = nnx.List(
            [ResnetBlock(i, o, g, time_width=cfg.time_width, **kw) for i, o, g in sizes]
        )
        self.down_sample = nnx.List([_halving(o, o, **kw) for _, o, _ in sizes])
        last = cfg.widths[-1]
        self.mid_convs = nnx.List([conv3(last, last, **kw) for _ in range(2)])
        self.mid_norms = nnx.List([GroupNorm(last, MID_GROUPS, **norm) for _ in range(2)])
        # DIFFERS: published nets start with PyTorch's random output, which disturbs the base from
        # the first step; `zero=False` starts as they do.
        start = dict(kernel_init=nnx.initializers.zeros) if cfg.zero else {}
        self.out = nnx.Conv(last, width, (2, 2), strides=2, padding="VALID", **start, **kw)

    def __call__(
        self,
        pixels_BHW3: Float[Array, "B H W 3"],
        sizes_B2: Int[Array, "B 2"] | None,
        timesteps_B: Float[Array, "B"],
    ) -> Float[Array, "B h w D"]:
        """The delta at every token of the canvas, zero beyond the valid size.

        Args:
          pixels_BHW3: in [-1, 1] on a canvas whose edges are multiples of `cfg.factor`.
          sizes_B2: valid sizes in pixels, multiples of `cfg.factor`; None for the whole canvas.
          timesteps_B: sigma in [0, 1].
        """
        features = timestep_features(timesteps_B, self.cfg.time_features)
        time_BF = self.time_in(features.astype(self.dtype))
        x, sizes = pixels_BHW3.astype(self.dtype), sizes_B2
        for k, (conv, norm) in enumerate(zip(self.stem_convs, self.stem_norms, strict=True)):
            x = conv(mask_canvas(x, sizes))
            sizes = _half(sizes) if k == 0 else sizes
            x = jax.nn.relu(norm(x, sizes))
        for res, down in zip(self.down_res, self.down_sample, strict=True):
            x = down(mask_canvas(res(x, sizes, time_BF), sizes))
            sizes = _half(sizes)
        h = self.mid_norms[0](jax.nn.relu(self.mid_convs[0](mask_canvas(x, sizes))), sizes)
        h = self.mid_norms[1](self.mid_convs[1](mask_canvas(h, sizes)), sizes)
        return mask_canvas(self.out(mask_canvas(x + h, sizes)), _half(sizes))


def _half(sizes_B2):
    return None if sizes_B2 is None else sizes_B2 // 2


class Control(NamedTuple):
    """What `Flux` takes beside its adapters.

    Attributes:
      nets: a `ControlNet` with parameters stacked over the double blocks.
      pixels_BHW3: what it shows, in [-1, 1] on a canvas.
      sizes_B2: valid sizes in pixels, (0, 0) where there is nothing to show.
    """

    nets: Any
    pixels_BHW3: Float[Array, "B H W 3"]
    sizes_B2: Int[Array, "B 2"]

    def delta(
        self, net: ControlNet, img: ImageStream, timesteps_B: Float[Array, "B"]
    ) -> Float[Array, "B I D"]:
        """One block's output at the target tokens of the stream, zero at all others."""
        canvas_BhwD = net(self.pixels_BHW3, self.sizes_B2, timesteps_B)
        batch, _, columns, width = canvas_BhwD.shape
        # A target token's position ids are its row and column: they say where it lies here.
        is_target = img.roles_BI == TARGET
        at_BI = img.positions_BI3[..., 1] * columns + img.positions_BI3[..., 2]
        at_BI = jnp.where(is_target, at_BI, 0)
        tokens = canvas_BhwD.reshape(batch, -1, width)
        taken = jnp.take_along_axis(tokens, at_BI[..., None], axis=1)
        return jnp.where(is_target[..., None], taken, 0)


class LightControl(nnx.Module):
    """The trainable nets, one a double block of a frozen `Flux`.

    Call it with source pixels and sizes; pass what it returns to `Flux.__call__` as `control`.
    """

    def __init__(
        self,
        cfg: ControlConfig,
        flux: FluxConfig,
        *,
        dtype,
        param_dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.cfg = cfg
        kw = dict(dtype=dtype, param_dtype=param_dtype)
        self.nets = stack(
            lambda r: ControlNet(cfg, flux.width, rngs=r, **kw), flux.double_blocks, rngs
        )

    def __call__(
        self, pixels_BHW3: Float[Array, "B H W 3"], sizes_B2: Int[Array, "B 2"]
    ) -> Control:
        """Raises ValueError if the canvas is no multiple of a token's edge."""
        factor = self.cfg.factor
        if pixels_BHW3.shape[1] % factor or pixels_BHW3.shape[2] % factor:
            raise ValueError(
                f"canvas {pixels_BHW3.shape[1]}x{pixels_BHW3.shape[2]} must be a multiple of "
                f"{factor} px, one token of this control, in both edges"
            )
        return Control(self.nets, pixels_BHW3, sizes_B2)
