"""AlignNet files (spec formats.md section 3)."""

from collections.abc import Iterable, Mapping
from typing import Any

from converters.rules import CONV, T, Table, reshape, rule


def alignnet_table(states: int, mixing: str, prefix: str = "") -> Table:
    """Names of an AlignNet state dict and paths of `x2jax.alignnet.AlignNet`.

    Args:
      states: hidden states that are mixed.
      mixing: "conv" or "scale".
      prefix: "module." for files saved from a wrapped model.
    """
    if mixing == "conv":
        mix = [
            rule(f"{prefix}conv.weight", "conv/kernel", CONV),
            rule(f"{prefix}conv.bias", "conv/bias"),
        ]
    else:
        mix = [rule(f"{prefix}cha_scale", "cha_scale", reshape((1, states, 1, 1), (states,)))]
    rules = [
        *mix,
        rule(f"{prefix}mlp.layernorm.weight", "layernorm/scale"),
        rule(f"{prefix}mlp.layernorm.bias", "layernorm/bias"),
        rule(f"{prefix}mlp.projector.0.weight", "projector_in/kernel", T),
        rule(f"{prefix}mlp.projector.2.weight", "projector_out/kernel", T),
        rule(f"{prefix}mlp.fc.1.weight", "fc/kernel", T),
        rule(f"{prefix}mlp.fc.1.bias", "fc/bias"),
    ]
    return Table("AlignNet", tuple(rules))


def prefix_of(names: Iterable[str]) -> str:
    """ "module." if the names were saved from a wrapped model, otherwise ""."""
    names = list(names)
    return "module." if names and all(n.startswith("module.") for n in names) else ""


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of `AlignNetConfig`, read from the shapes of a state dict.

    Raises:
      ValueError: names that an AlignNet has are missing.
    """
    prefix = prefix_of(shapes)
    found = {n.removeprefix(prefix): tuple(s) for n, s in shapes.items()}
    needed = ("mlp.projector.0.weight", "mlp.fc.1.weight")
    missing = [n for n in needed if n not in found]
    if missing or not {"conv.weight", "cha_scale"} & found.keys():
        raise ValueError(
            f"not an AlignNet: lacks {missing or 'conv.weight or cha_scale'}; "
            f"it has {sorted(found)[:5]}"
        )
    text_width, width = found["mlp.projector.0.weight"]
    mixing = "conv" if "conv.weight" in found else "scale"
    states = found["conv.weight" if mixing == "conv" else "cha_scale"][1]
    pooled = found["mlp.fc.1.weight"][0]
    return dict(
        states=states, width=width, text_width=text_width, pooled_width=pooled, mixing=mixing
    )


def sizes_of_ours(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Arguments of `AlignNetConfig`, read from the shapes of our parameters."""
    width, text_width = shapes["projector_in/kernel"]
    mixing = "conv" if "conv/kernel" in shapes else "scale"
    states = shapes["conv/kernel"][2] if mixing == "conv" else shapes["cha_scale"][0]
    pooled = shapes["fc/kernel"][1]
    return dict(
        states=states, width=width, text_width=text_width, pooled_width=pooled, mixing=mixing
    )
