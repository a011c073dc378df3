"""FLUX autoencoder weights: the `vae/` of a diffusers folder (`AutoencoderKL`)."""

from typing import Protocol

from converters.rules import CONV, Rule, T, Table, rule


class VAESizes(Protocol):
    """What the table reads of a configuration."""

    block_out_channels: tuple[int, ...]
    layers_per_block: int


def vae_table(cfg: VAESizes) -> Table:
    """Names of diffusers (left) and ours (right), for encoder and decoder.

    Args:
      cfg: `x2jax.encoders.vae.VAEConfig` or anything with its sizes.
    """
    widths = tuple(cfg.block_out_channels)
    rules = [
        *_ends("encoder"),
        *_mid("encoder"),
        *_levels("encoder.down_blocks", "down", widths, cfg.layers_per_block),
        *_ends("decoder"),
        *_mid("decoder"),
        *_levels("decoder.up_blocks", "up", widths[::-1], cfg.layers_per_block + 1),
    ]
    return Table("diffusers AutoencoderKL", tuple(rules))


def _weights(name: str, path: str, leaf: str, *ops) -> list[Rule]:
    """Weight and bias of one layer; `leaf` is our name of the weight."""
    return [
        rule(f"{name}.weight", f"{path}/{leaf}", *ops),
        rule(f"{name}.bias", f"{path}/bias"),
    ]


def _same(name: str, leaf: str, *ops) -> list[Rule]:
    return _weights(name, name.replace(".", "/"), leaf, *ops)


def _ends(side: str) -> list[Rule]:
    return [
        *_same(f"{side}.conv_in", "kernel", CONV),
        *_same(f"{side}.conv_norm_out", "scale"),
        *_same(f"{side}.conv_out", "kernel", CONV),
    ]


def _resnet(name: str, shortcut: bool = False) -> list[Rule]:
    rules = []
    for k in (1, 2):
        rules += _same(f"{name}.norm{k}", "scale") + _same(f"{name}.conv{k}", "kernel", CONV)
    return rules + (_same(f"{name}.conv_shortcut", "kernel", CONV) if shortcut else [])


def _mid(side: str) -> list[Rule]:
    theirs, ours = f"{side}.mid_block.attentions.0", f"{side}/mid_block/attention"
    rules = _resnet(f"{side}.mid_block.resnets.0") + _resnet(f"{side}.mid_block.resnets.1")
    rules += _weights(f"{theirs}.group_norm", f"{ours}/group_norm", "scale")
    for layer in ("to_q", "to_k", "to_v"):
        rules += _weights(f"{theirs}.{layer}", f"{ours}/{layer}", "kernel", T)
    return rules + _weights(f"{theirs}.to_out.0", f"{ours}/to_out", "kernel", T)


def _levels(name: str, kind: str, widths: tuple[int, ...], layers: int) -> list[Rule]:
    rules, before = [], widths[0]
    for i, width in enumerate(widths):
        for j in range(layers):
            rules += _resnet(f"{name}.{i}.resnets.{j}", shortcut=j == 0 and before != width)
        if i < len(widths) - 1:
            theirs = f"{name}.{i}.{kind}samplers.0.conv"
            ours = f"{name.replace('.', '/')}/{i}/{kind}sampler"
            rules += _weights(theirs, ours, "kernel", CONV)
        before = width
    return rules
