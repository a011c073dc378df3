"""X2Edit: task-aware MoE-LoRA on a frozen FLUX.1, conditioned by Qwen2.5-VL through AlignNet."""

from collections.abc import Mapping
from typing import Any

from x2jax.adapters import AdapterConfig
from x2jax.recipes.flow_matching import FlowMatching


class X2Edit(FlowMatching):
    """Flow matching with the contrastive loss (spec x2edit.md sections 2 to 5)."""

    children = ("flux", "vae", "mllm", "alignnet")
    precomputes = True

    def fresh(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        return {"adapter": AdapterConfig.of(self.config.adapter)}
