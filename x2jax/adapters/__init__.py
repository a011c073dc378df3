"""Adapters: deltas on named projections of a frozen FLUX.1."""

from x2jax.adapters.adapters import Adapters
from x2jax.adapters.config import PRESETS, X2EDIT, X2EDIT_TINY, AdapterConfig, plain_lora
from x2jax.adapters.moe_lora import MoELoRA, moe_lora

__all__ = [
    "PRESETS",
    "X2EDIT",
    "X2EDIT_TINY",
    "AdapterConfig",
    "Adapters",
    "MoELoRA",
    "moe_lora",
    "plain_lora",
]
