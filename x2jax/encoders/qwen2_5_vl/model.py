"""Qwen2.5-VL: the shared decoder, and the tokens that the vision tower makes of images and videos.

In text the three rotary position rows are equal, so mrope is ordinary rotary embedding. Images and
videos bring positions of their own.
"""

import jax.numpy as jnp
from flax import nnx

from x2jax.encoders.decoder import Decoder
from x2jax.encoders.qwen2_5_vl.config import QwenConfig
from x2jax.encoders.qwen2_5_vl.vision import VisionInputs, VisionTower
from x2jax.encoders.qwen2_5_vl.vision_config import VisionConfig


class Qwen2_5_VL(Decoder):
    """Qwen2.5-VL's text path, with the vision tower as `visual` if `vision` says what it is.

    Raises:
      ValueError: the tower's tokens are not as wide as the language model.
    """

    def __init__(
        self,
        cfg: QwenConfig,
        vision: VisionConfig | None = None,
        *,
        dtype,
        param_dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(cfg, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        if vision is not None and vision.out_width != cfg.width:
            raise ValueError(
                f"the vision tower makes tokens of width {vision.out_width}, the language model's "
                f"is {cfg.width}: take both configs from one folder"
            )
        # Last, so that the text path is initialised alike with and without it.
        self.visual = (
            None
            if vision is None
            else VisionTower(vision, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        )

    def embed(self, ids_BT, mask_BT, positions_BT3=None, vision: VisionInputs | None = None):
        """Input of the first layer: embeddings, and what the tower sees in place of its tokens."""
        if vision is None or self.visual is None:
            return super().embed(ids_BT, mask_BT, positions_BT3, vision)
        if positions_BT3 is None:
            raise ValueError("images and videos need positions_BT3: make them by mrope_positions")
        x_BTD = self.embed_tokens(ids_BT)
        cfg, seen_BMD = self.visual.cfg, self.visual(vision)
        is_seen_BT = ((ids_BT == cfg.image_token) | (ids_BT == cfg.video_token)) & mask_BT
        at_BT = jnp.clip(jnp.cumsum(is_seen_BT, axis=1) - 1, 0, seen_BMD.shape[1] - 1)
        seen_BTD = jnp.take_along_axis(seen_BMD, at_BT[..., None], axis=1)
        return jnp.where(is_seen_BT[..., None], seen_BTD.astype(x_BTD.dtype), x_BTD)
