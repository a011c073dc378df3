"""Qwen2.5-VL as transformers saves it: the text path."""

from typing import Protocol

from converters.rules import Rule, T, Table, rule


class QwenSizes(Protocol):
    """What the table needs of a Qwen config."""

    layers: int
    tied: bool


def qwen_table(cfg: QwenSizes, *, nested: bool = False) -> Table:
    """Names of a `Qwen2_5_VLForConditionalGeneration` and paths of `Qwen2_5_VL`.

    Args:
      cfg: sizes.
      nested: names as `model.language_model.layers...` (transformers' modules) instead of
        `model.layers...` (its files, as published).
    """
    root = "model.language_model." if nested else "model."
    layer = root + "layers.{i}."
    layers = range(cfg.layers)

    def linear(name: str, bias: bool) -> list[Rule]:
        path = f"layers/{name.replace('.', '/')}"
        rules = [rule(f"{layer}{name}.weight", f"{path}/kernel", T, at=("i",), i=layers)]
        if bias:
            rules.append(rule(f"{layer}{name}.bias", f"{path}/bias", at=("i",), i=layers))
        return rules

    rules = [
        rule(f"{root}embed_tokens.weight", "embed_tokens/embedding"),
        rule(f"{root}norm.weight", "norm/scale"),
    ]
    for norm in ("input_layernorm", "post_attention_layernorm"):
        rules.append(rule(f"{layer}{norm}.weight", f"layers/{norm}/scale", at=("i",), i=layers))
    for name in ("q_proj", "k_proj", "v_proj"):
        rules += linear(f"self_attn.{name}", bias=True)
    for name in ("self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        rules += linear(name, bias=False)
    # The vision tower is not part of the text path; a tied head repeats the embedding.
    ignore = [r"(model\.)?visual\..*"]
    if cfg.tied:
        ignore.append(r"lm_head\.weight")
    else:
        rules.append(rule("lm_head.weight", "lm_head/kernel", T))
    return Table("Qwen2.5-VL text path, transformers", tuple(rules), tuple(ignore))
