"""Plain LoRA on a frozen FLUX.1: text to image, or edits with the source as tokens."""

from collections.abc import Mapping
from typing import Any

from x2jax.adapters import AdapterConfig
from x2jax.recipes.flow_matching import AnyText


class LoRA(AnyText):
    """Flow matching; what trains is one low-rank delta a projection.

    With `image.slots=1` a sample is a picture and its caption; with more, the target, its sources
    and the instruction.
    """

    def fresh(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        return {"adapter": AdapterConfig.of(self.config.adapter)}
