"""Sizes of Qwen2.5-VL's language model (spec x2i.md section 1)."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar


@dataclasses.dataclass(frozen=True)
class QwenConfig:
    """Architecture of the text path.

    Attributes:
      pad_attention: "all" or "self", as `x2jax.encoders.decoder.causal` has it; a key of ours in
        `config.json`, which published folders lack.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    vocab: int
    tied: bool
    mrope_section: tuple[int, int, int]
    rope_theta: float = 1e6
    rms_eps: float = 1e-6
    pad_attention: str = "all"
    qkv_bias: ClassVar[bool] = True
    qk_norm: ClassVar[bool] = False

    def __post_init__(self):
        if self.width % self.heads or self.heads % self.kv_heads:
            raise ValueError(
                f"width {self.width}, heads {self.heads} and kv heads {self.kv_heads} must divide"
            )
        if 2 * sum(self.mrope_section) != self.head_dim:
            raise ValueError(
                f"mrope sections {self.mrope_section} must sum to half the head dim {self.head_dim}"
            )
        if self.pad_attention not in ("all", "self"):
            raise ValueError(f"unknown pad_attention {self.pad_attention!r}: use 'all' or 'self'")

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def states(self) -> int:
        """Hidden states of a forward pass: embeddings and every layer."""
        return self.layers + 1

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "QwenConfig":
        """Reads `config.json` of a Qwen2.5-VL folder, of transformers 4 (flat) or 5 (nested).

        Raises:
          ValueError: another model type, a missing key, or what this decoder does not do: sliding
            windows, scaled rotary positions, another activation.
        """
        if config.get("model_type") != "qwen2_5_vl":
            raise ValueError(
                f"expected the config of a qwen2_5_vl model, found {config.get('model_type')!r}"
            )
        text = {**config, **config.get("text_config", {})}
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        wrong = [f"rotary positions of type {kind!r}"] if kind not in ("default", "mrope") else []
        wrong += ["use_sliding_window"] if text.get("use_sliding_window") else []
        if text.get("hidden_act", "silu") != "silu":
            wrong.append(f"activation {text['hidden_act']!r}")
        if wrong:
            raise ValueError(f"not supported in a Qwen2.5-VL config: {', '.join(wrong)}")
        try:
            return cls(
                layers=text["num_hidden_layers"],
                width=text["hidden_size"],
                heads=text["num_attention_heads"],
                kv_heads=text["num_key_value_heads"],
                mlp_width=text["intermediate_size"],
                vocab=text["vocab_size"],
                tied=config.get("tie_word_embeddings", text.get("tie_word_embeddings", False)),
                mrope_section=tuple(rope["mrope_section"]),
                rope_theta=float(rope.get("rope_theta", text.get("rope_theta", 1e6))),
                rms_eps=float(text["rms_norm_eps"]),
                pad_attention=text.get("pad_attention", "all"),
            )
        except KeyError as e:
            raise ValueError(f"the Qwen2.5-VL config lacks {e.args[0]!r}") from None

    def to_transformers(self) -> dict[str, Any]:
        """The text part of a `Qwen2_5_VLConfig`, by the names of transformers."""
        own = {} if self.pad_attention == "all" else {"pad_attention": self.pad_attention}
        return {
            **own,
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "intermediate_size": self.mlp_width,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": self.rms_eps,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": self.rope_theta,
                "mrope_section": list(self.mrope_section),
            },
        }


QWEN2_5_VL_7B = QwenConfig(28, 3584, 28, 4, 18944, 152064, False, (16, 24, 24))
QWEN2_5_VL_3B = QwenConfig(36, 2048, 16, 2, 11008, 151936, True, (16, 24, 24))
QWEN_TINY = QwenConfig(4, 128, 4, 2, 256, 1028, False, (4, 6, 6), pad_attention="self")
"""Of the family that ships, whose AlignNet was trained with pads that see themselves."""
