"""LightControl files: the state dict of X2I's `lightcontrol/train_lightcontrol.py`.

That script saves a list of 19 control nets as `diffusion_pytorch_model.bin`, under "module."
because it was wrapped for training on several GPUs. The names are those of its modules; no
released file was at hand to compare with.
"""

from collections.abc import Mapping
from typing import Any, Protocol

from converters.alignnet import prefix_of
from converters.rules import CONV, Rule, T, Table, rule


class ControlSizes(Protocol):
    """What the table reads of a configuration."""

    stem: tuple[int, int, int]
    widths: tuple[int, ...]


def control_table(cfg: ControlSizes, blocks: int, prefix: str = "module.") -> Table:
    """Names of the state dict and paths of `x2jax.control.LightControl`.

    Args:
      cfg: `x2jax.control.ControlConfig` or anything with its sizes.
      blocks: double blocks of the FLUX it belongs to.
      prefix: "module.", or "" for files saved from a bare list.
    """
    rules: list[Rule] = []

    def layer(name: str, path: str, leaf: str, *ops) -> None:
        each, at = dict(i=range(blocks)), ("i",)
        theirs, ours = f"{prefix}{{i}}.{name}", f"nets/{path}"
        rules.append(rule(f"{theirs}.weight", f"{ours}/{leaf}", *ops, at=at, **each))
        rules.append(rule(f"{theirs}.bias", f"{ours}/bias", at=at, **each))

    layer("time_embedding.linear_1", "time_in/in_layer", "kernel", T)
    layer("time_embedding.linear_2", "time_in/out_layer", "kernel", T)
    for k in range(3):  # convolution, norm, ReLU
        layer(f"embedding.{3 * k}", f"stem_convs/{k}", "kernel", CONV)
        layer(f"embedding.{3 * k + 1}", f"stem_norms/{k}", "scale")
    inputs = (cfg.stem[-1], *cfg.widths[:-1])
    for k, (before, after) in enumerate(zip(inputs, cfg.widths, strict=True)):
        theirs, ours = f"down_res.{k}", f"down_res/{k}"
        for n in (1, 2):
            layer(f"{theirs}.norm{n}", f"{ours}/norm{n}", "scale")
            layer(f"{theirs}.conv{n}", f"{ours}/conv{n}", "kernel", CONV)
        layer(f"{theirs}.time_emb_proj", f"{ours}/time_emb_proj", "kernel", T)
        if before != after:
            layer(f"{theirs}.conv_shortcut", f"{ours}/conv_shortcut", "kernel", CONV)
        layer(f"down_sample.{k}.conv", f"down_sample/{k}", "kernel", CONV)
    for k, (conv, norm) in enumerate(((0, 2), (3, 4))):
        layer(f"mid_convs.0.{conv}", f"mid_convs/{k}", "kernel", CONV)
        layer(f"mid_convs.0.{norm}", f"mid_norms/{k}", "scale")
    layer("mid_convs.1", "out", "kernel", CONV)
    return Table("LightControl", tuple(rules))


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What a state dict says of its nets.

    Returns:
      stem, widths, time_features, time_width: arguments of `ControlConfig`; blocks and width: of
      the FLUX it belongs to; prefix: of the names. Group counts leave no trace in a file.

    Raises:
      ValueError: names that a LightControl has are missing.
    """
    prefix = prefix_of(shapes)
    found = {n.removeprefix(prefix): tuple(s) for n, s in shapes.items()}
    needed = [f"0.embedding.{k}.weight" for k in (0, 3, 6)]
    needed += [
        "0.mid_convs.1.weight",
        "0.time_embedding.linear_1.weight",
        "0.down_res.0.conv1.weight",
    ]
    missing = [n for n in needed if n not in found]
    if missing:
        raise ValueError(f"not a LightControl: lacks {missing}; it has {sorted(found)[:5]}")
    blocks = 1 + max(int(n.split(".")[0]) for n in found)
    if blocks > len(found):  # a number in a small file must not make us build a large model
        raise ValueError(f"not a LightControl: nets up to number {blocks}, {len(found)} tensors")
    levels = sum(n.startswith("0.down_res.") and n.endswith(".conv1.weight") for n in found)
    time_width, time_features = found["0.time_embedding.linear_1.weight"]
    return dict(
        stem=tuple(found[n][0] for n in needed[:3]),
        widths=tuple(found[f"0.down_res.{k}.conv1.weight"][0] for k in range(levels)),
        time_features=time_features,
        time_width=time_width,
        blocks=blocks,
        width=found["0.mid_convs.1.weight"][0],
        prefix=prefix,
    )


def sizes_of_ours(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The same of our parameters, to be written as X2I saves them."""
    convs = [f"nets/stem_convs/{k}/kernel" for k in range(3)]
    levels = sum(p.endswith("/conv1/kernel") for p in shapes)
    blocks, time_features, time_width = shapes["nets/time_in/in_layer/kernel"]
    return dict(
        stem=tuple(shapes[p][-1] for p in convs),
        widths=tuple(shapes[f"nets/down_res/{k}/conv1/kernel"][-1] for k in range(levels)),
        time_features=time_features,
        time_width=time_width,
        blocks=blocks,
        width=shapes["nets/out/kernel"][-1],
        prefix="module.",
    )
