"""The FLUX.1 autoencoder (diffusers `AutoencoderKL`), NHWC, on a masked canvas.

Images of different sizes share one canvas: each lies top-left, with its valid size given as data.
The input of every 3x3 convolution is zeroed outside the valid area (the unpadded network's zero
padding), group statistics count valid pixels only, and the attention masks padded keys. So the
valid part of the result equals that of the unpadded network, and every aspect ratio is one program.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from x2jax.encoders.vae_layers import GroupNorm, Level, MidBlock, conv3, mask_canvas


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Sizes of an `AutoencoderKL` without quant convolutions (spec x2edit.md section 1)."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int
    norm_num_groups: int
    latent_channels: int = 16
    shift_factor: float = 0.1159
    scaling_factor: float = 0.3611

    def __post_init__(self):
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(
                    f"norm_num_groups {self.norm_num_groups} must divide every block width, "
                    f"not so in {self.block_out_channels}"
                )

    @property
    def factor(self) -> int:
        """Pixels per latent along an edge."""
        return 2 ** (len(self.block_out_channels) - 1)

    def normalise(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """Raw latents to what FLUX sees: (z - shift) * scale."""
        return (z - self.shift_factor) * self.scaling_factor

    def denormalise(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """The inverse of `normalise`."""
        return z / self.scaling_factor + self.shift_factor

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "VAEConfig":
        """Reads `vae/config.json` of a diffusers FLUX folder.

        Raises:
          ValueError: not an `AutoencoderKL`, a missing key, or a variant that FLUX does not use.
        """
        name = config.get("_class_name")
        if name != "AutoencoderKL":
            raise ValueError(f"expected the config of an AutoencoderKL, found {name!r}")
        for key in ("use_quant_conv", "use_post_quant_conv"):
            if config.get(key, True):
                raise ValueError(f"VAE config: {key} must be false; FLUX autoencoders have none")
        if not config.get("mid_block_add_attention", True):
            raise ValueError("VAE config: mid_block_add_attention must be true")
        if config.get("act_fn", "silu") != "silu":
            raise ValueError(f"VAE config: act_fn must be 'silu', found {config['act_fn']!r}")
        try:
            return cls(
                block_out_channels=tuple(config["block_out_channels"]),
                layers_per_block=config["layers_per_block"],
                norm_num_groups=config["norm_num_groups"],
                latent_channels=config["latent_channels"],
                shift_factor=float(config["shift_factor"]),
                scaling_factor=float(config["scaling_factor"]),
            )
        except KeyError as e:
            raise ValueError(f"the VAE config lacks {e.args[0]!r}") from None
        except TypeError:
            raise ValueError(
                "the VAE config needs a number for shift_factor and scaling_factor"
            ) from None

    def to_diffusers(self) -> dict[str, Any]:
        """The `vae/config.json` that diffusers reads."""
        levels = len(self.block_out_channels)
        return {
            "_class_name": "AutoencoderKL",
            "act_fn": "silu",
            "block_out_channels": list(self.block_out_channels),
            "down_block_types": ["DownEncoderBlock2D"] * levels,
            "up_block_types": ["UpDecoderBlock2D"] * levels,
            "force_upcast": True,
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": self.latent_channels,
            "layers_per_block": self.layers_per_block,
            "mid_block_add_attention": True,
            "norm_num_groups": self.norm_num_groups,
            "sample_size": 1024,
            "scaling_factor": self.scaling_factor,
            "shift_factor": self.shift_factor,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }


FLUX_VAE = VAEConfig((128, 256, 512, 512), layers_per_block=2, norm_num_groups=32)
TINY_VAE = VAEConfig((24, 40, 48), layers_per_block=1, norm_num_groups=8)


def _levels(widths, layers, resample, groups, **kw) -> nnx.List:
    """One level a width; all but the last resample."""
    inputs = (widths[0], *widths[:-1])
    steps = [resample] * (len(widths) - 1) + [""]
    return nnx.List(
        [
            Level(i, o, layers, s, groups, **kw)
            for i, o, s in zip(inputs, widths, steps, strict=True)
        ]
    )


class Encoder(nnx.Module):
    """Pixels to the posterior's moments."""

    def __init__(self, cfg: VAEConfig, **kw):
        widths = cfg.block_out_channels
        self.conv_in = conv3(3, widths[0], **kw)
        self.down_blocks = _levels(widths, cfg.layers_per_block, "down", cfg.norm_num_groups, **kw)
        self.mid_block = MidBlock(widths[-1], cfg.norm_num_groups, **kw)
        self.conv_norm_out = GroupNorm(
            widths[-1], cfg.norm_num_groups, param_dtype=kw["param_dtype"]
        )
        self.conv_out = conv3(widths[-1], 2 * cfg.latent_channels, **kw)

    def __call__(self, x, sizes_B2):
        x = self.conv_in(mask_canvas(x, sizes_B2))
        for level in self.down_blocks:
            x, sizes_B2 = level(x, sizes_B2)
        x = self.mid_block(x, sizes_B2)
        x = mask_canvas(jax.nn.silu(self.conv_norm_out(x, sizes_B2)), sizes_B2)
        return mask_canvas(self.conv_out(x), sizes_B2)


