"""AlignNet: hidden states of a multimodal LLM to FLUX's text features (spec x2i.md section 1)."""

import dataclasses
from typing import Any, NamedTuple

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


RELEASED = {
    "qwen2.5-vl-7b": AlignNetConfig(29, 3584),
    "qwen2.5-vl-3b": AlignNetConfig(37, 2048),
    "internvl2.5-4b": AlignNetConfig(37, 2048),
    "internvl2.5-1b": AlignNetConfig(25, 896, mixing="scale"),
    "minicpm-o-2.6": AlignNetConfig(29, 3584),
}
"""AlignNets of X2I by the MLLM that they read (spec x2i.md section 1)."""


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


def add_state(total_BTH: Array, state_BTH: Array, weight: Array) -> Array:
    """Adds one hidden state to the mixture, in the dtype of `total_BTH`.

    Args:
      weight: (5, 5), the state's part of the convolution, or a scalar.
    """
    x, weight = state_BTH.astype(total_BTH.dtype), weight.astype(total_BTH.dtype)
    if weight.ndim == 0:
        return total_BTH + weight * x
    _, rows, columns = x.shape
    x = jnp.pad(x, ((0, 0), (2, 2), (2, 2)))
    # Shifted sums: as a convolution of one channel to one, TPUs would pad each channel to a tile.
    for i in range(5):
        for j in range(5):
            total_BTH += weight[i, j] * x[:, i : i + rows, j : j + columns]
    return total_BTH


class AlignNet(nnx.Module):
    """The bridge of X2I. Pads are processed and attended like tokens, as published.

    `condition` adds the states of an MLLM up as they appear; `__call__` takes them as a stack. They
    are equal, the stack needs a lot more memory (`benchmarks/aot_mixing.py`).
    """

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
        self.check(states_NBTH.shape[0], states_NBTH.shape[-1])
        if self.cfg.mixing == "conv":
            return self._project(self.conv(states_NBTH, self.dtype))
        weights = self.weights_N.astype(self.dtype)
        return self._project(jnp.einsum("NBTH,N->BTH", states_NBTH.astype(self.dtype), weights))

    def condition(self, mllm: Any, *inputs: Any, **more: Any) -> Condition:
        """What the states of an MLLM make: `self(mllm.hidden_states(...))` without the stack.

        No gradient enters the MLLM. The sum is float32 whatever the dtype of the states.

        Args:
          mllm: has `mixed_states`, as `x2jax.encoders.qwen2_5_vl.Qwen2_5_VL`.
          inputs, more: what its `hidden_states` takes, and `select_Bt`.

        Raises:
          ValueError: another MLLM's AlignNet, or as `hidden_states`.
        """
        self.check(mllm.cfg.states, mllm.cfg.width)
        return self.project(mllm.mixed_states(add_state, self.weights_N, *inputs, **more))

    @property
    def weights_N(self) -> Float[Array, "N ..."]:
        """What `add_state` weighs each hidden state with."""
        if self.cfg.mixing == "conv":
            return jnp.moveaxis(self.conv.kernel[...][..., 0], -1, 0)
        return self.cha_scale[...] / self.cfg.states

    def project(self, total_BTH: Float[Array, "B T H"]) -> Condition:
        """Text features and pooled vector of a finished sum of `add_state`."""
        if self.cfg.mixing == "conv":
            total_BTH += self.conv.bias[...].astype(total_BTH.dtype)
        return self._project(total_BTH)

    def check(self, states: int, width: int) -> None:
        """Raises ValueError unless an MLLM with so many states of this width is the config's."""
        if (states, width) != (self.cfg.states, self.cfg.width):
            raise ValueError(
                f"this AlignNet takes {self.cfg.states} hidden states of width {self.cfg.width}, "
                f"the MLLM gives {states} of width {width}: is it another MLLM's AlignNet?"
            )

    def _project(self, x_BTH) -> Condition:
        h = self.projector_in(self.layernorm(x_BTH))
        txt = self.projector_out(jax.nn.gelu(h, approximate=False))
        pooled = self.fc(jax.nn.gelu(txt, approximate=False)).mean(axis=1)
        return Condition(txt, pooled)
