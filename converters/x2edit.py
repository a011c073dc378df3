"""The X2Edit trio (spec formats.md section 2): MoE-LoRA, task table and AlignNet, side by side."""

import re
from collections.abc import Mapping
from typing import Any, Protocol

from converters.rules import FULL, Part, Rule, T, Table, WeightsError, rule

LORA = "lora.safetensors"
TASKS = "task_embeddings.bin"
ALIGNNET = "diffusion_pytorch_model.bin"

DOUBLE = {
    "img_attn/q": "q_moe_lora",
    "img_attn/k": "k_moe_lora",
    "img_attn/v": "v_moe_lora",
    "img_attn/proj": "proj_moe_lora",
}
SINGLE = {"attn/q": "q_moe_lora", "attn/k": "k_moe_lora", "attn/v": "v_moe_lora"}
"""Projections that the format has a place for: ours, theirs."""


class AdapterSizes(Protocol):
    """What the tables need of an adapter config."""

    experts: int
    double: tuple[str, ...]
    single: tuple[str, ...]


def lora_table(cfg: AdapterSizes, double_blocks: int, single_blocks: int, width: int) -> Table:
    """Names of `lora.safetensors` and paths of `x2jax.adapters.Adapters`, task table apart.

    Args:
      cfg: the adapter's sizes.
      double_blocks, single_blocks, width: of the FLUX it belongs to.

    Raises:
      WeightsError: the adapter has parts that the format has no place for; all are listed.
    """
    problems = [
        f"double-block {p} has no name in it; it holds {tuple(DOUBLE)}"
        for p in cfg.double
        if p not in DOUBLE
    ]
    problems += [
        f"single-block {p} has no name in it; it holds {tuple(SINGLE)}"
        for p in cfg.single
        if p not in SINGLE
    ]
    if not cfg.experts:
        problems.append("a plain LoRA has no routed experts; this format is for MoE-LoRA")
    if problems:
        raise WeightsError("the X2Edit format", problems)
    rules = []
    for p in cfg.double:
        name = f"transformer_blocks.{{i}}.attn.processor.{DOUBLE[p]}."
        rules += _adapter(name, f"double_blocks/{p}/", cfg.experts, width, range(double_blocks))
    for p in cfg.single:
        name = f"single_transformer_blocks.{{i}}.attn.processor.{SINGLE[p]}."
        rules += _adapter(name, f"single_blocks/{p}/", cfg.experts, width, range(single_blocks))
    return Table(f"X2Edit {LORA}", tuple(rules))


def _adapter(name: str, path: str, experts: int, width: int, blocks: range) -> list[Rule]:
    each = dict(i=blocks, e=range(experts))
    gates = tuple(Part(path + g, ("i",), (T,)) for g in ("gate_x", "gate_task"))
    return [
        rule(f"{name}experts.{{e}}.down.weight", path + "down", T, at=("i", FULL, "e"), **each),
        rule(f"{name}experts.{{e}}.up.weight", path + "up", T, at=("i", "e"), **each),
        # The shared expert is our last one.
        rule(
            f"{name}shared_experts.down.weight", path + "down", T, at=("i", FULL, experts), i=blocks
        ),
        rule(f"{name}shared_experts.up.weight", path + "up", T, at=("i", experts), i=blocks),
        Rule(f"{name}gate.weight", gates, split=(1, (width, width)), indices=dict(i=blocks)),
    ]


def task_table(prefix: str = "") -> Table:
    """Name in `task_embeddings.bin` and path of the task table."""
    return Table(f"X2Edit {TASKS}", (rule(f"{prefix}weight", "task_table/embedding"),))


_NAME = re.compile(
    r"(single_)?transformer_blocks\.(\d+)\.attn\.processor\.([a-z]+_moe_lora)\."
    r"(experts\.(\d+)\.down|gate)\.weight"
)


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """What an adapter file says of its adapter and of the FLUX it belongs to.

    Returns:
      experts, rank, double and single (projections), double_blocks, single_blocks and width. What
      the names leave open the strict load of the tables decides.

    Raises:
      WeightsError: no MoE-LoRA in it.
    """
    found = [(m, shapes[name]) for name in shapes if (m := _NAME.fullmatch(name))]
    downs = [(m, s) for m, s in found if m[5] is not None and len(s) == 2]
    if not downs:
        raise WeightsError(
            "not an X2Edit adapter",
            [f"no tensor named like {LORA}'s; it has {sorted(shapes)[:3]}"],
        )
    rank, width = downs[0][1]
    kinds = {bool(m[1]) for m, _ in found}

    def names(table: Mapping[str, str], single: bool) -> tuple[str, ...]:
        there = {m[3] for m, _ in found if bool(m[1]) == single}
        return tuple(p for p, theirs in table.items() if theirs in there)

    def blocks(single: bool) -> int:
        return (
            1 + max(int(m[2]) for m, _ in found if bool(m[1]) == single) if single in kinds else 0
        )

    return dict(
        experts=1 + max(int(m[5]) for m, _ in downs),
        rank=rank,
        double=names(DOUBLE, False),
        single=names(SINGLE, True),
        double_blocks=blocks(False),
        single_blocks=blocks(True),
        width=width,
    )
