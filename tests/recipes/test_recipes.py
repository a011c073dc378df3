"""LoRA, LightControl and pre-training: exact resume, what trains, what full size needs."""

import importlib
import itertools
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image

from x2jax import recipes, sharding, train
from x2jax.adapters import PRESETS
from x2jax.checkpoint import load_trainable
from x2jax.edit import Editor


def small(name, arg=""):
    """A config of the tiny family that ends after four steps."""
    c = importlib.import_module(f"configs.{name}").get_config(arg).unlock()
    c.update(batch_size=4, held_out=4, data="tiny:96", steps=4, keep=9, log_every=1)
    c.checkpoint_every = c.sample_every = 2
    c.preview.steps = 1
    c.optimizer.warmup = 0
    return c


def logged(workdir):
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k != "samples_per_second"} for x in lines if "loss" in x]


def lora():
    c = small("lora", "pictures")
    c.adapter.update(preset="all", rank=2, dropout=0.2)
    return c


def lora_on_edits():
    c = small("lora")
    c.adapter.rank = 2
    c.image.buckets = "tiny-mixed"
    return c


def lightcontrol():
    c = small("lightcontrol")
    c.image.buckets = "tiny-mixed"
    return c


def pretrain():
    c = small("pretrain")
    c.model.update(double_blocks=1, single_blocks=2, width=32, heads=2, head_dim=16)
    c.model.axes = (4, 6, 6)
    return c


@pytest.mark.slow
@pytest.mark.parametrize("make", [lora, lora_on_edits, lightcontrol, pretrain])
def test_two_steps_and_two_more_equal_four(make, tmp_path):
    config, whole, cut = make(), tmp_path / "whole", tmp_path / "cut"
    train.train(config, whole)
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "4")
    train.train(config, cut)
    expected, _ = load_trainable(whole, 4)
    first, _ = load_trainable(whole, 0)
    found, _ = load_trainable(cut, 4)
    assert logged(cut) == logged(whole) and len(logged(cut)) == 4
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x, err_msg=path)
    moved = [p for p, x in expected.items() if (x != first[p]).any()]
    assert {p.split("/")[0] for p in moved} == {p.split("/")[0] for p in expected}
    assert (whole / "samples" / "0000004.png").exists()
    editor, source = Editor(whole), Image.new("RGB", (64, 48), "red")
    given, other = (None, source) if editor.draws else (source, None)
    assert editor(given, "a red circle on a meadow", steps=1).size in editor.buckets
    with pytest.raises(ValueError, match="give no image" if editor.draws else "give an image"):
        editor(other, "a red circle on a meadow")


def test_dropout_acts_in_training_alone(tmp_path):
    config = lora()
    recipe = recipes.build(config, tmp_path)
    by_path = sharding.param_shardings(
        recipe.skeleton.abstract, sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    )
    frozen = recipe.load_frozen(by_path)
    # Fresh up projections are zero and would hide what is dropped.
    params = {p: x + 0.05 for p, x in recipe.initial(0, by_path).items()}
    batch = jax.tree.map(np.asarray, recipe.data.held_out)
    flow = jax.jit(
        lambda key, train_key: recipe.flow_loss(
            params, frozen, batch, np.full(4, 0.5, np.float32), key, key, train_key
        )[0]
    )
    key = jax.random.key(0)
    runs = [flow(key, None), flow(key, jax.random.key(1)), flow(key, jax.random.key(2))]
    gaps = [float(np.abs(a - b).max()) for a, b in itertools.pairwise(runs)]
    assert min(gaps) > 1e-4
    np.testing.assert_array_equal(runs[1], flow(key, jax.random.key(1)))


COUNTS = {"attention": 19 * 8 + 38 * 3, "all": 19 * 8 + 38 * 4}
"""Square projections of FLUX.1-dev; a LoRA of rank r has 2 r x 3072 weights on each."""


@pytest.mark.parametrize("preset", PRESETS)
def test_full_size_lora(preset):
    config = importlib.import_module("configs.lora").get_config("pictures-1024").unlock()
    config.adapter.preset = preset
    recipe = recipes.outline(config)
    found = sum(x.size for x in recipe.trainable_abstract.values())
    mlp = {"attention": 0, "attention+mlp": 19 * 4 + 38, "all": 19 * 4 + 38 * 2}[preset]
    square = COUNTS.get(preset, COUNTS["attention"])
    assert found == 16 * (square * 2 * 3072 + mlp * 5 * 3072)


@pytest.mark.parametrize(
    ("name", "arg"),
    [
        ("lora", "1024"),
        ("lora", "pictures-1024"),
        ("lightcontrol", "1024"),
        ("pretrain", "further"),
    ],
)
def test_full_size_recipes_have_a_place_for_every_parameter(name, arg):
    config = importlib.import_module(f"configs.{name}").get_config(arg)
    recipe = recipes.outline(config)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    sharding.param_shardings(recipe.skeleton.abstract, mesh)
    batch = recipe.batch()
    assert batch.pixels.shape == (config.batch_size, config.image.slots, 1456, 1456, 3)
    cell = 16
    assert config.objective.tokens == 4096 * recipe.stream_slots()
    assert batch.pixels.shape[2] % cell == 0
    assert {x.shape[0] for x in jax.tree.leaves(batch)} == {config.batch_size}


def test_choices_that_do_not_exist_are_refused():
    config = lora()
    config.text.encoders = "t5"
    with pytest.raises(ValueError, match=r"unknown text.encoders 't5': use one of mllm, t5\+clip"):
        recipes.outline(config)
    config = lora()
    config.adapter.preset = "mlp"
    with pytest.raises(ValueError, match=r"unknown adapter.preset 'mlp': use one of attention, "):
        recipes.outline(config)
    config = lightcontrol()
    config.control.update(widths=(32, 32), groups=(4, 4))
    with pytest.raises(ValueError, match="makes a token of 16 px, this VAE one of 8 px"):
        recipes.outline(config)
    config = pretrain()
    config.model.text_width = 96
    with pytest.raises(ValueError, match="AlignNet"):
        recipes.build(config, None)
    config = pretrain()
    config.model.channels = 32
    with pytest.raises(ValueError, match="this VAE makes tokens of 64"):
        recipes.outline(config)


@pytest.mark.parametrize("name", ["lora", "lightcontrol", "pretrain"])
def test_unknown_stages_are_refused(name):
    with pytest.raises(ValueError, match=f"unknown stage '2048': use configs/{name}.py"):
        importlib.import_module(f"configs.{name}").get_config("2048")
