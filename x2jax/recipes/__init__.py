"""Recipes: what trains, on what, towards what. The loop, step and checkpoints are shared.

A recipe is a `Recipe` in a file of its own and a config: docs/recipes.md writes one. Those that
ship have a name in `RECIPES`; a config names others by their dotted path.
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
    """The class of a recipe: a name here, or a dotted path such as `package.module.Class`.

    Raises:
      ValueError: no such recipe, or no such class.
    """
    if name not in RECIPES and "." not in name:
        raise ValueError(f"unknown recipe {name!r}: use one of {', '.join(RECIPES)}")
    module, _, cls = RECIPES.get(name, name).rpartition(".")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ModuleNotFoundError, AttributeError) as e:
        raise ValueError(f"--config.recipe={name}: {e}; is its folder in PYTHONPATH?") from e
    if not (isinstance(found, type) and issubclass(found, Recipe)):
        raise ValueError(f"--config.recipe={name} is no x2jax.recipes.base.Recipe")
    return found


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
