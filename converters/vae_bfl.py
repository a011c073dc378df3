"""FLUX autoencoder weights as Black Forest Labs names them: `ae.safetensors`."""

import re
from collections.abc import Mapping
from typing import Any

from converters.rules import CONV, Rule, Table, WeightsError, reshape, rule, transpose
from converters.vae_diffusers import VAESizes
from x2jax.encoders.vae import FLUX_VAE, VAEConfig


def vae_bfl_table(cfg: VAESizes) -> Table:
    """Names of the BFL file and paths of `x2jax.encoders.vae.VAE`.

    Its attention is made of 1x1 convolutions, and its up levels are numbered from the pixels.
    """
    widths = tuple(cfg.block_out_channels)
    last = len(widths) - 1
    down = [(f"encoder.down.{i}", f"encoder/down_blocks/{i}") for i in range(last + 1)]
    up = [(f"decoder.up.{last - i}", f"decoder/up_blocks/{i}") for i in range(last + 1)]
    rules = [
        *_side("encoder", widths[-1]),
        *_levels(down, "down", widths, cfg.layers_per_block),
        *_side("decoder", widths[-1]),
        *_levels(up, "up", widths[::-1], cfg.layers_per_block + 1),
    ]
    return Table("FLUX.1 autoencoder, BFL", tuple(rules))


def _weights(name: str, path: str, leaf: str, *ops) -> list[Rule]:
    """Weight and bias of one layer; `leaf` is our name of the weight."""
    return [
        rule(f"{name}.weight", f"{path}/{leaf}", *ops),
        rule(f"{name}.bias", f"{path}/bias"),
    ]


def _resnet(name: str, path: str, shortcut: bool = False) -> list[Rule]:
    rules = []
    for k in (1, 2):
        rules += _weights(f"{name}.norm{k}", f"{path}/norm{k}", "scale")
        rules += _weights(f"{name}.conv{k}", f"{path}/conv{k}", "kernel", CONV)
    if shortcut:
        rules += _weights(f"{name}.nin_shortcut", f"{path}/conv_shortcut", "kernel", CONV)
    return rules


def _side(side: str, width: int) -> list[Rule]:
    rules = [
        *_weights(f"{side}.conv_in", f"{side}/conv_in", "kernel", CONV),
        *_weights(f"{side}.norm_out", f"{side}/conv_norm_out", "scale"),
        *_weights(f"{side}.conv_out", f"{side}/conv_out", "kernel", CONV),
        *_resnet(f"{side}.mid.block_1", f"{side}/mid_block/resnets/0"),
        *_resnet(f"{side}.mid.block_2", f"{side}/mid_block/resnets/1"),
        *_weights(f"{side}.mid.attn_1.norm", f"{side}/mid_block/attention/group_norm", "scale"),
    ]
    linear = (reshape((width, width, 1, 1), (width, width)), transpose(1, 0))
    for theirs, ours in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out"}.items():
        path = f"{side}/mid_block/attention/{ours}"
        rules += _weights(f"{side}.mid.attn_1.{theirs}", path, "kernel", *linear)
    return rules


def _levels(
    names: list[tuple[str, str]], kind: str, widths: tuple[int, ...], layers: int
) -> list[Rule]:
    rules, before = [], widths[0]
    for i, ((name, path), width) in enumerate(zip(names, widths, strict=True)):
        for j in range(layers):
            shortcut = j == 0 and before != width
            rules += _resnet(f"{name}.block.{j}", f"{path}/resnets/{j}", shortcut)
        if i < len(widths) - 1:
            conv = f"{name}.{kind}sample.conv"
            rules += _weights(conv, f"{path}/{kind}sampler", "kernel", CONV)
        before = width
    return rules


_CONV1 = re.compile(r"encoder\.down\.(\d{1,4})\.block\.(\d{1,4})\.conv1\.weight")


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Config of a BFL autoencoder, as diffusers writes it, from its shapes.

    Groups, shift and scale are not in the file: they are FLUX.1's.

    Raises:
      WeightsError: not such a file, or widths that FLUX.1's groups do not divide.
    """
    what = "not an autoencoder of BFL's names"
    convs = {(int(m[1]), int(m[2])): shapes[n] for n in shapes if (m := _CONV1.fullmatch(n))}
    levels = {i: s[0] for (i, j), s in convs.items() if j == 0 and len(s) == 4}
    latent = shapes.get("decoder.conv_in.weight", ())
    missing = [] if len(latent) == 4 else ["missing: decoder.conv_in.weight"]
    if not levels or set(levels) != set(range(len(levels))):
        missing.append(f"missing: a level of encoder.down; there are {sorted(levels)[:8]}")
    if missing:
        raise WeightsError(what, missing)
    try:
        return VAEConfig(
            block_out_channels=tuple(levels[i] for i in range(len(levels))),
            layers_per_block=sum(i == 0 for i, _ in convs),
            norm_num_groups=FLUX_VAE.norm_num_groups,
            latent_channels=latent[1],
        ).to_diffusers()
    except ValueError as e:
        raise WeightsError(
            "autoencoder of BFL's names",
            [f"{e}; the groups are not in the file: give the VAE's config with --config FILE"],
        ) from None
