"""Optimizers by name: sharded steps that resume exactly, rules on paths, schedules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.x2edit import get_config
from x2jax import optim, sharding
from x2jax import state as states
from x2jax.checkpoint import Checkpointer
from x2jax.step import make_step

Q, UP = "adapter/double_blocks/img_attn/q/down", "adapter/double_blocks/img_attn/q/up"
BIAS = "alignnet/fc/bias"
SHAPES = {Q: (3, 160, 2, 4), UP: (3, 2, 130, 128), BIAS: (6,)}
RATES = dict(adamw=1e-2, adafactor=1e-1, lion=1e-2, prodigy=1.0)


def make(name="adamw", **changes):
    config = optim.defaults(name=name, learning_rate=RATES.get(name, 1e-2), clip=1e9, **changes)
    return optim.build(steps=10, **config)


def params():
    rng = np.random.default_rng(0)
    return {p: jnp.asarray(rng.standard_normal(s), jnp.float32) for p, s in SHAPES.items()}


def loss(params, frozen, batch, key):
    """Towards `batch`, by a path that random draws bend: resume must restore the step too."""
    bent = 0.01 * jax.random.normal(key, ())
    value = sum(jnp.square(x - batch["aim"] - bent).sum() for x in params.values())
    return value, {}


def distance(found):
    """From the aim, in float64: Prodigy's first steps are 1e-6 long."""
    return sum(np.square(np.asarray(x, np.float64) - 3).sum() for x in found.values())


class Run:
    """Steps of one optimizer on four devices."""

    def __init__(self, name):
        self.mesh = sharding.make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
        shapes = {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in SHAPES.items()}
        self.by_path = sharding.param_shardings(shapes, self.mesh)
        self.tx = make(name)
        create = lambda p: states.create(p, self.tx, True)  # noqa: E731
        self.abstract = jax.eval_shape(create, shapes)
        self.placed = states.shardings(self.abstract, self.by_path, self.mesh)
        self.create = jax.jit(create, out_shardings=self.placed)
        self.jitted = jax.jit(
            make_step(loss, self.tx, seed=0, ema_decay=0.9),
            in_shardings=(self.placed, None, None),
            out_shardings=(self.placed, None),
            donate_argnums=0,
        )

    def go(self, state, steps):
        values = []
        for _ in range(steps):
            state, metrics = self.jitted(state, {}, {"aim": jnp.full((1, 1), 3.0)})
            values.append(float(metrics["loss"]))
        return state, values


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_sharded_steps_go_down_and_resume_exactly(name, tmp_path):
    run = Run(name)
    with jax.set_mesh(run.mesh):
        state = run.create({p: jax.device_put(x, run.by_path[p]) for p, x in params().items()})
        state, _ = run.go(state, 2)
        saver = Checkpointer(tmp_path, every=1, keep=1)
        saver.save(2, state, {}, force=True)
        whole, rest = run.go(state, 2)
        assert distance(whole.params) < distance(params())
        target = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
            run.abstract, run.placed,
        )  # fmt: skip
        restored, _ = saver.restore(2, target)
        resumed, again = run.go(restored, 2)
        saver.close()
    assert again == rest
    jax.tree.map(np.testing.assert_array_equal, whole, resumed)
    for x, s in zip(jax.tree.leaves(resumed), jax.tree.leaves(run.placed), strict=True):
        assert x.sharding.is_equivalent_to(s, x.ndim)


@pytest.mark.parametrize(("name", "copies"), [("adamw", 2), ("lion", 1), ("prodigy", 4)])
def test_moments_lie_where_their_parameters_lie(name, copies):
    run = Run(name)
    leaves = jax.tree_util.tree_leaves_with_path(run.placed.opt_state)
    found = [where for keys, where in leaves if getattr(keys[-1], "key", None) == Q]
    assert len(found) == copies
    assert all(where == run.by_path[Q] for where in found)
    assert run.by_path[Q].spec[1] == "fsdp"


def test_adafactors_rows_and_columns_keep_the_axes_that_they_have():
    run = Run("adafactor")
    shapes = dict(jax.tree_util.tree_leaves_with_path(run.abstract.opt_state))
    found = {}
    for keys, where in jax.tree_util.tree_leaves_with_path(run.placed.opt_state):
        if getattr(keys[-1], "key", None) == UP:
            found[shapes[keys].shape] = tuple(where.spec)
    spec = run.by_path[UP].spec
    assert spec[3] == "fsdp"
    assert found[3, 2, 128] == (None, spec[1], "fsdp")
    assert found[3, 2, 130] == (None, spec[1], None)


