"""Recipes: what trains, on what, towards what. The loop, step and checkpoints are shared."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from jax.sharding import Mesh

NAMES = ("x2edit",)


def module(name: str) -> ModuleType:
    """The module of a recipe: `build` opens it, `outline` gives its shapes.

    Raises:
      ValueError: no such recipe.
    """
    if name not in NAMES:
        raise ValueError(f"unknown recipe {name!r}: use one of {', '.join(NAMES)}")
    return importlib.import_module(f"x2jax.recipes.{name}")


def build(config: Any, workdir: Path, mesh: Mesh) -> Any:
    """The recipe that `config.recipe` names, opened. Raises what its `build` raises."""
    return module(config.recipe).build(config, workdir, mesh)
