"""Qwen2.5-VL as transformers saves it: the text path, and the vision tower if asked for."""

from typing import Protocol

from converters.decoder import DecoderSizes, decoder_rules
from converters.rules import Part, Rule, T, Table, reshape, rule


class VisionSizes(Protocol):
    """What the table needs of a vision config."""

    layers: int
    width: int
    channels: int
    patch: int
    temporal_patch: int


def qwen_table(
    cfg: DecoderSizes, *, nested: bool = False, vision: VisionSizes | None = None
) -> Table:
    """Names of a `Qwen2_5_VLForConditionalGeneration` and paths of `Qwen2_5_VL`.

    Args:
      cfg: sizes.
      nested: names as `model.language_model.layers...` and `model.visual...` (transformers'
        modules) instead of `model.layers...` and `visual...` (its files, as published).
      vision: sizes of the vision tower; None leaves the tower out.
    """
    rules, ignore = decoder_rules(cfg, "model.language_model." if nested else "model.")
    if vision is None:
        ignore.append(r"(model\.)?visual\..*")
    else:
        rules += _vision_rules(vision, "model.visual." if nested else "visual.")
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
