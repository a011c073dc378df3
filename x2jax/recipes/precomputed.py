"""What of a flow-matching recipe can be computed before training, and what must agree then."""

from pathlib import Path
from typing import Any

from x2jax import sources
from x2jax.data.features import META, read_meta
from x2jax.trained import open_trained
from x2jax.trees import Params, child, fingerprint

NONE = "none"
"""Value of `--config.features` that ignores features in the workdir."""
MOMENTS, TEXT = "moments", "text"


def folder(config: Any, workdir: Path) -> Path | None:
    """Where a run's features are: `config.features`, or features/ in its workdir; None without."""
    if config.features == NONE:
        return None
    if config.features:
        return Path(config.features).expanduser()
    default = workdir / "features"
    return default if (default / META).is_file() else None


def parts_of(recipe: Any) -> tuple[str, ...]:
    """What can be computed before: text features only where nothing that makes them trains.

    Raises:
      ValueError: the MLLM sees pictures, of which nothing computed before keeps the pixels.
    """
    if recipe.sees(recipe.config):
        raise ValueError(
            "an MLLM that sees pictures needs their pixels, which precomputed features lack: "
            f"--config.features={NONE} or --config.text.pictures=False"
        )
    heads = {p.split("/")[0] for p in recipe.trainable_abstract}
    return (MOMENTS,) if heads & set(recipe.conditioners) else (MOMENTS, TEXT)


def parts_at(recipe: Any, where: Path) -> tuple[str, ...]:
    """What of the features in a folder a run can use. Raises as `read_meta`."""
    return tuple(p for p in parts_of(recipe) if p in read_meta(where)["parts"])


def children(recipe: Any, parts: tuple[str, ...]) -> tuple[str, ...]:
    """Children that make these parts."""
    return tuple(n for p in parts for n in (("vae",) if p == MOMENTS else recipe.conditioners))


def given(config: Any, names: tuple[str, ...]) -> Params:
    """What `init_from` trained of some children: a later stage keeps it frozen."""
    if not config.init_from:
        return {}
    return open_trained(config.init_from, only=tuple(f"{n}/.*" for n in names)).params


def made_of(recipe: Any, parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """What parts of the features depend on, but for the samples; reads little of the weights."""
    config = recipe.config
    names = children(recipe, parts)
    trained = given(config, names)
    weights = {
        n: fingerprint(own) if (own := child(trained, n)) else sources.fingerprint(path)
        for n in names
        for path in [recipe.found[n].path]
    }
    precision = {f"precision.{k}": v for k, v in config.precision.items()}
    out: dict[str, dict[str, Any]] = {}
    if MOMENTS in parts:
        out[MOMENTS] = {"contents of vae": weights["vae"], **precision}
    if TEXT in parts:
        record = {f"text.{k}": v for k, v in recipe.tokenizer().record.items()}
        of = {f"contents of {n}": weights[n] for n in recipe.conditioners}
        pads = {"pad_attention of mllm": recipe.configs["mllm"].text.pad_attention}
        out[TEXT] = of | record | (pads if "mllm" in names else {}) | precision
    return out
