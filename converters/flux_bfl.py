"""FLUX.1 transformer weights as Black Forest Labs names them, in one file (spec formats.md 1)."""

import re
from collections.abc import Mapping
from typing import Any

from converters.flux_diffusers import FluxSizes
from converters.rules import Part, Rule, T, Table, WeightsError, rule
from x2jax.flux import FluxConfig

AXES = {128: (16, 56, 56)}
"""RoPE axes of the published head dim; the file does not hold them."""


def flux_bfl_table(cfg: FluxSizes) -> Table:
    """Names of the BFL file and paths of `x2jax.flux.Flux`.

    The file fuses q, k and v (and, in single blocks, the MLP's input); its modulations lie in our
    order, where diffusers swaps the halves of the last.
    """
    outer = ["img_in", "txt_in", "final_layer.linear"]
    for name in ("time_in", "vector_in", *(["guidance_in"] if cfg.guidance else [])):
        outer += [f"{name}.in_layer", f"{name}.out_layer"]
    rules = [r for name in outer for r in _linear(name, name.replace(".", "/"))]
    rules += _linear("final_layer.adaLN_modulation.1", "final_layer/adaLN_modulation")
    rules += _double(range(cfg.double_blocks), cfg.width)
    rules += _single(range(cfg.single_blocks), cfg.width, cfg.mlp_width)
    return Table("FLUX.1 transformer, BFL", tuple(rules))


def _linear(name: str, path: str, **indices) -> list[Rule]:
    at = ("i",) if indices else ()
    return [
        rule(f"{name}.weight", f"{path}/kernel", T, at=at, **indices),
        rule(f"{name}.bias", f"{path}/bias", at=at, **indices),
    ]


def _fused(name: str, paths: tuple[str, ...], sizes: tuple[int, ...], blocks: range) -> list[Rule]:
    """Linears that read one input, one below the other in one weight and one bias."""

    def one(kind: str, leaf: str, *ops) -> Rule:
        parts = tuple(Part(f"{p}/{leaf}", ("i",), ops) for p in paths)
        return Rule(f"{name}.{kind}", parts, split=(0, sizes), indices={"i": blocks})

    return [one("weight", "kernel", T), one("bias", "bias")]


def _norms(name: str, path: str, blocks: range) -> list[Rule]:
    names = {"query_norm": "q_norm", "key_norm": "k_norm"}
    return [
        rule(f"{name}.{a}.scale", f"{path}/{b}/scale", at=("i",), i=blocks)
        for a, b in names.items()
    ]


def _double(blocks: range, width: int) -> list[Rule]:
    rules = []
    for stream in ("img", "txt"):
        name, path = f"double_blocks.{{i}}.{stream}", f"double_blocks/{stream}"
        rules += _linear(f"{name}_mod.lin", f"{path}_mod/lin", i=blocks)
        qkv = tuple(f"{path}_attn/{x}" for x in "qkv")
        rules += _fused(f"{name}_attn.qkv", qkv, (width,) * 3, blocks)
        rules += _norms(f"{name}_attn.norm", f"{path}_attn", blocks)
        rules += _linear(f"{name}_attn.proj", f"{path}_attn/proj", i=blocks)
        rules += _linear(f"{name}_mlp.0", f"{path}_mlp/mlp_in", i=blocks)
        rules += _linear(f"{name}_mlp.2", f"{path}_mlp/mlp_out", i=blocks)
    return rules


def _single(blocks: range, width: int, mlp_width: int) -> list[Rule]:
    name, path = "single_blocks.{i}", "single_blocks"
    inputs = (*(f"{path}/attn/{x}" for x in "qkv"), f"{path}/mlp/mlp_in")
    outputs = tuple(Part(f"{path}/{x}/kernel", ("i",), (T,)) for x in ("attn/proj", "mlp/mlp_out"))
    return [
        *_fused(f"{name}.linear1", inputs, (width, width, width, mlp_width), blocks),
        Rule(f"{name}.linear2.weight", outputs, (1, (width, mlp_width)), {"i": blocks}),
        rule(f"{name}.linear2.bias", f"{path}/attn/proj/bias", at=("i",), i=blocks),
        *_norms(f"{name}.norm", f"{path}/attn", blocks),
        *_linear(f"{name}.modulation.lin", f"{path}/modulation/lin", i=blocks),
    ]


def blocks(names: Mapping[str, Any], kind: str) -> int:
    """How many blocks of a kind the names count; at most as many as there are names."""
    found = [int(m[1]) for n in names if (m := re.match(rf"{kind}_blocks\.(\d{{1,9}})\.", n))]
    return min(max(found, default=-1) + 1, len(names))


def sizes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Config of a BFL file, as diffusers writes it, from its shapes.

    Raises:
      WeightsError: not a FLUX.1, or a head dim that was never published.
    """
    needed = {
        "img_in.weight": 2,
        "txt_in.weight": 2,
        "vector_in.in_layer.weight": 2,
        "double_blocks.0.img_attn.norm.query_norm.scale": 1,
        "single_blocks.0.linear1.weight": 2,
    }
    missing = [f"missing: {n}" for n, d in needed.items() if len(shapes.get(n, ())) != d]
    if missing:
        raise WeightsError("not a FLUX.1 file of BFL's names", missing)
    width, channels = shapes["img_in.weight"]
    (head_dim,) = shapes["double_blocks.0.img_attn.norm.query_norm.scale"]
    if head_dim not in AXES:
        raise WeightsError(
            "FLUX.1 file of BFL's names",
            [
                f"head dim {head_dim}: no published FLUX.1 has it, and the RoPE axes are not in "
                "the file; give the config of the transformer with --config FILE"
            ],
        )
    try:
        return FluxConfig(
            double_blocks=blocks(shapes, "double"),
            single_blocks=blocks(shapes, "single"),
            width=width,
            heads=width // head_dim,
            head_dim=head_dim,
            axes=AXES[head_dim],
            text_width=shapes["txt_in.weight"][1],
            pooled_width=shapes["vector_in.in_layer.weight"][1],
            guidance="guidance_in.in_layer.weight" in shapes,
            channels=channels,
        ).to_diffusers()
    except ValueError as e:
        raise WeightsError("FLUX.1 file of BFL's names", [f"mis-shaped: {e}"]) from None
