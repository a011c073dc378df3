"""The one batch type that the loader makes and every recipe reads."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Int32, UInt8


class Moments(NamedTuple):
    """The VAE's posterior of every image, raw: what a draw of the latents needs.

    Attributes: mean and log variance on the latent canvas, zero outside the valid size.
    """

    mean_BShwc: Float[Array, "B S h w c"]
    logvar_BShwc: Float[Array, "B S h w c"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """A batch of edits: numpy arrays from the loader, jax arrays in the step.

    Every image lies at the top left of a canvas that is the same for the whole run, so one
    compiled program serves all aspect ratios. Slot 0 is the target, slots 1 and up are the
    sources. Images come as pixels, or as moments that were computed before; the other is None.
    Shape suffixes: B batch, S image slots, T text tokens.
    """

    pixels: UInt8[Array, "B S Hc Wc 3"] | None  # RGB, zero outside the valid size
    sizes: Int32[Array, "B S 2"]  # valid (height, width) in pixels; (0, 0) is an empty slot
    text: Any  # what `x2jax.model.Model.condition` takes; its type says by which encoders
    task: Int32[Array, "B"]  # 0 to 15, see x2jax.data.tasks.TASKS
    sample_id: Int32[Array, "B"]  # position in the index
    moments: Moments | None = None  # as `x2jax.precompute` stored them

    @property
    def batch_size(self) -> int:
        """Number of samples, B."""
        return self.task.shape[0]
