"""Plain LoRA to keys that diffusers, PEFT and ComfyUI read: `transformer.NAME.lora_A.weight`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from converters.lora import PLACES, sizes_of
from converters.lora_names import FluxSizes, Target, diffusers_targets
from converters.rules import WeightsError
from converters.safetensors_io import Spec

FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA in a folder."""
PREFIX = "transformer."


def exporter(params: Mapping[str, Any], flux: FluxSizes, scale: float = 1.0, dtype: Any = None):
    """What a PEFT file of a plain LoRA will hold: (name -> Spec, function that gives a tensor).

    Blocks and trailing ranks that are zero on both sides are left out. The scale goes into
    `lora_B`. Where ranks differ an `alpha` that equals the rank stands beside each LoRA: without
    it, readers take one rank's scale for all.

    Args:
      params: our path -> array, relative to `adapter/`.
      flux: sizes of the FLUX that it belongs to.
      scale: of the adapter, alpha / rank.
      dtype: of the tensors; None keeps the parameters' own.

    Raises:
      WeightsError: parameters that are no plain LoRA of this FLUX, or nothing but zeros.
    """
    host = {path: np.asarray(x) for path, x in params.items()}
    problems = _check(host, flux)
    targets = {} if problems else diffusers_targets(flux)
    found = {n: t for n, t in targets.items() if _halves(host, t, flux) is not None}
    if not found and not problems:
        problems = ["every projection is zero: there is nothing to write"]
    if problems:
        raise WeightsError("export of a plain LoRA", problems)
    specs: dict[str, Spec] = {}
    alphas: dict[str, int] = {}
    for name, target in found.items():
        a, b = _both(host, target, flux)
        for half, x in (("lora_A", a), ("lora_B", b)):
            specs[f"{PREFIX}{name}.{half}.weight"] = Spec(np.dtype(dtype or x.dtype), x.shape)
        alphas[f"{PREFIX}{name}.alpha"] = len(a)
    if len(set(alphas.values())) == 1:
        alphas = {}
    specs |= {name: Spec(np.dtype(np.float32), ()) for name in alphas}

    def read(name: str) -> np.ndarray:
        if name in alphas:
            return np.full((), alphas[name], np.float32)
        linear, half, _ = name.removeprefix(PREFIX).rsplit(".", 2)
        a, b = _both(host, found[linear], flux)
        if half == "lora_B" and scale != 1:
            b = b.astype(np.float32) * np.float32(scale)
        return (a if half == "lora_A" else b).astype(specs[name].dtype)

    return specs, read


def _check(params: Mapping[str, np.ndarray], flux: FluxSizes) -> list[str]:
    problems = []
    for path, x in params.items():
        place, _, half = path.rpartition("/")
        if place not in PLACES or half not in ("down", "up"):
            problems.append(f"no place: {path} {x.shape} is no part of a plain LoRA")
            continue
        blocks = flux.double_blocks if path.startswith("double") else flux.single_blocks
        ins, outs = sizes_of(place, flux)
        rank = x.shape[-1 if half == "down" else -2]
        expected = (blocks, ins, 1, rank) if half == "down" else (blocks, 1, rank, outs)
        if x.shape != expected:
            problems.append(
                f"mis-shaped: {path} is {x.shape}, expected {expected} for plain LoRA on this FLUX"
            )
        other = f"{place}/{'up' if half == 'down' else 'down'}"
        if other not in params:
            problems.append(f"missing: {other} beside {path}")
    return problems


def _halves(params, target: Target, flux: FluxSizes) -> list[tuple[np.ndarray, np.ndarray]] | None:
    """(lora_A, lora_B) of every part of a linear, rank 0 where there is none; None if all are."""
    out = []
    for path in target.paths:
        ins, outs = sizes_of(path, flux)
        if f"{path}/down" not in params:
            out.append((np.zeros((0, ins)), np.zeros((outs, 0))))
            continue
        down = params[f"{path}/down"][target.block, :, 0]
        up = params[f"{path}/up"][target.block, 0]
        used = np.flatnonzero(down.any(axis=0) | up.any(axis=1))
        rank = used[-1] + 1 if len(used) else 0
        out.append((down[:, :rank].T, up[:rank].T))
    return out if any(len(a) for a, _ in out) else None


def _both(params, target: Target, flux: FluxSizes) -> tuple[np.ndarray, np.ndarray]:
    """lora_A (rank, in) and lora_B (out, rank) of a linear.

    Fused inputs with the same up projection are one LoRA over all of them; otherwise each has
    ranks of its own, and lora_A is block-diagonal.
    """
    halves = _halves(params, target, flux)
    assert halves is not None
    downs, ups = zip(*halves, strict=True)
    if all(np.array_equal(ups[0], up) for up in ups[1:]):
        return np.concatenate(downs, axis=1), ups[0]
    rows, columns = zip(*(a.shape for a in downs), strict=True)
    a = np.zeros((sum(rows), sum(columns)), np.result_type(*(d for d in downs if len(d))))
    for k, down in enumerate(downs):
        row, column = sum(rows[:k]), sum(columns[:k])
        a[row : row + rows[k], column : column + columns[k]] = down
    return a, np.concatenate([up for up in ups if up.shape[1]], axis=1)
