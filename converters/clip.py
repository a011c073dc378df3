"""CLIP's text model as transformers saves it: `text_encoder/` of a diffusers FLUX folder."""

from collections.abc import Iterable
from typing import Protocol

from converters.rules import Rule, T, Table, rule

PUBLISHED = "text_model."
"""What stands before every name in files; the modules of transformers 5 have nothing there."""


class CLIPSizes(Protocol):
    """What the table needs of a CLIP config."""

    layers: int


def clip_table(cfg: CLIPSizes, *, prefix: str = PUBLISHED) -> Table:
    """Names of a `CLIPTextModel` and paths of `CLIPText`.

    A whole CLIP is read too: its vision model and projections are left out.

    Args:
      cfg: sizes.
      prefix: what stands before every name, `PUBLISHED` or nothing.
    """
    layers = range(cfg.layers)
    layer = prefix + "encoder.layers.{i}."

    def norm(theirs: str, ours: str) -> list[Rule]:
        return [
            rule(f"{layer}{theirs}.weight", f"blocks/{ours}/scale", at=("i",), i=layers),
            rule(f"{layer}{theirs}.bias", f"blocks/{ours}/bias", at=("i",), i=layers),
        ]

    def linear(theirs: str, ours: str) -> list[Rule]:
        return [
            rule(f"{layer}{theirs}.weight", f"blocks/{ours}/kernel", T, at=("i",), i=layers),
            rule(f"{layer}{theirs}.bias", f"blocks/{ours}/bias", at=("i",), i=layers),
        ]

    rules = [
        rule(f"{prefix}embeddings.token_embedding.weight", "token_embedding/embedding"),
        rule(f"{prefix}embeddings.position_embedding.weight", "position_embedding/embedding"),
        rule(f"{prefix}final_layer_norm.weight", "final_norm/scale"),
        rule(f"{prefix}final_layer_norm.bias", "final_norm/bias"),
        *norm("layer_norm1", "norm1"),
        *norm("layer_norm2", "norm2"),
        *linear("self_attn.q_proj", "attn/q"),
        *linear("self_attn.k_proj", "attn/k"),
        *linear("self_attn.v_proj", "attn/v"),
        *linear("self_attn.out_proj", "attn/proj"),
        *linear("mlp.fc1", "mlp/mlp_in"),
        *linear("mlp.fc2", "mlp/mlp_out"),
    ]
    root = prefix.replace(".", r"\.")
    ignore = (
        root + r"embeddings\.position_ids",  # counts; older files keep them
        r"vision_model\..*",
        r"(text|visual)_projection\.weight",
        r"logit_scale",
    )
    return Table("CLIP text model, transformers", tuple(rules), ignore)


def prefix_of(names: Iterable[str]) -> str:
    """What stands before the names of a file, as `clip_table` takes it."""
    return "" if any(n.startswith(("embeddings.", "encoder.")) for n in names) else PUBLISHED
