"""The step: accumulation, averages, randomness, optimizers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from x2jax import optim
from x2jax import state as states
from x2jax.step import make_step

OPTIMIZER = dict(name="adamw", learning_rate=0.1, schedule="constant", warmup=0, clip=1e9)


def loss(params, frozen, batch, key):
    """A regression whose metrics show what the step averages and what it sums."""
    error = batch["x"] @ params["w"] * frozen["scale"] - batch["y"]
    value = jnp.square(error).mean()
    return value, {"draw": jax.random.uniform(key), "count_large": (jnp.abs(error) > 1).sum()}


def setup(accumulate: int, ema: bool = False):
    rng = np.random.default_rng(0)
    x, y = (
        rng.standard_normal((8, 3)).astype(np.float32),
        rng.standard_normal(8).astype(np.float32),
    )
    batches = {
        "x": x.reshape(accumulate, -1, 3),
        "y": y.reshape(accumulate, -1),
    }
    tx = optim.build(steps=10, **OPTIMIZER)
    state = states.create({"w": jnp.ones(3)}, tx, ema)
    return tx, state, batches, {"scale": jnp.float32(0.5)}


def test_accumulated_micro_batches_equal_the_whole_batch():
    results = []
    for accumulate in (1, 2, 4):
        tx, state, batches, frozen = setup(accumulate)
        step = jax.jit(make_step(loss, tx, seed=0, ema_decay=0.0))
        state, metrics = step(state, frozen, batches)
        results.append((state.params["w"], metrics))
    for params, metrics in results[1:]:
        np.testing.assert_allclose(params, results[0][0], rtol=1e-5)
        np.testing.assert_allclose(metrics["loss"], results[0][1]["loss"], rtol=1e-6)
        np.testing.assert_allclose(metrics["grad_norm"], results[0][1]["grad_norm"], rtol=1e-5)
        assert metrics["count_large"] == results[0][1]["count_large"], "counts are summed"


def test_randomness_is_a_function_of_seed_and_step():
    def draws(seed, start=0):
        tx, state, batches, frozen = setup(1)
        step = jax.jit(make_step(loss, tx, seed=seed, ema_decay=0.0))
        out = []
        for _ in range(3):
            state, metrics = step(state, frozen, batches)
            out.append(float(metrics["draw"]))
        return out

    assert draws(0) == draws(0)
    assert len({*draws(0), *draws(1)}) == 6


def test_the_average_follows_its_formula():
    tx, state, batches, frozen = setup(1, ema=True)
    step = jax.jit(make_step(loss, tx, seed=0, ema_decay=0.9))
    average = np.ones(3)
    for _ in range(4):
        state, _ = step(state, frozen, batches)
        average = 0.9 * average + 0.1 * np.asarray(state.params["w"])
    np.testing.assert_allclose(state.ema["w"], average, rtol=1e-6)
    assert int(state.step) == 4


def test_gradients_are_clipped_by_their_global_norm():
    tx = optim.build(steps=10, **OPTIMIZER | dict(clip=1.0))
    sgd = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    grads = {"a": jnp.full(4, 3.0), "b": jnp.full(9, 1.0)}
    updates, _ = sgd.update(grads, sgd.init(grads))
    assert float(optax.global_norm(updates)) == pytest.approx(1, rel=1e-6)
    assert jax.tree.structure(tx.init(grads)[0]) == jax.tree.structure(sgd.init(grads)[0])