def test_decay_rules_say_what_decays():
    tx = make(decay=(r"adapter/.*",), adamw=dict(weight_decay=0.1))
    start = params()
    zeros = jax.tree.map(jnp.zeros_like, start)
    updates, _ = tx.update(zeros, tx.init(start), start)
    np.testing.assert_allclose(updates[Q], -1e-2 * 0.1 * start[Q], rtol=1e-6)
    assert not updates[BIAS].any()


@pytest.mark.parametrize("name", ["adamw", "lion", "adafactor"])
def test_multipliers_scale_the_learning_rate_of_a_path(name):
    start = params()
    rng = np.random.default_rng(1)
    grads = {p: jnp.asarray(rng.standard_normal(x.shape), jnp.float32) for p, x in start.items()}

    def update(tx):
        return tx.update(grads, tx.init(start), start)[0]

    plain = update(make(name))
    scaled = update(make(name, multipliers=((r".*/up", 0.25), (r"adapter/.*", 3.0))))
    for path, factor in ((Q, 3), (UP, 0.25), (BIAS, 1)):
        assert float(jnp.abs(plain[path]).max()) > 0
        np.testing.assert_allclose(scaled[path], factor * plain[path], rtol=1e-6)


def test_rules_that_match_nothing_are_refused():
    with pytest.raises(ValueError, match=r"optimizer.decay: \['flux/.*'\] match no parameter"):
        make(decay=(r"flux/.*",)).init(params())
    with pytest.raises(ValueError, match=r"optimizer.multipliers: \['flux/.*'\] match no"):
        make(multipliers=((r"flux/.*", 2.0),)).init(params())


def test_what_an_optimizer_cannot_do_is_refused():
    with pytest.raises(ValueError, match="one learning rate for all parameters"):
        make("prodigy", multipliers=((r".*", 2.0),))
    with pytest.raises(ValueError, match=r"set optimizer.decay .* or optimizer.prodigy.weight_dec"):
        make("prodigy", decay=(r".*/up",), prodigy=dict(weight_decay=0.1))
    make("prodigy", decay=(r".*/up",))
    with pytest.raises(ValueError, match=r"stand under no optimizer: write optimizer.lion.b1"):
        make("lion", b1=0.9)
    with pytest.raises(TypeError, match="nesterof"):
        make(adamw=dict(nesterof=True))


def test_options_are_optaxs_own_values():
    """Showing them in configs changes nothing."""
    start = params()
    grads = jax.tree.map(lambda x: 0.1 * x, start)
    for name, kind in optim.OPTIMIZERS.items():
        plain = kind.make(RATES[name])
        ours = make(name)
        expected = plain.update(grads, plain.init(start), start)[0]
        found = ours.update(grads, ours.init(start), start)[0]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, expected)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("constant", [0, 0.5, 1, 1, 1]),
        ("linear", [0, 0.5, 1, 0.5, 0]),
        ("cosine", [0, 0.5, 1, 0.5, 0]),
        ("wsd", [0, 0.5, 1, 1, 0]),
    ],
)
def test_schedules(name, values):
    schedule = optim.make_schedule(name, 1.0, 2, 6, cooldown=2)
    np.testing.assert_allclose([schedule(k) for k in (0, 1, 2, 4, 6)], values, atol=1e-6)


def test_schedules_without_warmup_or_plateau():
    schedule = optim.make_schedule("wsd", 1.0, 0, 4, cooldown=4)
    np.testing.assert_allclose([schedule(k) for k in range(5)], [1, 0.75, 0.5, 0.25, 0], atol=1e-6)
    assert optim.make_schedule("constant", 0.5, 0, 1)(0) == 0.5


def test_unknown_names_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown optimizer 'adam': use one of adamw"):
        make("adam")
    with pytest.raises(ValueError, match="unknown schedule 'step': use one of constant"):
        make(schedule="step")
    with pytest.raises(ValueError, match=r"needs more than 12 \(warmup\) steps, got 10"):
        make(schedule="cosine", warmup=12)
    with pytest.raises(ValueError, match=r"a cooldown of 1 to 8 steps .*, got 0"):
        make(schedule="wsd", warmup=2)


def test_configs_show_every_option():
    shown = get_config().optimizer
    assert set(shown) >= set(optim.OPTIMIZERS) | {"decay", "multipliers", "cooldown"}
