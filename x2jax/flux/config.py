"""Sizes of FLUX.1 models. Sizes live in code; configs choose among them."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class FluxConfig:
    """Architecture of one FLUX.1 transformer (spec x2edit.md section 1)."""

    double_blocks: int
    single_blocks: int
    width: int
    heads: int
    head_dim: int
    axes: tuple[int, int, int]
    text_width: int
    pooled_width: int
    guidance: bool
    channels: int = 64
    mlp_ratio: int = 4
    theta: int = 10_000

    def __post_init__(self):
        if self.heads * self.head_dim != self.width:
            raise ValueError(
                f"heads x head_dim = {self.heads} x {self.head_dim} must equal width {self.width}"
            )
        if sum(self.axes) != self.head_dim or any(a % 2 for a in self.axes):
            raise ValueError(
                f"rope axes {self.axes} must be even and sum to head_dim {self.head_dim}"
            )

    @property
    def mlp_width(self) -> int:
        return self.mlp_ratio * self.width

    @classmethod
    def from_diffusers(cls, config: Mapping[str, Any]) -> "FluxConfig":
        """Reads `transformer/config.json` of a diffusers FLUX folder.

        Raises:
          ValueError: the file is not that of a `FluxTransformer2DModel`, or a key is missing.
        """
        name = config.get("_class_name")
        if name != "FluxTransformer2DModel":
            raise ValueError(f"expected the config of a FluxTransformer2DModel, found {name!r}")
        try:
            heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
            return cls(
                double_blocks=config["num_layers"],
                single_blocks=config["num_single_layers"],
                width=heads * head_dim,
                heads=heads,
                head_dim=head_dim,
                axes=tuple(config.get("axes_dims_rope", (16, 56, 56))),
                text_width=config["joint_attention_dim"],
                pooled_width=config["pooled_projection_dim"],
                guidance=config["guidance_embeds"],
                channels=config["in_channels"],
            )
        except KeyError as e:
            raise ValueError(f"the FLUX config lacks {e.args[0]!r}") from None

    def to_diffusers(self) -> dict[str, Any]:
        """The `transformer/config.json` that diffusers reads."""
        return {
            "_class_name": "FluxTransformer2DModel",
            "patch_size": 1,
            "in_channels": self.channels,
            "out_channels": None,
            "num_layers": self.double_blocks,
            "num_single_layers": self.single_blocks,
            "attention_head_dim": self.head_dim,
            "num_attention_heads": self.heads,
            "joint_attention_dim": self.text_width,
            "pooled_projection_dim": self.pooled_width,
            "guidance_embeds": self.guidance,
            "axes_dims_rope": list(self.axes),
        }


FLUX_DEV = FluxConfig(
    double_blocks=19,
    single_blocks=38,
    width=3072,
    heads=24,
    head_dim=128,
    axes=(16, 56, 56),
    text_width=4096,
    pooled_width=768,
    guidance=True,
)
FLUX_SCHNELL = dataclasses.replace(FLUX_DEV, guidance=False)
FLUX_TINY = FluxConfig(
    double_blocks=3,
    single_blocks=6,
    width=128,
    heads=4,
    head_dim=32,
    axes=(8, 12, 12),
    text_width=128,
    pooled_width=64,
    guidance=True,
)
