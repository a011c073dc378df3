"""FLUX.1 transformer weights as diffusers names them (spec formats.md section 1)."""

from typing import Protocol

from converters.rules import Part, Rule, T, Table, rule, swap_halves


class FluxSizes(Protocol):
    """What the table needs of a FLUX config."""

    double_blocks: int
    single_blocks: int
    width: int
    guidance: bool

    @property
    def mlp_width(self) -> int: ...


def flux_table(cfg: FluxSizes) -> Table:
    """Names of `FluxTransformer2DModel` and paths of `x2jax.flux.Flux`."""
    embedders = {"timestep_embedder": "time_in", "text_embedder": "vector_in"}
    if cfg.guidance:
        embedders["guidance_embedder"] = "guidance_in"
    rules = [
        *_linear("x_embedder", "img_in"),
        *_linear("context_embedder", "txt_in"),
        *_linear("proj_out", "final_layer/linear"),
        rule("norm_out.linear.weight", "final_layer/adaLN_modulation/kernel", swap_halves(0), T),
        rule("norm_out.linear.bias", "final_layer/adaLN_modulation/bias", swap_halves(0)),
    ]
    for theirs, ours in embedders.items():
        for k, layer in ((1, "in_layer"), (2, "out_layer")):
            rules += _linear(f"time_text_embed.{theirs}.linear_{k}", f"{ours}/{layer}")
    rules += _double(range(cfg.double_blocks))
    rules += _single(range(cfg.single_blocks), cfg.width, cfg.mlp_width)
    return Table("FLUX.1 transformer, diffusers", tuple(rules))


def _linear(name: str, path: str, **indices) -> list[Rule]:
    at = ("i",) if indices else ()
    return [
        rule(f"{name}.weight", f"{path}/kernel", T, at=at, **indices),
        rule(f"{name}.bias", f"{path}/bias", at=at, **indices),
    ]


def _double(blocks: range) -> list[Rule]:
    linears = {
        "norm1.linear": "img_mod/lin",
        "norm1_context.linear": "txt_mod/lin",
        "attn.to_q": "img_attn/q",
        "attn.to_k": "img_attn/k",
        "attn.to_v": "img_attn/v",
        "attn.to_out.0": "img_attn/proj",
        "attn.add_q_proj": "txt_attn/q",
        "attn.add_k_proj": "txt_attn/k",
        "attn.add_v_proj": "txt_attn/v",
        "attn.to_add_out": "txt_attn/proj",
        "ff.net.0.proj": "img_mlp/mlp_in",
        "ff.net.2": "img_mlp/mlp_out",
        "ff_context.net.0.proj": "txt_mlp/mlp_in",
        "ff_context.net.2": "txt_mlp/mlp_out",
    }
    norms = {
        "attn.norm_q": "img_attn/q_norm",
        "attn.norm_k": "img_attn/k_norm",
        "attn.norm_added_q": "txt_attn/q_norm",
        "attn.norm_added_k": "txt_attn/k_norm",
    }
    name, path = "transformer_blocks.{i}.", "double_blocks/"
    rules = [r for a, b in linears.items() for r in _linear(name + a, path + b, i=blocks)]
    return rules + _norms(norms, name, path, blocks)


def _single(blocks: range, width: int, mlp_width: int) -> list[Rule]:
    linears = {
        "norm.linear": "modulation/lin",
        "attn.to_q": "attn/q",
        "attn.to_k": "attn/k",
        "attn.to_v": "attn/v",
        "proj_mlp": "mlp/mlp_in",
    }
    norms = {"attn.norm_q": "attn/q_norm", "attn.norm_k": "attn/k_norm"}
    name, path = "single_transformer_blocks.{i}.", "single_blocks/"
    out = Rule(
        f"{name}proj_out.weight",
        (
            Part(f"{path}attn/proj/kernel", ("i",), (T,)),
            Part(f"{path}mlp/mlp_out/kernel", ("i",), (T,)),
        ),
        split=(1, (width, mlp_width)),
        indices={"i": blocks},
    )
    bias = rule(f"{name}proj_out.bias", f"{path}attn/proj/bias", at=("i",), i=blocks)
    rules = [r for a, b in linears.items() for r in _linear(name + a, path + b, i=blocks)]
    return [*rules, out, bias, *_norms(norms, name, path, blocks)]


def _norms(norms: dict[str, str], name: str, path: str, blocks: range) -> list[Rule]:
    return [
        rule(f"{name}{a}.weight", f"{path}{b}/scale", at=("i",), i=blocks) for a, b in norms.items()
    ]
