"""MoE-LoRA against a literal transcription of x2edit.md section 3, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from x2jax.adapters import X2EDIT, X2EDIT_TINY, AdapterConfig, Adapters, MoELoRA, moe_lora
from x2jax.adapters.moe_lora import drop_inputs, gate_scores, top_k_gate
from x2jax.flux import FLUX_DEV, FLUX_TINY, SOURCE, TARGET, Flux, ImageStream

B, L, D, E, R, O = 2, 7, 16, 5, 3, 12


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    shapes = dict(x=(B, L, D), task=(B, D), down=(D, E + 1, R), up=(E + 1, R, O))
    out = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
    return out | {k: rng.standard_normal((D, E)).astype(np.float32) for k in ("gx", "gt")}


def literal(a):
    """Experts one after another, the gate on concat(x, task), top-2 not renormalised."""
    a = {k: v.astype(np.float64) for k, v in a.items()}
    weights = np.concatenate([a["gx"], a["gt"]]).T  # (E, 2D), columns [x | task]
    y = np.zeros((B, L, O))
    for b in range(B):
        for n in range(L):
            logits = weights @ np.concatenate([a["x"][b, n], a["task"][b]])
            p = np.exp(logits - logits.max())
            p /= p.sum()
            for e in np.argsort(-p)[:2]:
                y[b, n] += p[e] * (a["x"][b, n] @ a["down"][:, e]) @ a["up"][e]
            y[b, n] += (a["x"][b, n] @ a["down"][:, -1]) @ a["up"][-1]
    return y


def ours(a, form):
    gate = top_k_gate(gate_scores(a["x"], a["task"], a["gx"], a["gt"]), 2)
    return moe_lora(a["x"], a["down"], a["up"], gate, top_k=2, form=form)


@pytest.mark.parametrize("form", ["static", "routed"])
def test_equals_the_definition(form):
    a = {k: jnp.asarray(v) for k, v in arrays().items()}
    expected = literal(arrays())
    scale = np.abs(expected).max()
    np.testing.assert_allclose(ours(a, form) / scale, expected / scale, atol=1e-6)


def test_static_and_routed_have_the_same_gradients():
    a = {k: jnp.asarray(v) for k, v in arrays().items()}
    static, routed = (
        jax.jit(jax.grad(lambda a, form=f: jnp.square(ours(a, form)).sum()))(a)
        for f in ("static", "routed")
    )
    for name in a:
        scale = float(jnp.abs(static[name]).max())
        assert scale > 0, name
        np.testing.assert_allclose(static[name] / scale, routed[name] / scale, atol=1e-5)


def test_gate_keeps_two_and_does_not_renormalise():
    a = arrays()
    p = gate_scores(*(jnp.asarray(a[k]) for k in ("x", "task", "gx", "gt")))
    gate = np.asarray(top_k_gate(p, 2))
    np.testing.assert_allclose(p.sum(-1), 1, rtol=1e-6)
    assert ((gate > 0).sum(-1) == 2).all()
    np.testing.assert_allclose(gate.sum(-1), np.sort(p, -1)[..., -2:].sum(-1), rtol=1e-6)
    assert (gate.sum(-1) < 0.999).any()


def test_plain_lora_is_the_shared_expert_alone():
    module = MoELoRA(
        D, O, experts=0, rank=R, top_k=2, scale=0.5, series=False, form="static",
        param_dtype=jnp.float32, rngs=nnx.Rngs(0),
    )  # fmt: skip
    a = arrays()
    module.up.set_value(jnp.asarray(a["up"][-1:]))
    expected = 0.5 * (a["x"] @ np.asarray(module.down[:, 0])) @ a["up"][-1]
    np.testing.assert_allclose(module(jnp.asarray(a["x"]), None), expected, rtol=1e-5, atol=1e-5)


def test_dropout_drops_the_experts_input():
    """As PEFT has it: B A drop(x), the mean kept; the gate reads all of x."""
    a = {k: jnp.asarray(v) for k, v in arrays().items()}
    module = MoELoRA(
        D, O, experts=E, rank=R, top_k=2, scale=1.0, series=False, form="static", dropout=0.4,
        param_dtype=jnp.float32, rngs=nnx.Rngs(0),
    )  # fmt: skip
    for name, value in (("down", "down"), ("up", "up"), ("gate_x", "gx"), ("gate_task", "gt")):
        getattr(module, name).set_value(a[value])
    np.testing.assert_array_equal(module(a["x"], a["task"]), ours(a, "static"))
    key = jax.random.key(3)
    module.drop_key = nnx.data(key)
    gate = top_k_gate(gate_scores(a["x"], a["task"], a["gx"], a["gt"]), 2)
    keep = jax.random.bernoulli(key, 0.6, a["x"].shape)
    expected = moe_lora(jnp.where(keep, a["x"] / 0.6, 0), a["down"], a["up"], gate)
    np.testing.assert_allclose(module(a["x"], a["task"]), expected, rtol=1e-5, atol=1e-5)
    many = jnp.ones((200, 100))
    assert float(drop_inputs(many, 0.4, key).mean()) == pytest.approx(1, abs=0.02)


def test_every_block_and_projection_drops_by_its_own_key():
    cfg = AdapterConfig(experts=0, tasks=0, series=(), rank=2, dropout=0.5)
    adapters = Adapters(cfg, FLUX_TINY, rngs=nnx.Rngs(0))
    adapters.drop(jax.random.key(0))
    keys = [
        jax.random.key_data(adapter.drop_key)
        for blocks in (adapters.double_blocks, adapters.single_blocks)
        for module in blocks.values()
        for adapter in module.values()
    ]
    rows = np.concatenate(keys)
    assert len(rows) == 4 * FLUX_TINY.double_blocks + 3 * FLUX_TINY.single_blocks
    assert len(np.unique(rows, axis=0)) == len(rows)
    off = Adapters(dataclasses.replace(cfg, dropout=0.0), FLUX_TINY, rngs=nnx.Rngs(0))
    off.drop(jax.random.key(0))
    assert off.double_blocks["img_attn"]["q"].drop_key is None
    with pytest.raises(ValueError, match=r"dropout 1.0 must be at least 0 and below 1"):
        AdapterConfig(dropout=1.0)


def test_initial_delta_is_zero_and_scales_are_as_published():
    adapters = Adapters(X2EDIT_TINY, FLUX_TINY, rngs=nnx.Rngs(0))
    q = adapters.double_blocks["img_attn"]["q"]
    assert float(jnp.abs(q.up[...]).max()) == 0
    assert abs(float(q.down[...].std()) * X2EDIT_TINY.rank - 1) < 0.02
    bound = 1 / np.sqrt(2 * FLUX_TINY.width)
    assert bound * 0.95 < float(jnp.abs(q.gate_x[...]).max()) <= bound
    assert abs(float(adapters.task_table.embedding[...].std()) - 1) < 0.1


def test_full_size_counts():
    state = nnx.state(nnx.eval_shape(lambda: Adapters(X2EDIT, FLUX_DEV, rngs=nnx.Rngs(0))))
    count = sum(x.size for x in jax.tree.leaves(state))
    assert count == 985_251_840 + 16 * 3072  # the published figure leaves the task table out


def build(cfg):
    adapters = Adapters(cfg, FLUX_TINY, rngs=nnx.Rngs(1))
    graph, state = nnx.split(adapters)
    keys = iter(jax.random.split(jax.random.key(2), 200))
    noise = lambda x: 0.1 * jax.random.normal(next(keys), x.shape)  # noqa: E731
    return nnx.merge(graph, jax.tree.map(noise, state))


@pytest.fixture(scope="module")
def flux():
    return Flux(FLUX_TINY, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


@jax.jit
def velocity(flux, adapters, img, txt):
    roles = jnp.broadcast_to(jnp.array([TARGET] * 4 + [SOURCE] * 4), (2, 8))
    positions = jnp.stack([jnp.zeros(8), jnp.arange(8), jnp.arange(8)], -1).astype(jnp.int32)
    stream = ImageStream(img, roles, jnp.broadcast_to(positions, (2, 8, 3)))
    task = None if adapters is None else adapters.task(jnp.array([1, 3]))
    half = jnp.full((2,), 0.5)
    out = flux(stream, txt, jnp.ones((2, 64)), half, half, adapters=adapters, task_BD=task)
    return out.velocity_BIC


@pytest.fixture(scope="module")
def inputs():
    rng = np.random.default_rng(0)
    shapes = (2, 8, 64), (2, 3, 128)
    return [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]


def test_forms_agree_in_the_model_and_the_adapters_matter(flux, inputs):
    static = velocity(flux, build(X2EDIT_TINY), *inputs)
    routed = velocity(flux, build(dataclasses.replace(X2EDIT_TINY, form="routed")), *inputs)
    np.testing.assert_allclose(static, routed, atol=1e-5)
    assert float(jnp.abs(static - velocity(flux, None, *inputs)).max()) > 1e-2


def test_untrained_adapters_leave_the_base_as_it_is(flux, inputs):
    fresh = Adapters(X2EDIT_TINY, FLUX_TINY, rngs=nnx.Rngs(1))
    np.testing.assert_array_equal(velocity(flux, fresh, *inputs), velocity(flux, None, *inputs))


def test_proj_is_in_series(flux, inputs):
    only = dict(double=("img_attn/proj",), single=(), experts=0, tasks=0, rank=4)
    series = build(AdapterConfig(**only))
    parallel = build(AdapterConfig(**only, series=()))
    assert (
        float(jnp.abs(velocity(flux, series, *inputs) - velocity(flux, parallel, *inputs)).max())
        > 1e-3
    )

    block = jax.tree.map(lambda x: x[0], flux.double_blocks)
    adapter = jax.tree.map(lambda x: x[0], series.double_blocks)["img_attn"]["proj"]
    from x2jax.flux.layers import project

    x = inputs[1]
    h = block.img_attn.proj(x)
    expected = h + (h @ adapter.down[:, 0]) @ adapter.up[0]
    np.testing.assert_allclose(
        project(block.img_attn.proj, x, {"proj": adapter}, "proj", None), expected, atol=1e-5
    )


def test_streams_that_are_adapted(flux):
    """In double blocks the text stream is not adapted; in single blocks all tokens are."""
    from x2jax.flux.layers import Attention

    seen = []
    original = Attention.qkv

    def spy(self, x, adapters, task):
        seen.append((x.shape[1], adapters is not None))
        return original(self, x, adapters, task)

    txt, img = jnp.ones((2, 3, 128)), jnp.ones((2, 8, 64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attention, "qkv", spy)
        velocity.__wrapped__(flux, build(X2EDIT_TINY), img, txt)
    assert set(seen) == {(8, True), (3, False), (11, True)}


def test_bad_configs_are_refused():
    with pytest.raises(ValueError, match=r"unknown projections.*img_attn/w"):
        AdapterConfig(double=("img_attn/w",), series=())
    with pytest.raises(ValueError, match="unknown form 'fast'"):
        AdapterConfig(form="fast")
    with pytest.raises(ValueError, match="top_k 9"):
        AdapterConfig(top_k=9, experts=4)
    adapters = build(X2EDIT_TINY)
    layer = jax.tree.map(lambda x: x[0], adapters.single_blocks)["attn"]["q"]
    with pytest.raises(ValueError, match="pass a task embedding"):
        layer(jnp.ones((1, 2, 128)), None)
