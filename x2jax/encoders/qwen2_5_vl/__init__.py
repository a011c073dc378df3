"""Qwen2.5-VL: the text path, and the vision tower beside it."""

from x2jax.encoders.qwen2_5_vl.config import (
    QWEN2_5_VL_3B,
    QWEN2_5_VL_7B,
    QWEN_TINY,
    QwenConfig,
)
from x2jax.encoders.qwen2_5_vl.model import Qwen2_5_VL
from x2jax.encoders.qwen2_5_vl.positions import mrope_positions
from x2jax.encoders.qwen2_5_vl.preprocess import Media, image_patches, pack, video_patches
from x2jax.encoders.qwen2_5_vl.vision import VisionInputs, VisionTower
from x2jax.encoders.qwen2_5_vl.vision_config import (
    QWEN2_5_VL_3B_VISION,
    QWEN2_5_VL_7B_VISION,
    QWEN_TINY_VISION,
    VisionConfig,
)

__all__ = [
    "QWEN2_5_VL_3B",
    "QWEN2_5_VL_3B_VISION",
    "QWEN2_5_VL_7B",
    "QWEN2_5_VL_7B_VISION",
    "QWEN_TINY",
    "QWEN_TINY_VISION",
    "Media",
    "Qwen2_5_VL",
    "QwenConfig",
    "VisionConfig",
    "VisionInputs",
    "VisionTower",
    "image_patches",
    "mrope_positions",
    "pack",
    "video_patches",
]