class Decoder(nnx.Module):
    """Latents to pixels; each level has one resnet more than the encoder's."""

    def __init__(self, cfg: VAEConfig, **kw):
        widths = cfg.block_out_channels[::-1]
        self.conv_in = conv3(cfg.latent_channels, widths[0], **kw)
        self.mid_block = MidBlock(widths[0], cfg.norm_num_groups, **kw)
        layers = cfg.layers_per_block + 1
        self.up_blocks = _levels(widths, layers, "up", cfg.norm_num_groups, **kw)
        self.conv_norm_out = GroupNorm(
            widths[-1], cfg.norm_num_groups, param_dtype=kw["param_dtype"]
        )
        self.conv_out = conv3(widths[-1], 3, **kw)

    def __call__(self, z, sizes_B2):
        x = self.mid_block(self.conv_in(mask_canvas(z, sizes_B2)), sizes_B2)
        for level in self.up_blocks:
            x, sizes_B2 = level(x, sizes_B2)
        x = mask_canvas(jax.nn.silu(self.conv_norm_out(x, sizes_B2)), sizes_B2)
        return mask_canvas(self.conv_out(x), sizes_B2)


def sample(
    mean: Float[Array, "B h w c"], logvar: Float[Array, "B h w c"], key: Array
) -> Float[Array, "B h w c"]:
    """One draw from the posterior, in the dtype of `mean` (noise too where padded)."""
    return mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape, mean.dtype)


class VAE(nnx.Module):
    """`AutoencoderKL`. All sizes are valid (height, width) in *pixels*; None: the full canvas."""

    def __init__(
        self, cfg: VAEConfig, *, dtype=jnp.float32, param_dtype=jnp.float32, rngs: nnx.Rngs
    ):
        self.cfg, self.dtype = cfg, dtype
        self.encoder = Encoder(cfg, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.decoder = Decoder(cfg, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def encode(
        self, pixels_BHW3: Float[Array, "B H W 3"], sizes_B2: Int[Array, "B 2"] | None = None
    ) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
        """Mean and log variance (clipped to [-30, 20]) of the posterior, float32, zero when padded.

        Args:
          pixels_BHW3: values in [-1, 1]; what lies outside the valid area is ignored.
          sizes_B2: valid sizes in pixels; (0, 0) gives zeros.

        Raises:
          ValueError: the canvas is not a multiple of the VAE's factor.
        """
        factor = self.cfg.factor
        if pixels_BHW3.shape[1] % factor or pixels_BHW3.shape[2] % factor:
            raise ValueError(
                f"canvas {pixels_BHW3.shape[1]}x{pixels_BHW3.shape[2]} must be a multiple of the "
                f"VAE's factor {factor} in both edges"
            )
        moments = self.encoder(pixels_BHW3.astype(self.dtype), sizes_B2).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return mean, jnp.clip(logvar, -30, 20)

    sample = staticmethod(sample)

    def normalise(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """As `VAEConfig.normalise`."""
        return self.cfg.normalise(z)

    def denormalise(self, z: Float[Array, "..."]) -> Float[Array, "..."]:
        """As `VAEConfig.denormalise`."""
        return self.cfg.denormalise(z)

    def decode(
        self, z: Float[Array, "B h w c"], sizes_B2: Int[Array, "B 2"] | None = None
    ) -> Float[Array, "B H W 3"]:
        """Pixels about [-1, 1] (not clipped), in the compute dtype, from denormalised latents.

        Args:
          z: latents; what lies outside the valid area is ignored.
          sizes_B2: valid sizes in pixels, multiples of the factor; the rest of the result is zero.
        """
        sizes_B2 = None if sizes_B2 is None else sizes_B2 // self.cfg.factor
        return self.decoder(z.astype(self.dtype), sizes_B2)
