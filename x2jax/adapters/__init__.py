"""Adapters: deltas on named projections of a frozen FLUX.1."""

from x2jax.adapters.adapters import Adapters
from x2jax.adapters.config import X2EDIT, X2EDIT_TINY, AdapterConfig
from x2jax.adapters.moe_lora import MoELoRA, moe_lora

__all__ = ["X2EDIT", "X2EDIT_TINY", "AdapterConfig", "Adapters", "MoELoRA", "moe_lora"]
