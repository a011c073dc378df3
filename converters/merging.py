"""A plain LoRA added to the weights that it adapts: one model, which needs no adapter any more."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from converters import lora_files
from converters.load import open_weights
from converters.lora import open_lora
from converters.lora_names import FluxSizes
from converters.lora_scale import read_settings
from converters.rules import WeightsError
from converters.safetensors_io import Spec
from converters.save import Parameters
from x2jax.adapters import AdapterConfig
from x2jax.trained import Trained, open_trained
from x2jax.trees import fingerprint_of, spaced_out

STACKED = ("double_blocks", "single_blocks")
"""Children of a FLUX whose arrays have a row for each block."""


def open_adapter(
    path: Path, flux: FluxSizes, step: int | None = None, *, ema: bool = False
) -> Trained:
    """What a run trained, what import wrote, or a LoRA file in any community layout.

    Args:
      path: of it.
      flux: sizes of the FLUX.1 that it belongs to.
      step, ema: of a run, as `x2jax.trained.open_trained`.

    Raises:
      FileNotFoundError, ValueError: as `open_trained` and `open_lora`.
    """
    layout = lora_files.detect(path)
    if layout is None:
        return open_trained(path, step, ema=ema)
    if step is not None or ema:
        raise ValueError(f"{path} is not a run: it has neither steps nor a moving average")
    tensors = open_weights(path)
    lora = open_lora(tensors, layout, flux, settings=read_settings(path, tensors.metadata))
    lora_files.report(layout, lora)
    params = {f"adapter/{p}": lora.read(p) for p in lora.specs}
    prints = lora_files.recorded(tensors.metadata, path)
    config = {"adapter": dataclasses.asdict(lora.config)}
    return Trained(params, {"config": config, "fingerprints": prints})


def check_base(meta: Mapping[str, Any], base: Parameters, lora: Path, where: Path, anyway: bool):
    """Compares a base with what a LoRA says of the one that it was trained on.

    A run may have rounded its base to bfloat16 as it read it: that is the same base.

    Args:
      meta: of the LoRA; `fingerprints` where it has them.
      base: of a FLUX.1, paths relative to it.
      lora, where: paths of both, for the message.
      anyway: print instead of raising.

    Raises:
      WeightsError: it was trained on another base.
    """
    wanted = meta.get("fingerprints", {}).get("flux")
    if wanted is None:
        print(
            f"warning: {lora} does not say on which base it was trained: whether it was this one "
            "cannot be checked"
        )
        return
    found = _fingerprints(base)
    if wanted in found:
        return
    text = (
        f"{lora} was trained on another base: its fingerprint is {wanted}, that of {where} is "
        f"{' or '.join(found)}"
    )
    if not anyway:
        raise WeightsError("merge", [f"{text}. Name its own base, or give --any-base"])
    print(f"warning: {text}")


def _fingerprints(base: Parameters) -> list[str]:
    """Of a base in its own type, and rounded to bfloat16 if that makes a difference."""
    own, rounded = {}, {}
    for path, spec in base.specs.items():
        at = np.array(spaced_out(int(np.prod(spec.shape))))
        if path.split("/")[0] in STACKED:
            row, at = np.divmod(at, int(np.prod(spec.shape[1:])))
            pieces = [_values(base.read(path, (int(i),)), at[row == i]) for i in np.unique(row)]
            values = np.concatenate(pieces)
        else:
            values = _values(base.read(path, ()), at)
        base.release(path)
        own[path] = spec.shape, values
        rounded[path] = spec.shape, values.astype(ml_dtypes.bfloat16)
    return list(dict.fromkeys(map(fingerprint_of, (own, rounded))))


def _values(x: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Values of an array, which may be a transposed view of a file, at positions of it flat."""
    return x[np.unravel_index(at, x.shape)].astype(np.float32)


def merge_note(meta: Mapping[str, Any], scale: float) -> dict[str, Any]:
    """What the header of a merged file says of the run that went into it."""
    adapter = meta["config"]["adapter"]
    return {
        "scale": scale,
        "step": meta.get("step"),
        "rank": adapter["rank"],
        "alpha": adapter.get("alpha"),
        "fingerprints": meta.get("fingerprints", {}),
        "config": meta["config"],
    }


class Merged:
    """`Parameters` of a FLUX.1 with scale * delta added to each weight that a LoRA adapts.

    A parallel LoRA on y = x W gives W + s A B. One in series, y + (y A) B, gives W (1 + s A B), and
    so for the bias. Computed in float32, rounded to the type of the base once.

    Attributes:
      specs: our path -> type and shape, those of the base.
    """

    def __init__(
        self, base: Parameters, params: Mapping[str, Any], adapter: Mapping[str, Any], scale: float
    ):
        """Checks that the adapter can be added; reads nothing yet.

        Args:
          base: of a FLUX.1, paths relative to it.
          params: with `adapter/.../down` (blocks, in, 1, rank) and `.../up` (blocks, 1, rank, out).
          adapter: what `AdapterConfig.of` takes.
          scale: strength; the adapter's own alpha / rank comes on top.

        Raises:
          WeightsError: a MoE-LoRA, or an adapter of another FLUX.1; every offender is listed.
        """
        self.specs: dict[str, Spec] = base.specs
        cfg = AdapterConfig.of(adapter)
        self._base, self._series = base, set(cfg.series)
        self._scale = np.float32(scale * cfg.scale)
        heads = [p.removesuffix("/down") for p in params if p.endswith("/down")]
        self._pairs = {
            h.removeprefix("adapter/"): (params[f"{h}/down"], params[f"{h}/up"]) for h in heads
        }
        problems = []
        if cfg.experts or any("/gate_" in p for p in params):
            problems.append(
                "a MoE-LoRA cannot be folded into a weight: which experts act, and how strongly, "
                "differs from token to token and from task to task. Export it as x2edit"
            )
        elif not self._pairs:
            problems.append(f"no LoRA in it; it has {sorted(params)[:3]}")
        for name, (down, up) in () if problems else self._pairs.items():
            kernel = self.specs.get(f"{name}/kernel")
            expected = (down.shape[0], down.shape[1], up.shape[-1])
            if kernel is None:
                problems.append(f"unknown: the base has no {name}/kernel")
            elif kernel.shape != expected:
                problems.append(f"mis-shaped: {name}/kernel is {kernel.shape}, LoRA {expected}")
        if problems:
            raise WeightsError("merge", problems)

    def read(self, path: str, at: tuple[int | slice, ...]) -> np.ndarray:
        """`ours[path][at]`, with the delta."""
        value = self._base.read(path, at)
        name, _, leaf = path.rpartition("/")
        pair = self._pairs.get(name)
        series = name.split("/", 1)[-1] in self._series
        if pair is None or not (leaf == "kernel" or (leaf == "bias" and series)):
            return value
        if not at or not isinstance(at[0], int):
            return np.stack([self.read(path, (i,)) for i in range(self.specs[path].shape[0])])[at]
        down, up = (np.asarray(x[at[0]], np.float32) for x in pair)
        out = self._base.read(path, at[:1]).astype(np.float32)
        product = (out @ down[:, 0] if series else down[:, 0]) @ up[0]
        merged = (out + self._scale * product).astype(self.specs[path].dtype)
        return merged[at[1:]]

    def release(self, path: str) -> None:
        """Gives back what was mapped for an array."""
        self._base.release(path)
