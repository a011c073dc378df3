"""The X2Edit trio: adapter, task table and AlignNet, side by side."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from converters import x2edit
from converters.alignnet import sizes_of_ours
from converters.formats import alignnet
from converters.formats.base import Format, Part, shapes_of, there
from converters.load import open_weights
from converters.rules import WeightsError
from x2jax.adapters import AdapterConfig, Adapters
from x2jax.flux import FLUX_DEV, FluxConfig


def _read(folder: Path) -> dict[str, Any]:
    missing = [f for f in (x2edit.LORA, x2edit.TASKS, x2edit.ALIGNNET) if not there(folder, f)]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)} (or their safetensors twins); an X2Edit adapter "
            f"is {x2edit.LORA}, {x2edit.TASKS} and {x2edit.ALIGNNET} side by side"
        )
    table = open_weights(there(folder, x2edit.TASKS))
    rows = {x.shape[0] for n, x in table.items() if n == "weight" and x.ndim == 2}
    if len(rows) != 1:
        raise WeightsError(
            f"weights in {table.where}",
            [f"expected one tensor, weight (tasks, width); found {sorted(table)[:5]}"],
        )
    lora = open_weights(there(folder, x2edit.LORA))
    return {
        "lora": x2edit.sizes({n: tuple(x.shape) for n, x in lora.items()}),
        "tasks": rows.pop(),
        "alignnet": alignnet.read(there(folder, x2edit.ALIGNNET)),
    }


def _parts(config: Mapping[str, Any]) -> list[Part]:
    lora, table = dict(config["lora"]), "task_table/embedding"
    flux = _flux_of(lora)
    cfg = adapter_config(config)
    shapes = shapes_of(lambda: Adapters(cfg, flux, rngs=nnx.Rngs(0)))
    rules = x2edit.lora_table(cfg, flux.double_blocks, flux.single_blocks, flux.width)
    rest = {p: s for p, s in shapes.items() if p != table}
    align = alignnet.parts(config["alignnet"])[0]
    return [
        Part(x2edit.LORA, rules, rest, "adapter", "bfloat16", metadata=None),
        Part(x2edit.TASKS, x2edit.task_table(), {table: shapes[table]}, "adapter"),
        dataclasses.replace(align, file=x2edit.ALIGNNET, prefix="alignnet"),
    ]


def _flux_of(lora: Mapping[str, Any]) -> FluxConfig:
    """A FLUX of the sizes that adapters depend on; its heads do not matter to them."""
    width = lora["width"]
    sizes = {k: lora[k] for k in ("double_blocks", "single_blocks", "width")}
    return dataclasses.replace(FLUX_DEV, **sizes, heads=1, head_dim=width, axes=(0, 0, width))


def adapter_config(config: Mapping[str, Any]) -> AdapterConfig:
    """The adapter that an X2Edit config describes."""
    lora = config["lora"]
    keys = ("experts", "rank", "double", "single")
    return AdapterConfig(
        **{k: tuple(v) if isinstance(v := lora[k], list) else v for k in keys},
        series=tuple(p for p in lora["double"] if p == "img_attn/proj"),
        tasks=config["tasks"],
    )


def x2edit_config(params: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a trained tree with children adapter/ and alignnet/, from its shapes.

    Raises:
      WeightsError: it is no MoE-LoRA, or the AlignNet is absent.
    """
    shapes = {p: tuple(x.shape) for p, x in params.items()}
    downs = {p: s for p, s in shapes.items() if p.startswith("adapter/") and p.endswith("/down")}
    needed = ("adapter/task_table/embedding", "alignnet/projector_in/kernel")
    missing = [p for p in needed if p not in shapes]
    if missing or not downs:
        raise WeightsError(
            "the X2Edit format", [f"missing: {p}" for p in missing or ("adapter/.../down",)]
        )
    _, width, slots, rank = next(iter(downs.values()))

    def projections(kind: str) -> dict[str, int]:
        head = f"adapter/{kind}_blocks/"
        return {
            p.removeprefix(head).removesuffix("/down"): s[0]
            for p, s in downs.items()
            if p.startswith(head)
        }

    double, single = projections("double"), projections("single")
    return {
        "lora": dict(
            experts=slots - 1,
            rank=rank,
            double=sorted(double),
            single=sorted(single),
            double_blocks=max(double.values(), default=0),
            single_blocks=max(single.values(), default=0),
            width=width,
        ),
        "tasks": shapes["adapter/task_table/embedding"][0],
        "alignnet": sizes_of_ours(
            {p.removeprefix("alignnet/"): s for p, s in shapes.items() if p.startswith("alignnet/")}
        ),
    }


FORMATS = (
    Format(
        "x2edit",
        f"folder of {x2edit.LORA}, {x2edit.TASKS} and {x2edit.ALIGNNET}, as X2Edit publishes",
        _read,
        _parts,
        lambda path: there(path, x2edit.LORA) is not None,
    ),
)
