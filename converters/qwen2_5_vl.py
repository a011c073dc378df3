"""Qwen2.5-VL as transformers saves it: the text path, and the vision tower if asked for."""

from typing import Protocol

from converters.rules import Part, Rule, T, Table, reshape, rule


class QwenSizes(Protocol):
    """What the table needs of a Qwen config."""

    layers: int
    tied: bool


class VisionSizes(Protocol):
    """What the table needs of a vision config."""

    layers: int
    width: int
    channels: int
    patch: int
    temporal_patch: int


def qwen_table(cfg: QwenSizes, *, nested: bool = False, vision: VisionSizes | None = None) -> Table:
    """Names of a `Qwen2_5_VLForConditionalGeneration` and paths of `Qwen2_5_VL`.

    Args:
      cfg: sizes.
      nested: names as `model.language_model.layers...` and `model.visual...` (transformers'
        modules) instead of `model.layers...` and `visual...` (its files, as published).
      vision: sizes of the vision tower; None leaves the tower out.
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
    ignore = []
    if vision is None:
        ignore.append(r"(model\.)?visual\..*")
    else:
        rules += _vision_rules(vision, "model.visual." if nested else "visual.")
    if cfg.tied:  # a tied head repeats the embedding
        ignore.append(r"lm_head\.weight")
    else:
        rules.append(rule("lm_head.weight", "lm_head/kernel", T))
    name = "Qwen2.5-VL text path" if vision is None else "Qwen2.5-VL"
    return Table(f"{name}, transformers", tuple(rules), tuple(ignore))


def _vision_rules(cfg: VisionSizes, root: str) -> list[Rule]:
    block, blocks = root + "blocks.{i}.", range(cfg.layers)
    conv = (cfg.width, cfg.channels, cfg.temporal_patch, cfg.patch, cfg.patch)
    flat = (cfg.width, cfg.channels * cfg.temporal_patch * cfg.patch**2)

    def linear(name: str, path: str) -> list[Rule]:
        return [
            rule(f"{name}.weight", f"visual/{path}/kernel", T),
            rule(f"{name}.bias", f"visual/{path}/bias"),
        ]

    rules = [
        rule(f"{root}patch_embed.proj.weight", "visual/patch_embed/kernel", reshape(conv, flat), T),
        rule(f"{root}merger.ln_q.weight", "visual/merger/ln_q/scale"),
        *linear(f"{root}merger.mlp.0", "merger/mlp_in"),
        *linear(f"{root}merger.mlp.2", "merger/mlp_out"),
    ]
    for norm in ("norm1", "norm2"):
        path = f"visual/blocks/{norm}/scale"
        rules.append(rule(f"{block}{norm}.weight", path, at=("i",), i=blocks))
    for name in ("attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
        path = f"visual/blocks/{name.replace('.', '/')}"
        rules += [
            rule(f"{block}{name}.weight", f"{path}/kernel", T, at=("i",), i=blocks),
            rule(f"{block}{name}.bias", f"{path}/bias", at=("i",), i=blocks),
        ]
    for kind, leaf, ops in (("weight", "kernel", (T,)), ("bias", "bias", ())):
        parts = tuple(Part(f"visual/blocks/attn/{x}/{leaf}", ("i",), ops) for x in "qkv")
        cut = (0, (cfg.width,) * 3)
        rules.append(Rule(f"{block}attn.qkv.{kind}", parts, cut, {"i": blocks}))
    return rules
