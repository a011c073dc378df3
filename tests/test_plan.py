"""The planner: shapes alone, and the full-size step for a TPU that is not here."""

import os
import re
import subprocess
import sys

import jax
import pytest

from configs import lora
from configs.x2edit import get_config
from x2jax import plan, recipes, sharding
from x2jax.trees import nbytes


def test_planning_needs_neither_weights_nor_data():
    config = get_config()
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    found = plan.plan(config, mesh)
    masters = nbytes(recipes.outline(config).trainable_abstract)
    # Parameters and two moments, half of them on each of the fsdp pair, and the frozen weights.
    assert found.arguments > 3 * masters / 2
    assert found.peak >= found.arguments
    text = plan.report(config, mesh, found)
    assert "peak" in text and "compare with your device" in text


def test_a_step_from_features_needs_no_encoders():
    config = get_config()
    config.trainable = (r"adapter/.*",)
    mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
    whole = recipes.outline(config)
    found = plan.plan(config, mesh, features=True)
    flux = {p: x for p, x in whole.skeleton.abstract.items() if p.startswith("flux/")}
    # Parameters with two moments, frozen weights, batch.
    trains, batch = whole.trainable_abstract, whole.from_features().batch()
    assert found.arguments == pytest.approx(3 * nbytes(trains) + nbytes([flux, batch]), rel=0.01)
    assert nbytes(whole.skeleton.abstract) > nbytes(trains) + 1.3 * nbytes(flux)
    assert found.without == ("vae", "mllm", "alignnet")
    assert "features     stand for vae, mllm, alignnet" in plan.report(config, mesh, found)


def test_features_stand_for_what_does_not_train():
    recipe = recipes.outline(get_config("1024")).from_features()
    assert {p.split("/")[0] for p in recipe.skeleton.paths} == {"flux", "adapter"}
    batch = recipe.batch()
    assert batch.pixels is None and batch.text.txt_BTD.shape == (32, 512, 4096)
    assert recipes.outline(get_config("512")).from_features().without == ("vae",)
    with pytest.raises(ValueError, match="the recipe 'lora' reads no features"):
        recipes.outline(lora.get_config()).from_features()


def test_unset_sources_mean_the_published_sizes():
    config = get_config("1024")
    recipe = recipes.outline(config)
    assert sum(x.size for x in recipe.trainable_abstract.values()) == 985_251_840 + 16 * 3072
    flux = sum(x.size for p, x in recipe.skeleton.abstract.items() if p.startswith("flux/"))
    assert flux == 11_901_408_320
    assert recipe.batch().pixels.shape[0] == config.batch_size


def test_unknown_topologies_are_refused_with_examples():
    with pytest.raises(ValueError, match=r"--topology=v5e:9x9.* named as v5e:2x4"):
        plan.topology_mesh("v5e:9x9", {"fsdp": -1})


@pytest.mark.slow
def test_the_full_size_1024_step_fits_eight_v5e_chips():
    command = "-m x2jax.plan --config configs/x2edit.py:1024 --topology v5e:2x4"
    done = subprocess.run(
        [sys.executable, *command.split(), "--config.batch_size=8"],
        env=os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    assert "8 x TPU v5 lite" in done.stdout and "of 16 GiB: fits" in done.stdout
    peak = re.search(r"peak +([\d.]+) GiB", done.stdout)
    assert peak and 8 < float(peak[1]) < 16
