"""Qwen2.5-VL: the text path."""

from x2jax.encoders.qwen2_5_vl.config import (
    QWEN2_5_VL_3B,
    QWEN2_5_VL_7B,
    QWEN_TINY,
    QwenConfig,
)
from x2jax.encoders.qwen2_5_vl.model import Qwen2_5_VL

__all__ = ["QWEN2_5_VL_3B", "QWEN2_5_VL_7B", "QWEN_TINY", "Qwen2_5_VL", "QwenConfig"]
