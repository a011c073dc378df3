"""Objectives against their formulas, computed by hand in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from x2jax import flow, losses
from x2jax.flux.layers import DoubleTaps
from x2jax.sharding import make_mesh

TASKS = np.array([1, 1, 3, 3, 7])


def states(seed=0, batch=5, tokens=4, width=6):
    return np.random.default_rng(seed).standard_normal((batch, tokens, width)).astype(np.float32)


def is_target(batch=5, tokens=4):
    mask = np.ones((batch, tokens), bool)
    mask[1, 3:] = False
    return jnp.asarray(mask)


def gram_of(h, mask, stop_gradient=True):
    """What the probe sees of a block whose image stream is h."""
    return losses.GramProbe(mask, stop_gradient).double(DoubleTaps(h, h, h))


def run(h, *, stop_gradient=True, tasks=TASKS):
    mask = is_target(*h.shape[:2])
    gram = gram_of(h, mask, stop_gradient)
    stacked = jax.tree.map(lambda x: x[None], gram)
    return losses.contrastive_loss(stacked, jnp.asarray(tasks), stop_gradient=stop_gradient)


def by_hand(h, other):
    """The formula of x2edit.md section 4, term by term; `other` is the gathered side."""

    def unit(x):
        x = jnp.where(is_target()[..., None], x, 0).reshape(x.shape[0], -1)
        return x / jnp.sqrt((x**2).sum(1, keepdims=True))

    a, b = unit(h), unit(other)
    total = 0.0
    for i in range(5):
        s = [jnp.exp(-((a[i] - b[j]) ** 2).sum() / 0.5) for j in range(5)]
        s[i] = 1.0 + 0 * s[i]
        positive = sum((s[j] for j in range(5) if j != i and TASKS[j] == TASKS[i]), 0.0)
        total += -jnp.log((positive + 1e-8) / (sum(s) + 1e-8)) / 5
    return total


def test_contrastive_equals_the_formula_on_a_case_computed_by_hand():
    """Two orthogonal unit states of one task: d = 2, s = exp(-4), loss = -log(s / (1 + s))."""
    h = jnp.eye(2)[:, None]
    out = losses.contrastive_loss(
        jax.tree.map(lambda x: x[None], gram_of(h, jnp.ones((2, 1), bool))), jnp.zeros(2)
    )
    assert float(out.loss) == pytest.approx(-np.log(np.exp(-4) / (1 + np.exp(-4))), rel=1e-5)
    assert int(out.lonely) == 0


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_contrastive_and_its_gradient_equal_the_formula(stop_gradient):
    h = jnp.asarray(states())
    cut = jax.lax.stop_gradient if stop_gradient else (lambda x: x)
    ours = jax.value_and_grad(lambda h: run(h, stop_gradient=stop_gradient).loss)(h)
    hand = jax.value_and_grad(lambda h: by_hand(h, cut(h)))(h)
    assert float(ours[0]) == pytest.approx(float(hand[0]), rel=1e-5)
    np.testing.assert_allclose(ours[1], hand[1], atol=2e-5)
    assert float(jnp.abs(hand[1]).max()) > 1e-2


def test_gradients_through_the_gathered_side_differ():
    h = jnp.asarray(states())
    a, b = (jax.grad(lambda h, s=s: run(h, stop_gradient=s).loss)(h) for s in (True, False))
    assert float(jnp.abs(a - b).max()) > 1e-3


def test_lonely_anchors_are_counted_and_cost_about_eighteen():
    assert int(run(jnp.asarray(states())).lonely) == 1
    alone = run(jnp.asarray(states()), tasks=np.arange(5))
    assert int(alone.lonely) == 5
    assert 17.5 < float(alone.loss) < 19.5


def test_gram_on_a_mesh_equals_one_device():
    mesh = make_mesh({"data": 2, "fsdp": 2})
    h = jnp.asarray(states(batch=4, tokens=4, width=8))
    mask = is_target(4)
    tasks = jnp.array([1, 1, 2, 2])

    def loss(h):
        gram = gram_of(h, mask)
        return losses.contrastive_loss(jax.tree.map(lambda x: x[None], gram), tasks).loss

    expected = jax.jit(jax.value_and_grad(loss))(h)
    with jax.set_mesh(mesh):
        sharded = jax.device_put(h, NamedSharding(mesh, P(("data", "fsdp"))))
        compiled = jax.jit(jax.value_and_grad(loss)).lower(sharded).compile()
        value, grad = compiled(sharded)
    assert "all-to-all" in compiled.as_text()
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(grad, expected[1], atol=1e-5)


def test_flow_loss_ignores_sources_and_padding():
    v, t = (jnp.asarray(states(s)) for s in (0, 1))
    out = losses.flow_loss(v, t, is_target(), jnp.ones(5))
    np.testing.assert_allclose(out[0], np.square(v[0] - t[0]).mean(), rtol=1e-6)
    np.testing.assert_allclose(out[1], np.square(v[1, :3] - t[1, :3]).mean(), rtol=1e-6)


def test_sigma_grid():
    u = jnp.array([0.0, 0.0005, 0.0015, 0.9999])
    np.testing.assert_allclose(flow.sigma_from_u(u), [1.0, 1.0, 0.999, 0.001], rtol=1e-6)


@pytest.mark.parametrize("scheme", flow.DENSITIES)
def test_densities_stay_in_the_unit_interval(scheme):
    u = flow.sample_u(jax.random.key(0), (20_000,), scheme)
    assert float(u.min()) >= 0 and float(u.max()) <= 1
    assert abs(float(u.mean()) - 0.5) < 0.02
    # uniform has a standard deviation of 0.289; the named densities pull towards the middle or not
    spread = {"logit_normal": 0.208, "mode": None}.get(scheme, 0.2887)
    if spread:
        assert abs(float(u.std()) - spread) < 0.01
    weight = flow.weight(jnp.array([0.5]), scheme)
    assert float(weight[0]) == pytest.approx({"sigma_sqrt": 4, "cosmap": 4 / np.pi}.get(scheme, 1))


def test_unknown_density_is_refused():
    with pytest.raises(ValueError, match="unknown density scheme 'beta'"):
        flow.sample_u(jax.random.key(0), (1,), "beta")


def test_sampler_sigmas_equal_the_published_schedule():
    diffusers = pytest.importorskip("diffusers", reason="installed by make test")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for tokens in (256, 1024, 4096):
        mu = 0.5 + (tokens - 256) * 0.65 / 3840
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 28, 28), mu=mu)
        ours = flow.sample_sigmas(28, flow.shift_mu(tokens))
        np.testing.assert_allclose(ours, scheduler.sigmas.numpy(), atol=1e-6)
    assert float(flow.shift_mu(4096)) == pytest.approx(1.15)


def test_euler_is_exact_for_a_straight_flow():
    x0, noise = (jnp.asarray(states(s)) for s in (3, 4))
    sigmas = jnp.broadcast_to(flow.sample_sigmas(4, flow.shift_mu(1024)), (5, 5))
    out = flow.euler(lambda x, sigma: noise - x0, noise, sigmas)
    np.testing.assert_allclose(out, x0, atol=1e-5)
    np.testing.assert_allclose(flow.noised(x0, noise, jnp.ones(5)), noise, atol=1e-6)
