"""AlignNet: hidden states of a multimodal LLM to FLUX's text features (spec x2i.md section 1)."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class AlignNetConfig:
    """Attributes:
    states: hidden states of the MLLM, embeddings included (N).
    width: their width (H).
    text_width, pooled_width: what FLUX expects.
    mixing: "conv" (5x5 over tokens and features) or "scale" (one factor a layer, then the mean).
    """

    states: int
    width: int
    text_width: int = 4096
    pooled_width: int = 768
    mixing: str = "conv"

    def __post_init__(self):
        if self.mixing not in ("conv", "scale"):
            raise ValueError(f"unknown mixing {self.mixing!r}: use 'conv' or 'scale'")


class Condition(NamedTuple):
    """What conditions FLUX. Attributes: text features, and the pooled vector."""

    txt_BTD: Float[Array, "B T text_width"]
    pooled_BP: Float[Array, "B pooled_width"]


class Conv(nnx.Module):
    """The mixing convolution over the (T, H) plane, N channels to one."""

    def __init__(self, states: int, *, param_dtype, rngs):
        init = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(init(rngs.params(), (5, 5, states, 1), param_dtype))
        self.bias = nnx.Param(jnp.zeros((1,), param_dtype))

    def __call__(self, states_NBTH, dtype):
        # The plane is the image, layers are channels in front: no transposed copy of the states.
        out = jax.lax.conv_general_dilated(
            states_NBTH.astype(dtype),
            self.kernel[...].astype(dtype),
            window_strides=(1, 1),
            padding=((2, 2), (2, 2)),
            dimension_numbers=("CNHW", "HWIO", "NHWC"),
        )
        return out[..., 0] + self.bias[...].astype(dtype)


class AlignNet(nnx.Module):
    """The bridge of X2I. Pads are processed and attended like tokens, as published."""

    def __init__(self, cfg: AlignNetConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
        self.cfg, self.dtype = cfg, dtype
        kw = dict(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if cfg.mixing == "conv":
            self.conv = Conv(cfg.states, param_dtype=param_dtype, rngs=rngs)
        else:
            self.cha_scale = nnx.Param(jnp.ones((cfg.states,), param_dtype))
        self.layernorm = nnx.LayerNorm(cfg.width, epsilon=1e-6, **kw)
        self.projector_in = nnx.Linear(cfg.width, cfg.text_width, use_bias=False, **kw)
        self.projector_out = nnx.Linear(cfg.text_width, cfg.text_width, use_bias=False, **kw)
        self.fc = nnx.Linear(cfg.text_width, cfg.pooled_width, **kw)

    def __call__(self, states_NBTH: Float[Array, "N B T H"]) -> Condition:
        """Mixes the layers, then projects.

        Raises:
          ValueError: another number or width of hidden states than the config's.
        """
        found = (states_NBTH.shape[0], states_NBTH.shape[-1])
        if found != (self.cfg.states, self.cfg.width):
            raise ValueError(
                f"this AlignNet takes {self.cfg.states} hidden states of width {self.cfg.width}, "
                f"the MLLM gives {found[0]} of width {found[1]}: is it another MLLM's AlignNet?"
            )
        if self.cfg.mixing == "conv":
            x = self.conv(states_NBTH, self.dtype)
        else:
            scale = self.cha_scale[...].astype(self.dtype) / self.cfg.states
            x = jnp.einsum("NBTH,N->BTH", states_NBTH.astype(self.dtype), scale)
        h = self.projector_in(self.layernorm(x))
        txt = self.projector_out(jax.nn.gelu(h, approximate=False))
        pooled = self.fc(jax.nn.gelu(txt, approximate=False)).mean(axis=1)
        return Condition(txt, pooled)
