"""The X2Edit step on the tiny family: one program for all aspect ratios, the same on any mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.x2edit import get_config
from x2jax import optim, recipes, sharding
from x2jax import state as states
from x2jax.step import make_step

BATCH = 8


def config():
    c = get_config()
    c.data, c.batch_size, c.held_out = "tiny:320", BATCH, BATCH
    c.image.buckets = "tiny-mixed"
    return c


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    return tmp_path_factory.mktemp("run")


def open_on(axes, count, workdir):
    mesh = sharding.make_mesh(axes, jax.devices()[:count])
    recipe = recipes.build(config(), workdir)
    by_path = sharding.param_shardings(recipe.skeleton.abstract, mesh)
    frozen = recipe.load_frozen(by_path)
    params = recipe.initial(0, by_path)
    return mesh, recipe, by_path, frozen, params


def noisy(params, by_path):
    """Trained-looking parameters: fresh up projections are zero and would hide most gradients."""
    rng = np.random.default_rng(0)
    return {
        p: jax.device_put(
            np.asarray(x) + 0.02 * rng.standard_normal(x.shape, np.float32), by_path[p]
        )
        for p, x in sorted(params.items())
    }


def loss_and_grads(axes, count, workdir):
    mesh, recipe, by_path, frozen, params = open_on(axes, count, workdir)
    batch = next(recipe.data.iterate(0))
    with jax.set_mesh(mesh):
        placed = sharding.put_batch(batch, sharding.batch_sharding(mesh))
        value = jax.jit(jax.value_and_grad(recipe.loss, has_aux=True))
        (loss, metrics), grads = value(noisy(params, by_path), frozen, placed, jax.random.key(3))
    return float(loss), metrics, jax.device_get(grads)


def test_four_devices_equal_one(workdir):
    loss_1, metrics_1, grads_1 = loss_and_grads({"fsdp": 1}, 1, workdir)
    loss_4, metrics_4, grads_4 = loss_and_grads({"data": 2, "fsdp": 2}, 4, workdir)
    assert loss_4 == pytest.approx(loss_1, rel=1e-5)
    assert float(metrics_4["contrastive"]) == pytest.approx(
        float(metrics_1["contrastive"]), rel=1e-5
    )
    # The layer norm after it takes a constant away: rounding is all that this gradient holds.
    assert np.abs(grads_1.pop("alignnet/conv/bias")).max() < 1e-7
    for path, grad in grads_1.items():
        scale = np.abs(grad).max()
        assert scale > 0, f"{path} has no gradient"
        np.testing.assert_allclose(grads_4[path] / scale, grad / scale, atol=1e-5, err_msg=path)


def test_moments_lie_where_their_parameters_lie(workdir):
    mesh, recipe, by_path, *_ = open_on({"data": 2, "fsdp": 2}, 4, workdir)
    tx = optim.build(steps=10, **config().optimizer)
    create = lambda p: states.create(p, tx, True)  # noqa: E731
    placed = states.shardings(jax.eval_shape(create, recipe.trainable_abstract), by_path, mesh)
    path = "adapter/double_blocks/img_attn/q/down"
    found = [
        where
        for keys, where in jax.tree_util.tree_leaves_with_path(placed)
        if getattr(keys[-1], "key", None) == path
    ]
    assert len(found) == 4, "parameter, average and two moments"
    assert all(where == by_path[path] for where in found)
    assert by_path[path].spec[1] == "fsdp"


def test_one_program_for_all_aspect_ratios(workdir):
    mesh, recipe, by_path, frozen, params = open_on({"fsdp": 1}, 1, workdir)
    tx = optim.build(steps=10, **config().optimizer)
    create = lambda p: states.create(p, tx, True)  # noqa: E731
    placed = states.shardings(jax.eval_shape(create, params), by_path, mesh)
    step = jax.jit(
        make_step(recipe.loss, tx, seed=0, ema_decay=0.9),
        in_shardings=(placed, {p: by_path[p] for p in frozen}, sharding.batch_sharding(mesh, None)),
        out_shardings=(placed, None),
    )
    with jax.set_mesh(mesh):
        state = jax.jit(create, out_shardings=placed)(params)
        seen, stream = set(), recipe.data.iterate(0)
        for _ in range(4):
            batch = next(stream)
            seen |= {tuple(s) for s in batch.sizes[:, 0].tolist()}
            _, counts = np.unique(batch.task, return_counts=True)
            assert (counts >= 2).all()
            stacked = jax.tree.map(lambda x: jnp.asarray(x)[None], batch)
            state, metrics = step(state, frozen, stacked)
            assert np.isfinite(float(metrics["loss"]))
            assert int(metrics["count_lonely"]) == 0
    assert len(seen) >= 10, "the batches mix aspect ratios"
    assert step._cache_size() == 1
    assert int(state.step) == 4
    moved = [p for p, x in state.params.items() if float(jnp.abs(x - params[p]).max()) > 0]
    assert {p.split("/")[0] for p in moved} == {"adapter", "alignnet"}
    for path, x in state.params.items():
        assert float(jnp.abs(state.ema[path] - x).max()) > 0 or path not in moved


def test_a_sample_alone_equals_a_sample_in_a_mixed_batch(workdir):
    """Flow loss of each sample does not depend on who shares its batch or on its padding."""
    _, recipe, by_path, frozen, params = open_on({"fsdp": 1}, 1, workdir)
    batch = next(recipe.data.iterate(0))
    model = recipe.skeleton.merge(noisy(params, by_path), frozen)
    encode = jax.jit(lambda m, b: m.encode(b, jax.random.key(0), 128, 16))

    def velocity(model, stream, b):
        txt, pooled = model.condition(b.text)
        half = jnp.full(b.task.shape, 0.5)
        task = model.adapter.task(b.task)
        return model.flux(
            stream, txt, pooled, half, half, adapters=model.adapter, task_BD=task
        ).velocity_BIC

    batch = jax.tree.map(jnp.asarray, batch)
    stream = encode(model, batch)
    together = jax.jit(velocity)(model, stream, batch)
    row = int(np.argmin(np.asarray(stream.roles_BI > 0).sum(1)))
    count = int((stream.roles_BI[row] > 0).sum())
    assert count < 128, "this sample is padded"
    one = jax.tree.map(lambda x: x[row : row + 1], (stream, batch))
    short = jax.tree.map(lambda x: x[:, :count], one[0])
    alone = jax.jit(velocity)(model, short, one[1])
    np.testing.assert_allclose(together[row, :count], alone[0], atol=1e-5)
