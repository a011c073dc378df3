"""Qwen3's dense text models (0.6B to 32B): the shared decoder with normed heads and no biases."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from x2jax.encoders.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Qwen3Config:
    """Architecture. Heads need not fill the width: the 0.6B has 16 heads of 128 and width 1024."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    vocab: int
    tied: bool
    rope_theta: float = 1e6
    rms_eps: float = 1e-6
    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = True
    mrope_section: ClassVar[None] = None
    pad_attention: ClassVar[str] = "all"

    def __post_init__(self):
        if self.heads % self.kv_heads or self.head_dim % 2:
            raise ValueError(
                f"heads {self.heads} must be a multiple of kv heads {self.kv_heads}, and the head "
                f"dim {self.head_dim} even"
            )

    @property
    def states(self) -> int:
        """Hidden states of a forward pass: embeddings and every layer."""
        return self.layers + 1

    @classmethod
    def from_transformers(cls, config: Mapping[str, Any]) -> "Qwen3Config":
        """Reads `config.json` of a Qwen3 folder, of transformers 4 or 5.

        Raises:
          ValueError: another model type, a missing key, or what this decoder does not do: biases
            of attention, sliding windows, scaled rotary positions, another activation.
        """
        if config.get("model_type") != "qwen3":
            raise ValueError(
                f"expected the config of a qwen3 model, found {config.get('model_type')!r}"
            )
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        wrong = [k for k in ("attention_bias", "use_sliding_window") if config.get(k)]
        wrong += [f"rotary positions of type {kind!r}"] if kind != "default" else []
        if config.get("hidden_act", "silu") != "silu":
            wrong.append(f"activation {config['hidden_act']!r}")
        if wrong:
            raise ValueError(f"not supported in a Qwen3 config: {', '.join(wrong)}")
        try:
            return cls(
                layers=config["num_hidden_layers"],
                width=config["hidden_size"],
                heads=config["num_attention_heads"],
                kv_heads=config["num_key_value_heads"],
                head_dim=config["head_dim"],
                mlp_width=config["intermediate_size"],
                vocab=config["vocab_size"],
                tied=config.get("tie_word_embeddings", False),
                rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 1e6))),
                rms_eps=float(config["rms_norm_eps"]),
            )
        except KeyError as e:
            raise ValueError(f"the Qwen3 config lacks {e.args[0]!r}") from None

    def to_transformers(self) -> dict[str, Any]:
        """`config.json` by the names of transformers."""
        return {
            "model_type": "qwen3",
            "num_hidden_layers": self.layers,
            "hidden_size": self.width,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "intermediate_size": self.mlp_width,
            "vocab_size": self.vocab,
            "tie_word_embeddings": self.tied,
            "rms_norm_eps": self.rms_eps,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


QWEN3_8B = Qwen3Config(36, 4096, 32, 8, 128, 12288, 151936, False)


class Qwen3(Decoder):
    """A Qwen3 text model; `hidden_states`, `logits` and `generate` as every decoder has them."""
