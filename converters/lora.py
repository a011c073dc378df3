"""Community FLUX LoRAs to plain-LoRA adapters of `x2jax.adapters`, exactly and as a whole.

Every projection has one rank here and every block a slot: what a file lacks is zero, which changes
nothing. Alpha goes into the up projections, fused linears are cut as the linear itself is.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from converters.lora_names import OTHER, TEXT_ENCODERS, FluxSizes, Layout, Target
from converters.lora_scale import scale_of
from converters.rules import WeightsError
from converters.safetensors_io import Spec, Tensors
from x2jax.adapters import AdapterConfig
from x2jax.adapters.config import DOUBLE_PROJECTIONS, SINGLE_PROJECTIONS

PLACES = {
    *(f"double_blocks/{p}" for p in DOUBLE_PROJECTIONS),
    *(f"single_blocks/{p}" for p in SINGLE_PROJECTIONS),
}
"""Projections that adapters can adapt."""


class Piece(NamedTuple):
    """The LoRA of one projection in one block.

    Attributes:
      target: name of the linear in the file.
      down, up: names of its tensors, (rank, in) and (out, rank).
      inputs, outputs: the columns of down and the rows of up that are this projection's.
      slots: which of the file's ranks are used; a fused linear may leave some unused.
      scale: alpha / rank.
    """

    target: str
    down: str
    up: str
    inputs: slice
    outputs: slice
    slots: np.ndarray
    scale: float


class Lora(NamedTuple):
    """A LoRA file that has been checked as a whole.

    Attributes:
      config: of the adapter; its scale is 1, alpha is in the weights.
      specs: our path -> type and shape of every array; paths relative to `adapter/`.
      read: gives an array by path.
      ignored: names left out on purpose.
      notes: what a user should know, a line each.
    """

    config: AdapterConfig
    specs: dict[str, Spec]
    read: Callable[[str], np.ndarray]
    ignored: list[str]
    notes: list[str]


def open_lora(
    tensors: Tensors,
    layout: Layout,
    flux: FluxSizes,
    *,
    settings: Mapping[str, Any] | None = None,
    ignore: Iterable[str] = (),
) -> Lora:
    """Matches a LoRA file with our projections before it is read.

    Args:
      tensors: of the file, by name.
      layout: how it names them.
      flux: sizes of the FLUX that it belongs to.
      settings: PEFT's `LoraConfig` as a dictionary, where there is one.
      ignore: regular expressions of names to leave out.

    Raises:
      WeightsError: every tensor that is unknown, has no place, lacks its other half or has a wrong
        shape or type; a file in which nothing is left, or nothing but zeros.
    """
    found, ignored, problems = _sort(tensors, layout, flux, tuple(ignore))
    pieces: dict[str, dict[int, Piece]] = {}
    for name, (target, halves) in found.items():
        wrong = _check(name, target, halves, tensors, flux)
        problems += wrong
        if wrong:
            continue
        try:
            alpha = tensors[halves["alpha"]].item() if "alpha" in halves else None
            scale = scale_of(name, tensors[halves["down"]].shape[0], alpha, settings)
        except ValueError as e:
            problems.append(str(e))
            continue
        for path, piece in _cut(name, target, halves, tensors, flux, scale):
            assert target.block is not None
            pieces.setdefault(path, {})[target.block] = piece
    if not found and not problems:
        problems.append(f"no tensor of {layout.name} in it: it would change nothing")
    elif not pieces and not problems:
        problems.append("every product of down and up is zero: it would change nothing")
    if problems:
        raise WeightsError(f"{layout.name} weights in {tensors.where}", problems)
    return _lora(pieces, tensors, flux, ignored)


def _sort(tensors: Tensors, layout: Layout, flux: FluxSizes, ignore: tuple[str, ...]):
    """Names by the linear they belong to: ({target name: (target, {half: name})}, ...)."""
    targets = layout.targets(flux)
    found: dict[str, tuple[Target, dict[str, str]]] = {}
    ignored, problems, used = [], [], set()
    for name, x in tensors.items():
        wanted = [p for p in ignore if re.fullmatch(p, name)]
        if wanted or re.fullmatch(TEXT_ENCODERS, name):
            used.update(wanted)
            ignored.append(name)
            continue
        target, half = layout.split(name)
        place = targets.get(target)
        reason = next((why for p, why in OTHER.items() if re.fullmatch(p, half)), None)
        if reason or (place and not set(place.paths) <= PLACES):
            what = reason or f"adapters do not adapt {place.paths[0] if place else target}"
            problems.append(f"no place: {name} {tuple(x.shape)}: {what}; --ignore leaves it out")
        elif place is None or half not in ("down", "up", "alpha"):
            problems.append(
                f"unknown: {name} {tuple(x.shape)} is not a tensor of {layout.name} for a FLUX of "
                f"{flux.double_blocks} double and {flux.single_blocks} single blocks"
            )
        elif half in found.setdefault(target, (place, {}))[1]:
            problems.append(f"ambiguous: {name} and {found[target][1][half]} are the same {half}")
        else:
            found[target][1][half] = name
    idle = [p for p in ignore if p not in used]
    problems += [f"--ignore {p} matches no name in the file" for p in idle]
    return found, ignored, problems


def sizes_of(path: str, flux: FluxSizes) -> tuple[int, int]:
    """Inputs and outputs of a projection."""
    wide_in, wide_out = path.endswith("/mlp_out"), path.endswith("/mlp_in")
    return (
        flux.mlp_width if wide_in else flux.width,
        flux.mlp_width if wide_out else flux.width,
    )


def _check(name: str, target: Target, halves: Mapping[str, str], tensors, flux) -> list[str]:
    missing = [half for half in ("down", "up") if half not in halves]
    if missing:
        there = ", ".join(halves.values())
        return [
            f"missing: the {half} projection of {name}; there is only {there}" for half in missing
        ]
    down, up = (tensors[halves[half]] for half in ("down", "up"))
    ins, outs = zip(*(sizes_of(p, flux) for p in target.paths), strict=True)
    inputs = sum(ins) if target.axis == 1 else ins[0]
    outputs = sum(outs) if target.axis == 0 else outs[0]
    problems = []
    for half, x in halves.items():
        if not _floating(tensors[x].dtype):
            problems.append(f"mis-typed: {x} is {tensors[x].dtype}, expected floating point")
        elif half == "alpha" and (tensors[x].size != 1 or not np.isfinite(tensors[x].item())):
            problems.append(f"mis-shaped: {x} {tensors[x].shape} should be one finite number")
    rank = down.shape[0] if down.ndim else 0
    for half, x, shape in (
        ("down", down, (rank, inputs)),
        ("up", up, (outputs, rank)),
    ):
        if tuple(x.shape) != shape or not rank:
            problems.append(
                f"mis-shaped: {halves[half]} is {tuple(x.shape)}, expected {shape} for "
                f"{', '.join(target.paths)}; is it a LoRA of another FLUX?"
            )
    return problems


def _floating(dtype) -> bool:
    try:
        return bool(ml_dtypes.finfo(dtype))
    except ValueError:
        return False


def _cut(name: str, target: Target, halves, tensors, flux, scale: float):
    """The pieces of a linear, by path. A piece that is zero is no piece."""
    down, up = tensors[halves["down"]], tensors[halves["up"]]
    at = [0, 0]
    for path in target.paths:
        ins, outs = sizes_of(path, flux)
        inputs, outputs = slice(at[0], at[0] + ins), slice(at[1], at[1] + outs)
        if target.axis is not None:
            at[1 - target.axis] += (outs, ins)[target.axis]
        slots = np.arange(len(down))
        if len(target.paths) > 1:
            # What is fused may be block-diagonal: each part then uses a share of the ranks.
            slots = slots[down[:, inputs].any(axis=1) & up[outputs].any(axis=0)]
        if len(slots) and scale and down.any() and up.any():
            yield path, Piece(name, halves["down"], halves["up"], inputs, outputs, slots, scale)


def _lora(pieces, tensors: Tensors, flux, ignored: list[str]) -> Lora:
    rank = max(len(p.slots) for blocks in pieces.values() for p in blocks.values())
    heads = {"double": DOUBLE_PROJECTIONS, "single": SINGLE_PROJECTIONS}
    kinds = {
        kind: tuple(p for p in projections if f"{kind}_blocks/{p}" in pieces)
        for kind, projections in heads.items()
    }
    config = AdapterConfig(experts=0, tasks=0, rank=rank, series=(), **kinds)
    specs: dict[str, Spec] = {}
    for kind, projections in kinds.items():
        count = getattr(flux, f"{kind}_blocks")
        for p in projections:
            path = f"{kind}_blocks/{p}"
            ins, outs = sizes_of(path, flux)
            types = _types(pieces[path].values(), tensors)
            specs[f"{path}/down"] = Spec(types[0], (count, ins, 1, rank))
            specs[f"{path}/up"] = Spec(types[1], (count, 1, rank, outs))

    def read(name: str) -> np.ndarray:
        path, _, half = name.rpartition("/")
        out = np.zeros(specs[name].shape, specs[name].dtype)
        for block, piece in pieces[path].items():
            r = len(piece.slots)
            if half == "down":
                x = tensors[piece.down][piece.slots, piece.inputs]
                out[block, :, 0, :r] = x.T
            else:
                out[block, 0, :r] = _scaled(tensors, piece).T
        return out

    return Lora(config, specs, read, ignored, _notes(pieces, flux, config))


def _scaled(tensors: Tensors, piece: Piece) -> np.ndarray:
    """The up projection of a piece with its scale in it, (out, rank)."""
    x = tensors[piece.up][piece.outputs, piece.slots]
    return x if piece.scale == 1 else x.astype(np.float32) * np.float32(piece.scale)


def _types(pieces: Iterable[Piece], tensors: Tensors) -> tuple[np.dtype, np.dtype]:
    """Types of down and up: the file's own, float32 where it mixes them or a scale needs it."""
    pieces = list(pieces)
    down = {tensors[p.down].dtype for p in pieces}
    up = {tensors[p.up].dtype for p in pieces}
    f32 = np.dtype(np.float32)
    of_up = up.pop() if len(up) == 1 else f32
    for piece in pieces:
        x = _scaled(tensors, piece)
        if of_up != f32 and not np.array_equal(x.astype(of_up).astype(np.float32), x):
            of_up = f32
            break
    return down.pop() if len(down) == 1 else f32, of_up


def _notes(pieces, flux: FluxSizes, config: AdapterConfig) -> list[str]:
    notes = []
    for kind, projections in (("double", config.double), ("single", config.single)):
        count = getattr(flux, f"{kind}_blocks")
        if not projections:
            notes.append(f"no {kind} block is adapted")
        for p in projections:
            absent = sorted(set(range(count)) - set(pieces[f"{kind}_blocks/{p}"]))
            if absent:
                notes.append(
                    f"{kind} blocks without {p}: {', '.join(map(str, absent))} (nothing is added)"
                )
    all_pieces = [p for blocks in pieces.values() for p in blocks.values()]
    ranks = sorted({len(p.slots) for p in all_pieces})
    if len(ranks) > 1:
        notes.append(f"ranks {ranks} are padded with zeros to {ranks[-1]}")
    scales = sorted({p.scale for p in all_pieces})
    if scales != [1]:
        shown = ", ".join(f"{s:g}" for s in scales[:5])
        notes.append(f"alpha / rank of {shown} goes into the up projections")
    return notes
