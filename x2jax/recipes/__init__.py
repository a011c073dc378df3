"""Recipes: what trains, on what, towards what. The loop, step and checkpoints are shared.

A recipe is a `Recipe` in a file of its own, its name in `RECIPES`, and a config.
"""

import importlib
from pathlib import Path
from typing import Any

from x2jax.recipes.base import Recipe

RECIPES = {
    "alignnet": "x2jax.recipes.alignnet.Distil",
    "lightcontrol": "x2jax.recipes.lightcontrol.LightControl",
    "lora": "x2jax.recipes.lora.LoRA",
    "pretrain": "x2jax.recipes.pretrain.Pretrain",
    "x2edit": "x2jax.recipes.x2edit.X2Edit",
}
"""Name in configs -> class."""


def recipe_class(name: str) -> type[Recipe]:
    """The class of a recipe.

    Raises:
      ValueError: no such recipe.
    """
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}: use one of {', '.join(RECIPES)}")
    module, _, cls = RECIPES[name].rpartition(".")
    return getattr(importlib.import_module(module), cls)


def build(config: Any, workdir: Path) -> Recipe:
    """The recipe that `config.recipe` names, with its data: ready to train; no weights loaded yet.

    Raises:
      ValueError, FileNotFoundError, TypeError: sources that are unset, missing or do not fit, and
      config keys that do not exist.
    """
    cls = recipe_class(config.recipe)
    cls.require(config)
    recipe = cls.open(config).with_precomputed(workdir)
    recipe.data = recipe.open_data(workdir)
    return recipe


def outline(config: Any) -> Recipe:
    """The recipe of a config from shapes alone, for planning: see `Recipe.outline`."""
    return recipe_class(config.recipe).outline(config)
