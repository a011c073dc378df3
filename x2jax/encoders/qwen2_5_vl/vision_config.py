"""Sizes of Qwen2.5-VL's vision tower (spec x2i.md section 1)."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Architecture of the vision tower, and the tokens that stand for what it sees.

    Attributes:
      out_width: width of the language model.
      full_blocks: blocks that attend within a whole frame; the others attend within a window.
      patch, temporal_patch: pixels and frames of a patch.
      merge: patches a side that become one token.
      window: pixels a side of a window.
      tokens_per_second: temporal positions of a second of video.
      image_token, video_token: ids in the language model's vocabulary.
    """

    layers: int
    width: int
    heads: int
    mlp_width: int
    out_width: int
    full_blocks: tuple[int, ...]
    patch: int = 14
    temporal_patch: int = 2
    merge: int = 2
    window: int = 112
    channels: int = 3
    tokens_per_second: float = 2
    image_token: int = 151655
    video_token: int = 151656
    rope_theta: float = 1e4
    rms_eps: float = 1e-6

    def __post_init__(self):
        if self.width % self.heads or self.head_dim % 4:
            raise ValueError(
                f"width {self.width} over {self.heads} heads must give a head dim that 4 divides: "
                "rows and columns rotate half of it each, in pairs"
            )
        if not all(0 <= b < self.layers for b in self.full_blocks):
            raise ValueError(f"full blocks {self.full_blocks} are not among {self.layers} layers")
        if self.window < self.factor:
            raise ValueError(f"a window of {self.window} pixels holds no token ({self.factor})")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_width(self) -> int:
        """Values of a patch: channels x frames x height x width."""
        return self.channels * self.temporal_patch * self.patch**2

    @property
    def factor(self) -> int:
        """Pixels a side of a token; heights and widths are multiples of it."""
        return self.patch * self.merge

    @property
    def window_tokens(self) -> int:
        """Tokens a side of a window."""
        return self.window // self.factor

    @property
    def window_patches(self) -> int:
        """Patches of a whole window."""
        return (self.window_tokens * self.merge) ** 2

    def tokens(self, grid: tuple[int, int, int]) -> int:
        """Tokens of an image or video of `grid` = (frames, rows, columns) patches."""
        t, h, w = grid
        return t * h * w // self.merge**2

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "VisionConfig":
        """Reads `config.json` of a Qwen2.5-VL folder.

        Raises:
          ValueError: no vision tower in it, a missing key, or another activation.
        """
        vision = config.get("vision_config")
        if vision is None:
            raise ValueError("the config has no vision_config: this folder has no vision tower")
        if vision.get("hidden_act", "silu") != "silu":
            raise ValueError(f"the vision tower has SiLU, the config asks {vision['hidden_act']!r}")
        rope = vision.get("rope_parameters") or {}
        try:
            return cls(
                layers=vision["depth"],
                width=vision["hidden_size"],
                heads=vision["num_heads"],
                mlp_width=vision["intermediate_size"],
                out_width=vision["out_hidden_size"],
                full_blocks=tuple(vision["fullatt_block_indexes"]),
                patch=vision["patch_size"],
                temporal_patch=vision["temporal_patch_size"],
                merge=vision["spatial_merge_size"],
                window=vision["window_size"],
                channels=vision.get("in_channels", vision.get("in_chans", 3)),
                tokens_per_second=vision["tokens_per_second"],
                image_token=config["image_token_id"],
                video_token=config["video_token_id"],
                rope_theta=float(rope.get("rope_theta", 1e4)),
            )
        except KeyError as e:
            raise ValueError(f"the Qwen2.5-VL config lacks {e.args[0]!r}") from None

    def to_transformers(self) -> dict[str, Any]:
        """What a `Qwen2_5_VLConfig` holds beside its text part, by the names of transformers."""
        return {
            "vision_config": {
                "depth": self.layers,
                "hidden_size": self.width,
                "num_heads": self.heads,
                "intermediate_size": self.mlp_width,
                "out_hidden_size": self.out_width,
                "hidden_act": "silu",
                "fullatt_block_indexes": list(self.full_blocks),
                "patch_size": self.patch,
                "temporal_patch_size": self.temporal_patch,
                "spatial_merge_size": self.merge,
                "window_size": self.window,
                "in_channels": self.channels,
                "tokens_per_second": self.tokens_per_second,
                "rope_parameters": {"rope_type": "axial", "rope_theta": self.rope_theta},
            },
            "image_token_id": self.image_token,
            "video_token_id": self.video_token,
        }


QWEN2_5_VL_7B_VISION = VisionConfig(32, 1280, 16, 3420, 3584, (7, 15, 23, 31))
QWEN2_5_VL_3B_VISION = VisionConfig(32, 1280, 16, 3420, 2048, (7, 15, 23, 31))
QWEN_TINY_VISION = VisionConfig(
    4, 64, 4, 192, 128, (1, 2, 3), patch=8, window=32, image_token=1026, video_token=1027
)
