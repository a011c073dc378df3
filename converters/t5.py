"""T5 v1.1's encoder as transformers saves it: `text_encoder_2/` of a diffusers FLUX folder."""

from collections.abc import Collection
from typing import Protocol

from converters.rules import T, Table, rule

SHARED, OWN = "shared.weight", "encoder.embed_tokens.weight"
"""Names of the embedding; they are one tensor, and a file may have either or both."""


class T5Sizes(Protocol):
    """What the table needs of a T5 config."""

    layers: int


def t5_table(cfg: T5Sizes, *, embedding: str = SHARED) -> Table:
    """Names of a `T5EncoderModel` and paths of `T5Encoder`.

    A whole T5 is read too: its decoder and head are left out.

    Args:
      cfg: sizes.
      embedding: the name that the file has for the embedding, `SHARED` or `OWN`.
    """
    layers = range(cfg.layers)
    attn, mlp = "encoder.block.{i}.layer.0.", "encoder.block.{i}.layer.1."
    rules = [
        rule(embedding, "shared/embedding"),
        rule(
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
            "position_bias/embedding",
        ),
        rule("encoder.final_layer_norm.weight", "final_norm/scale"),
        rule(f"{attn}layer_norm.weight", "blocks/norm1/scale", at=("i",), i=layers),
        rule(f"{mlp}layer_norm.weight", "blocks/norm2/scale", at=("i",), i=layers),
    ]
    for theirs, ours in (
        (f"{attn}SelfAttention.q", "attn/q"),
        (f"{attn}SelfAttention.k", "attn/k"),
        (f"{attn}SelfAttention.v", "attn/v"),
        (f"{attn}SelfAttention.o", "attn/proj"),
        (f"{mlp}DenseReluDense.wi_0", "mlp/gate_proj"),
        (f"{mlp}DenseReluDense.wi_1", "mlp/up_proj"),
        (f"{mlp}DenseReluDense.wo", "mlp/down_proj"),
    ):
        rules.append(rule(f"{theirs}.weight", f"blocks/{ours}/kernel", T, at=("i",), i=layers))
    twin = OWN if embedding == SHARED else SHARED
    ignore = (twin.replace(".", r"\."), r"decoder\..*", r"lm_head\.weight")
    return Table("T5 encoder, transformers", tuple(rules), ignore)


def embedding_of(names: Collection[str]) -> str:
    """The name of the embedding among a file's names; `SHARED` if both or neither are there."""
    return OWN if OWN in names and SHARED not in names else SHARED
