"""LightControl: small conv nets show a frozen FLUX.1 the source (spec x2i.md section 4).

The stream holds the target alone; the source reaches FLUX through the nets, and with the
instruction through Qwen2.5-VL and AlignNet (`--config.text.pictures=False`: the instruction alone).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from x2jax.control import Control, ControlConfig
from x2jax.data.batch import Batch
from x2jax.model import Model
from x2jax.recipes.flow_matching import FlowMatching


class LightControl(FlowMatching):
    """Flow matching of the target; only the control nets train."""

    children = ("flux", "vae", "mllm", "alignnet")

    def fresh(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        """Raises ValueError for nets whose tokens are not the VAE's."""
        cfg, cell = ControlConfig(**self.config.control), 2 * configs["vae"].factor
        if cfg.factor != cell:
            raise ValueError(
                f"a control net with {len(cfg.widths)} widths makes a token of {cfg.factor} px, "
                f"this VAE one of {cell} px: set control.widths and control.groups"
            )
        return {"control": cfg}

    def stream_slots(self) -> int:
        return 1

    def control(self, model: Model, batch: Batch) -> Control:
        # DIFFERS: the published script shows the nets the target itself (`pixel_values_style` is
        # both), which no edit has at hand; here they see the source.
        source = _pixels(batch)[:, 1].astype(jnp.float32) / 127.5 - 1
        return model.control(source, batch.sizes[:, 1])

    def _encode(self, model: Model, batch: Batch, key: Any):
        pixels, sizes = _pixels(batch)[:, :1], batch.sizes[:, :1]
        return super()._encode(model, dataclasses.replace(batch, pixels=pixels, sizes=sizes), key)


def _pixels(batch: Batch) -> Array:
    if batch.pixels is None:
        raise ValueError("LightControl sees the source's pixels: precomputed latents lack them")
    return batch.pixels
