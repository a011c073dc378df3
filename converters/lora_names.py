"""How community FLUX LoRA files name what they adapt (spec formats.md section 4).

A layout is a way to write names; what a name means comes from one of two tables: the linears of
diffusers' FLUX, or those of the original one, in which q, k, v (and the MLP) are fused.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from converters.flux_bfl import flux_bfl_table
from converters.flux_diffusers import FluxSizes, flux_table
from converters.rules import Table, WeightsError, expand


class Target(NamedTuple):
    """What the LoRA of one linear adapts.

    Attributes:
      paths: our projections, as `double_blocks/img_attn/q`; several where the linear is fused.
      block: their index; None outside the blocks.
      axis: of the linear's weight (out, in) along which they are fused, None where one is alone:
        0 cuts the up projection of the LoRA and 1 its down projection, exactly.
    """

    paths: tuple[str, ...]
    block: int | None = None
    axis: int | None = None


def diffusers_targets(flux: FluxSizes) -> dict[str, Target]:
    """Linears of `FluxTransformer2DModel` by name."""
    return _targets(flux_table(flux))


def bfl_targets(flux: FluxSizes) -> dict[str, Target]:
    """Linears of the original FLUX by name."""
    return _targets(flux_bfl_table(flux))


def _targets(table: Table) -> dict[str, Target]:
    """The linears of a base, from the rule table of its weights: a LoRA goes where they go."""
    out = {}
    for name, (rule, parts) in expand(table).items():
        if name.endswith(".weight") and parts[0].path.endswith("/kernel"):
            at = parts[0].at
            out[name.removesuffix(".weight")] = Target(
                tuple(p.path.removesuffix("/kernel") for p in parts),
                int(at[0]) if at and isinstance(at[0], int) else None,
                rule.split[0] if rule.split else None,
            )
    return out


def _xlabs_targets(flux: FluxSizes) -> dict[str, Target]:
    bfl, out = bfl_targets(flux), {}
    for i in range(flux.double_blocks):
        for k, s in ((1, "img"), (2, "txt")):
            for linear in ("qkv", "proj"):
                name = f"double_blocks.{i}.processor.{linear}_lora{k}"
                out[name] = bfl[f"double_blocks.{i}.{s}_attn.{linear}"]
    for i in range(flux.single_blocks):
        name = f"single_blocks.{i}.processor."
        linear1 = bfl[f"single_blocks.{i}.linear1"]
        out[f"{name}qkv_lora"] = linear1._replace(paths=linear1.paths[:3])
        out[f"{name}proj_lora"] = bfl[f"single_blocks.{i}.linear2"]
    return out


def _kohya_targets(flux: FluxSizes) -> dict[str, Target]:
    def flat(prefix, targets):
        return {f"{prefix}_{n.replace('.', '_')}": t for n, t in targets.items()}

    return flat("lora_unet", bfl_targets(flux)) | flat("lora_transformer", diffusers_targets(flux))


@dataclasses.dataclass(frozen=True)
class Layout:
    """One of the ways in which LoRA files are written.

    Attributes:
      name: on the command line.
      what: shown in help.
      sign: regular expression that finds a name of this layout.
      prefix: regular expression of what may stand before a target.
      targets: sizes of a FLUX -> its targets by name.
    """

    name: str
    what: str
    sign: str
    prefix: str
    targets: Callable[[FluxSizes], dict[str, Target]]

    def split(self, name: str) -> tuple[str, str]:
        """A tensor's name as (target, what of it): down, up, alpha, or another suffix as it is."""
        name = re.sub(f"^(?:{self.prefix})", "", name)
        for half, pattern in _HALVES.items():
            if found := re.fullmatch(rf"(.+)\.(?:{pattern})", name):
                return found[1], half
        target, _, rest = name.rpartition(".")
        return target, rest


_HALVES = {
    "down": r"lora_A(?:\.default)?\.weight|lora_down\.weight|lora\.down\.weight|down\.weight",
    "up": r"lora_B(?:\.default)?\.weight|lora_up\.weight|lora\.up\.weight|up\.weight",
    "alpha": r"alpha",
}
_BFL = r"(?:double|single)_blocks\.\d+\.(?:img_|txt_|linear|modulation)"
_LORA = r"lora(?:_[AB]|_down|_up|\.down|\.up)"

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "lora-peft",
            "LoRA of diffusers, PEFT and ai-toolkit: transformer_blocks.0.attn.to_q.lora_A.weight",
            rf"transformer_blocks\.\d+\.(?!attn\.processor).*\.{_LORA}|^transformer\..*\.{_LORA}",
            r"base_model\.model\.(?:transformer\.)?|transformer\.|diffusion_model\.",
            diffusers_targets,
        ),
        Layout(
            "lora-kohya",
            "LoRA of kohya's sd-scripts and OneTrainer: lora_unet_double_blocks_0_img_attn_qkv",
            r"^lora_(?:unet|transformer)_",
            r"",
            _kohya_targets,
        ),
        Layout(
            "lora-xlabs",
            "LoRA of XLabs: double_blocks.0.processor.qkv_lora1.down.weight",
            r"_blocks\.\d+\.processor\.(?:qkv|proj)_lora[12]?\.(?:down|up)\.weight",
            r"diffusion_model\.",
            _xlabs_targets,
        ),
        Layout(
            "lora-fal",
            "LoRA of fal's Kontext trainer: base_model.model.double_blocks.0.img_attn.qkv.lora_A",
            rf"^base_model\.model\.{_BFL}",
            r"base_model\.model\.",
            bfl_targets,
        ),
        Layout(
            "lora-bfl",
            "LoRA of Black Forest Labs and ComfyUI: double_blocks.0.img_attn.qkv.lora_A.weight",
            rf"^(?:diffusion_model\.)?{_BFL}.*\.{_LORA}",
            r"diffusion_model\.",
            bfl_targets,
        ),
    )
}

TEXT_ENCODERS = r"lora_te\d?_.*|text_encoder(?:_\d)?\..*|text_encoders\..*"
"""Names of LoRA parts for CLIP and T5: known, and left out."""

OTHER = {
    r"dora_scale|lora_magnitude_vector.*|weight_norm": "a DoRA rescales whole weights",
    r"lokr_.*|hada_.*|oft_.*|lora_mid.*|bundle_.*": "a LyCORIS form that is not a plain LoRA",
    r"diff|diff_b|set_weight": "a change of a whole weight or bias, not a LoRA",
    r"bias": "the adapters have no bias",
    r"scale": "a norm's scale, replaced outright",
}
"""Suffix of a tensor that belongs to no plain LoRA -> why not."""


def detect(names: Iterable[str]) -> Layout | None:
    """The layout of a file with these names; None if it is no FLUX LoRA of a known layout.

    Raises:
      WeightsError: names of several layouts in one file.
    """
    names = list(names)
    found = {
        layout: next((n for n in names if re.search(layout.sign, n)), None)
        for layout in LAYOUTS.values()
    }
    found = {layout: example for layout, example in found.items() if example}
    if len(found) > 1:
        raise WeightsError(
            "LoRA of several layouts",
            [
                f"{layout.name}: {example}; take one with --format {layout.name} and leave the "
                "others out with --ignore"
                for layout, example in found.items()
            ],
        )
    return next(iter(found), None)
