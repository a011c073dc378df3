"""What community files wrap weights in: prefixes, neighbours, and float8 with a scale a tensor."""

import json
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from converters.rules import WeightsError
from converters.safetensors_io import Tensors

CONFIG = "x2jax.config"
"""Header key under which our files hold what their shapes do not say."""
SCALES = (".weight_scale", ".scale_weight")
"""Ends of the names of a weight's scale; both are ComfyUI's, the second is the older."""
NOTES = (".input_scale", ".scale_input", ".comfy_quant")
"""Ends of names that only a float8 matrix product needs."""
MARKER = "scaled_fp8"
FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


def unwrap(tensors: Tensors, prefixes: tuple[str, ...], first: str) -> Tensors:
    """The tensors of one model in a file that may hold several, under their bare names.

    Args:
      tensors: of the whole file.
      prefixes: what may stand before the names of this model, "" among them.
      first: a name that the model certainly has.

    Returns:
      Its tensors; scales of float8 weights are in `.scales`, what was left out in `.ignored`.

    Raises:
      WeightsError: a scale without its weight, or of another shape than one number.
    """
    prefix = next((p for p in prefixes if p + first in tensors), "")
    found = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    ignored = [n for n in tensors if not n.startswith(prefix)]
    spans = {n.removeprefix(prefix): s for n, s in tensors.spans.items() if n.startswith(prefix)}
    scales, problems = {}, []
    for name in list(found):
        end = next((e for e in SCALES if name.endswith(e)), None)
        if end is not None:
            weight, scale = name.removesuffix(end) + ".weight", found.pop(name)
            if weight not in found:
                problems.append(f"unknown: {name} scales {weight}, which is not there")
            elif scale.size != 1:
                problems.append(
                    f"mis-shaped: {name} {tuple(scale.shape)}: one scale a tensor is supported"
                )
            elif found[weight].dtype in FLOAT8:
                scales[weight] = float(scale.reshape(()))
            elif float(scale.reshape(())) != 1:
                problems.append(f"{name} scales {weight}, which is {found[weight].dtype}")
        elif name == MARKER or name.endswith(NOTES):
            del found[name]
            ignored.append(prefix + name)
    if problems:
        raise WeightsError(f"weights in {tensors.where}", problems)
    return Tensors(
        found, tensors.where, tensors.metadata, spans=spans, scales=scales, ignored=ignored
    )


def noted_config(metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """The config that our own single files carry; None in files of others."""
    if CONFIG not in metadata:
        return None
    try:
        found = json.loads(metadata[CONFIG])
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise WeightsError("header metadata", [f"{CONFIG} is not a JSON object"])
    return found
