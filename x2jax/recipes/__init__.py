"""Recipes: what trains, on what, towards what. The loop, step and checkpoints are shared."""

import importlib
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

NAMES = ("x2edit",)


def build(config: Any, workdir: Path, mesh: Mesh) -> Any:
    """The recipe that `config.recipe` names, opened.

    Raises:
      ValueError: no such recipe.
    """
    if config.recipe not in NAMES:
        raise ValueError(f"unknown recipe {config.recipe!r}: use one of {', '.join(NAMES)}")
    return importlib.import_module(f"x2jax.recipes.{config.recipe}").build(config, workdir, mesh)
