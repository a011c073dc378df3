"""AlignNet, in the wrappings that it is published in; all of them are read as one."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from converters import alignnet
from converters.formats.base import DIFFUSERS, F32, Format, Part, by_shapes, shapes_of
from x2jax.alignnet import AlignNet, AlignNetConfig

read, _is_here = by_shapes(alignnet.sizes)


def parts(config: Mapping[str, Any]) -> list[Part]:
    """The one file of an AlignNet."""
    cfg = AlignNetConfig(**config)
    table = alignnet.alignnet_table(cfg.states, cfg.mixing)
    return [Part(DIFFUSERS, table, shapes_of(lambda: AlignNet(cfg, **F32, rngs=nnx.Rngs(0))))]


def _comfyui(config: Mapping[str, Any]) -> list[Part]:
    (part,) = parts(config)
    file = str(Path(part.file).with_suffix(".pt"))
    return [dataclasses.replace(part, file=file, beside=dict(config))]


FORMATS = (
    Format(
        "alignnet",
        "AlignNet state dict of X2I or X2Edit, in any wrapping; a file or its folder",
        read,
        parts,
        _is_here,
        kind="alignnet",
    ),
    Format(
        "alignnet-comfyui",
        'AlignNet as a pickle of {"config", "state_dict"}, as the ComfyUI release has it',
        read,
        _comfyui,
        lambda path: False,  # "alignnet" reads every wrapping
        kind="alignnet",
    ),
)
