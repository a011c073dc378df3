"""The recipe that docs/recipes.md writes runs as it stands there."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

from x2jax import recipes, train

PAGE = Path(__file__).parents[2] / "docs" / "recipes.md"


def files():
    """Name -> contents of the files that the page shows."""
    text = PAGE.read_text()
    return dict(re.findall(r"`([\w]+\.py)`:\n\n```python\n(.*?)```", text, re.S))


@pytest.fixture
def written(tmp_path, monkeypatch):
    for name, source in files().items():
        (tmp_path / name).write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in files():
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_example_takes_one_file_and_one_config():
    found = files()
    assert list(found) == ["small_deltas.py", "small_deltas_config.py"]
    assert sum(len(source.splitlines()) for source in found.values()) <= 40


def test_the_example_runs(written):
    config = importlib.import_module("small_deltas_config").get_config().unlock()
    config.update(batch_size=4, held_out=4, data="tiny:96", steps=2, log_every=1, sample_every=9)
    config.preview.steps = 1
    config.adapter.rank = 2
    config.optimizer.warmup = 0  # or the first step would move nothing
    train.train(config.lock(), written / "run")
    lines = [json.loads(x) for x in (written / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [x for x in lines if "loss" in x]
    assert [x["step"] for x in steps] == [1, 2]
    assert steps[0]["delta"] == 0 and steps[1]["delta"] > 0, "up projections start at zero"
    for x in steps:
        assert x["loss"] == pytest.approx(x["flow"] + config.pull * x["delta"], rel=1e-5)


def test_recipes_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"no_such.Recipe: No module .* PYTHONPATH"):
        recipes.recipe_class("no_such.Recipe")
    with pytest.raises(ValueError, match=r"recipes.lora.AnyTexts: .* has no attribute"):
        recipes.recipe_class("x2jax.recipes.lora.AnyTexts")
    with pytest.raises(ValueError, match=r"is no x2jax.recipes.base.Recipe"):
        recipes.recipe_class("x2jax.recipes.lora.AdapterConfig")
    with pytest.raises(ValueError, match="unknown recipe 'loras': use one of "):
        recipes.recipe_class("loras")


def test_the_page_names_every_recipe_and_stage():
    text = PAGE.read_text()
    assert all(f"`{name}`" in text for name in recipes.RECIPES)
    for config, stages in re.findall(r"`configs/(\w+)\.py`((?:, `:[\w-]+`)*)", text):
        get_config = importlib.import_module(f"configs.{config}").get_config
        for stage in ["", *re.findall(r":([\w-]+)", stages)]:
            assert recipes.recipe_class(get_config(stage).recipe)
