"""The distillation recipe on the tiny family: gradients, meshes, data, refusals, planning."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.alignnet import get_config
from x2jax import optim, plan, recipes, sharding
from x2jax import state as states
from x2jax.alignnet import RELEASED
from x2jax.step import make_step
from x2jax.trees import child

BATCH = 8


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def config(**changes):
    c = get_config().unlock()
    c.update(dict(data="tiny:64", batch_size=BATCH, held_out=BATCH, steps=4) | changes)
    c.text.length, c.objective.size, c.optimizer.warmup = 48, 32, 0
    return c


def open_on(axes, count, workdir):
    mesh = sharding.make_mesh(axes, jax.devices()[:count])
    recipe = recipes.build(config(), workdir)
    by_path = sharding.param_shardings(recipe.skeleton.abstract, mesh)
    return mesh, recipe, recipe.load_frozen(by_path), recipe.initial(0, by_path)


def loss_and_grads(axes, count, workdir):
    mesh, recipe, frozen, params = open_on(axes, count, workdir)
    batch = next(recipe.data.iterate(0))
    with jax.set_mesh(mesh):
        placed = sharding.put_batch(batch, sharding.batch_sharding(mesh))
        value = jax.jit(jax.value_and_grad(recipe.loss, has_aux=True))
        (loss, metrics), grads = value(params, frozen, placed, jax.random.key(3))
    return float(loss), metrics, jax.device_get(grads)


def test_only_alignnet_trains_and_four_devices_equal_one(workdir):
    loss_1, metrics, grads_1 = loss_and_grads({"fsdp": 1}, 1, workdir)
    loss_4, _, grads_4 = loss_and_grads({"data": 2, "fsdp": 2}, 4, workdir)
    assert {p.split("/")[0] for p in grads_1} == {"alignnet"}
    assert loss_1 == pytest.approx(loss_4, rel=1e-5)
    kinds = [float(metrics[k]) for k in ("double_img", "double_txt", "single")]
    assert loss_1 == pytest.approx(sum(kinds), rel=1e-5) and min(kinds) > 0
    assert int(metrics["count_dropped"]) == 0
    scale = max(float(np.abs(g).max()) for g in grads_1.values())
    for path, grad in grads_1.items():
        np.testing.assert_allclose(grads_4[path], grad, atol=1e-5 * scale, err_msg=path)
        # The layer norm takes the convolution's bias away.
        assert np.abs(grad).max() > 0 or path == "alignnet/conv/bias"


def test_steps_lower_the_loss_on_captions_never_trained_on(workdir):
    mesh, recipe, frozen, params = open_on({"fsdp": 1}, 1, workdir)
    trained = [recipe.data.index.read(n) for b in (next(recipe.data.iterate(k)) for k in range(9))
               for n in b.sample_id]  # fmt: skip
    assert not set(recipe.data.held_out_instructions) & set(trained)
    tx = optim.build(steps=30, **recipe.config.optimizer)
    step = jax.jit(make_step(recipe.loss, tx, seed=0, ema_decay=0.0))
    held_out = jax.jit(recipe.held_out)
    with jax.set_mesh(mesh):
        state = states.create(params, tx, False)
        before = float(held_out(state.params, frozen, recipe.data.held_out)["held_out_loss"])
        stream = recipe.data.iterate(0)
        for _ in range(12):
            batch = jax.tree.map(lambda x: np.asarray(x)[None], next(stream))
            state, _ = step(state, frozen, batch)
        after = float(held_out(state.params, frozen, recipe.data.held_out)["held_out_loss"])
    assert after < 0.8 * before


def test_teacher_and_student_are_drawn_from_the_same_noise(workdir):
    mesh, recipe, frozen, params = open_on({"fsdp": 1}, 1, workdir)
    batch = recipe.data.held_out
    with jax.set_mesh(mesh):
        model = recipe.skeleton.merge(params, frozen)
        teacher = model.condition(batch.teacher)
        as_teacher = dataclasses.replace(batch, student=teacher)
        shown = recipe.preview(params, frozen, as_teacher)
        other = recipe.preview(params, frozen, batch)
    assert list(shown) == ["teacher", "student"]
    assert shown["teacher"].shape == (BATCH, 32, 32, 3)
    np.testing.assert_allclose(shown["student"], shown["teacher"], atol=1e-4)
    assert float(jnp.abs(other["student"] - other["teacher"]).mean()) > 1e-3


@pytest.mark.parametrize("stage", ["7b", "3b"])
def test_published_stages_say_how_to_get_what_they_need(stage, tmp_path):
    with pytest.raises(ValueError) as e:
        recipes.build(get_config(stage), tmp_path)
    for name in ("flux", "mllm", "data"):
        assert f"--config.{name}=...  " in str(e.value)
    assert str(e.value).count("hf download") == 3 and "captions" in str(e.value)


def test_a_release_must_fit_the_mllm(tmp_path):
    with pytest.raises(ValueError, match=r"released=internvl2\.5-1b is an AlignNet of 25 states"):
        recipes.build(config(released="internvl2.5-1b"), tmp_path)
    with pytest.raises(ValueError, match=r"--config\.released='x': use one of qwen2\.5-vl-7b, "):
        recipes.build(config(released="x"), tmp_path)


def test_planning_needs_neither_weights_nor_data():
    mesh = sharding.make_mesh({"fsdp": 2}, jax.devices()[:2])
    found = plan.plan(config(), mesh)
    assert found.peak >= found.arguments > 0


@pytest.mark.parametrize(("stage", "name"), [("7b", "qwen2.5-vl-7b"), ("3b", "qwen2.5-vl-3b")])
def test_outlines_have_the_published_sizes(stage, name):
    recipe = recipes.outline(get_config(stage))
    assert recipe.configs["alignnet"] == RELEASED[name]
    t5 = sum(x.size for x in child(recipe.skeleton.abstract, "t5").values())
    assert 4.7e9 < t5 < 4.8e9
    batch = recipe.batch()
    assert batch.teacher.t5_ids_BT.shape == batch.student.ids_BT.shape == (8, 512)
