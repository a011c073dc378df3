"""AlignNet against a literal PyTorch transcription of x2i.md section 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from converters.alignnet import alignnet_table, sizes
from tests import parity
from x2jax.alignnet import RELEASED, AlignNet, AlignNetConfig
from x2jax.encoders.qwen2_5_vl import Qwen2_5_VL, QwenConfig

QWEN = QwenConfig(3, 32, 4, 2, 48, 40, False, (1, 1, 2))
F32 = dict(dtype=jnp.float32, param_dtype=jnp.float32)


class Mlp(torch.nn.Module):
    def __init__(self, width, text, pooled):
        super().__init__()
        self.layernorm = torch.nn.LayerNorm(width, eps=1e-6)
        self.projector = torch.nn.Sequential(
            torch.nn.Linear(width, text, bias=False),
            torch.nn.GELU(),
            torch.nn.Linear(text, text, bias=False),
        )
        self.fc = torch.nn.Sequential(torch.nn.GELU(), torch.nn.Linear(text, pooled))

    def forward(self, x):
        x = self.projector(self.layernorm(x))
        return x, self.fc(x).mean(1)


class Reference(torch.nn.Module):
    def __init__(self, cfg):
        super().__init__()
        if cfg.mixing == "conv":
            self.conv = torch.nn.Conv2d(cfg.states, 1, 5, padding=2)
        else:
            self.cha_scale = torch.nn.Parameter(torch.ones(1, cfg.states, 1, 1))
        self.mlp = Mlp(cfg.width, cfg.text_width, cfg.pooled_width)

    def forward(self, x):  # (B, N, T, H)
        x = self.conv(x)[:, 0] if hasattr(self, "conv") else (x * self.cha_scale).mean(1)
        return self.mlp(x)


@pytest.mark.parametrize("mixing", ["conv", "scale"])
def test_equals_the_transcription(mixing):
    cfg = AlignNetConfig(5, 12, text_width=20, pooled_width=6, mixing=mixing)
    reference = parity.randomise(Reference(cfg))
    source = parity.tensors(reference)
    assert AlignNetConfig(**sizes({k: v.shape for k, v in source.items()})) == cfg

    def make():
        return AlignNet(cfg, **F32, rngs=nnx.Rngs(0))

    ours = parity.fill(make, alignnet_table(cfg.states, mixing), source)
    x = np.random.default_rng(0).standard_normal((2, 5, 7, 12)).astype(np.float32)
    out = jax.jit(lambda m, x: m(x))(ours, jnp.asarray(x.swapaxes(0, 1)))

    def run():
        with torch.no_grad():
            return [y.numpy() for y in reference(torch.tensor(x))]

    exempt = {"conv.bias": "the layer norm takes a constant away"} if mixing == "conv" else {}
    parity.assert_every_weight_matters(reference, run, list(out), tol=1e-5, exempt=exempt)
    with pytest.raises(ValueError, match="takes 5 hidden states of width 12"):
        ours(jnp.zeros((4, 2, 7, 12)))


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("qwen2.5-vl-7b", 34.61),
        ("qwen2.5-vl-3b", 28.32),
        ("internvl2.5-4b", 28.32),
        ("internvl2.5-1b", 23.6),
        ("minicpm-o-2.6", 34.61),
    ],
)
def test_released_sizes(name, millions):
    cfg = RELEASED[name]
    state = nnx.state(nnx.eval_shape(lambda: AlignNet(cfg, **F32, rngs=nnx.Rngs(0))))
    assert sum(x.size for x in jax.tree.leaves(state)) / 1e6 == pytest.approx(millions, abs=0.01)


def conditioners(mixing):
    """(AlignNet's state, the model's state) -> scalar of the condition: stacked, and summed."""
    mllm = Qwen2_5_VL(QWEN, **F32, rngs=nnx.Rngs(0))
    align = AlignNet(AlignNetConfig(4, 32, 20, 6, mixing), **F32, rngs=nnx.Rngs(1))
    (of_mllm, states), (of_align, weights) = nnx.split(mllm), nnx.split(align)
    if mixing == "conv":
        weights.conv.bias.set_value(jnp.full((1,), 0.3))
    else:
        weights.cha_scale.set_value(jnp.array([0.5, -1.0, 2.0, 1.0]))
    ids = jnp.asarray(np.random.default_rng(0).integers(0, 40, (2, 9)))
    mask = jnp.arange(9) >= jnp.array([[3], [0]])
    cotangent = jax.random.normal(jax.random.key(0), (2, 9, 20))

    def scalar(how):
        def run(weights, states):
            align, mllm = nnx.merge(of_align, weights), nnx.merge(of_mllm, states)
            if how == "stacked":
                out = align(jax.lax.stop_gradient(mllm.hidden_states(ids, mask)))
            else:
                out = align.condition(mllm, ids, mask)
            return (out.txt_BTD * cotangent).sum() + jnp.sin(out.pooled_BP).sum()

        return run

    return scalar("stacked"), scalar("summed"), weights, states


@pytest.mark.parametrize("mixing", ["conv", "scale"])
def test_states_added_up_as_they_appear_equal_the_stack(mixing):
    stacked, summed, weights, states = conditioners(mixing)
    value, grads = jax.jit(jax.value_and_grad(stacked))(weights, states)
    ours, mine = jax.jit(jax.value_and_grad(summed))(weights, states)
    assert ours == pytest.approx(float(value), rel=1e-5)
    pairs = zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(mine), strict=True)
    for (path, x), y in pairs:
        name = jax.tree_util.keystr(path)
        if "conv" in name and "bias" in name:  # the layer norm takes a constant away
            continue
        scale = np.abs(x).max()
        assert scale > 0, name
        np.testing.assert_allclose(y / scale, x / scale, atol=1e-5, err_msg=name)
    into_mllm = jax.jit(jax.grad(summed, argnums=1))(weights, states)
    assert all(not np.any(x) for x in jax.tree.leaves(into_mllm))


def arrays_of(jaxpr):
    """Shapes of everything that a program computes, inside its loops too."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from arrays_of(inner)


def test_no_stack_of_states_is_kept_for_the_gradient():
    stacked, summed, weights, states = conditioners("conv")
    of_stack = {(QWEN.states, 2, 9, 32), (QWEN.layers, 2, 9, 32)}
    for run, expected in ((stacked, True), (summed, False)):
        program = jax.make_jaxpr(jax.grad(run))(weights, states)
        assert bool(of_stack & set(arrays_of(program.jaxpr))) == expected
