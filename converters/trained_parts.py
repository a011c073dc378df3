"""What a run trained besides adapters, in the format of its own: AlignNet, LightControl, FLUX.1."""

from collections.abc import Callable, Mapping
from typing import Any

from converters import alignnet, lightcontrol
from converters.formats import Format
from converters.rules import Shape
from x2jax import sources
from x2jax.flux import FluxConfig
from x2jax.trained import Trained
from x2jax.trees import child


def _flux(shapes: Mapping[str, Shape], run: Mapping[str, Any]) -> dict[str, Any]:
    if not run.get("scratch"):
        return sources.read_config(sources.folder(run["flux"], "flux", "flux") / "transformer")
    sizes = dict(run["model"])
    return FluxConfig(**sizes | {"axes": tuple(sizes["axes"])}).to_diffusers()


PARTS: dict[str, tuple[str, Callable[[Mapping[str, Shape], Mapping[str, Any]], dict]]] = {
    "alignnet": ("alignnet", lambda shapes, run: alignnet.sizes_of_ours(shapes)),
    "lightcontrol": ("control", lambda shapes, run: lightcontrol.sizes_of_ours(shapes)),
    "flux": ("flux", _flux),
}
"""Kind of format -> child of a model, and what finds its config in shapes and a run's config."""


def part_of(found: Trained, fmt: Format, where: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Config and parameters of what `fmt` holds, of a run.

    Args:
      found: what the run trained.
      fmt: of a kind in `PARTS`.
      where: the run, for messages.

    Raises:
      ValueError: the run trained nothing of that kind.
    """
    name, config = PARTS[fmt.kind]
    params = child(found.params, name)
    if not params:
        heads = ", ".join(sorted({p.split("/")[0] for p in found.params}))
        raise ValueError(f"{where} trained {heads}: it cannot be written as {fmt.name}")
    shapes = {p: tuple(x.shape) for p, x in params.items()}
    return config(shapes, found.meta["config"]), params
