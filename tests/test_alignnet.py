"""AlignNet against a literal PyTorch transcription of x2i.md section 1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from converters.alignnet import alignnet_table, sizes
from tests import parity
from x2jax.alignnet import AlignNet, AlignNetConfig


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
        return AlignNet(cfg, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))

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
    ("states", "width", "millions"), [(29, 3584, 34.61), (37, 2048, 28.32), (25, 896, 23.6)]
)
def test_published_sizes(states, width, millions):
    mixing = "scale" if states == 25 else "conv"
    cfg = AlignNetConfig(states, width, mixing=mixing)
    state = nnx.state(
        nnx.eval_shape(
            lambda: AlignNet(cfg, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))
        )
    )
    assert sum(x.size for x in jax.tree.leaves(state)) / 1e6 == pytest.approx(millions, abs=0.01)
