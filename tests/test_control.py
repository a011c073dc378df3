"""LightControl against torch modules written from the specification, through the shipped table."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.resnet import Downsample2D, ResnetBlock2D
from flax import nnx
from torch import nn

from converters.flux_diffusers import flux_table
from converters.lightcontrol import control_table, sizes, sizes_of_ours
from tests import parity
from x2jax import sharding
from x2jax.control import LIGHT_CONTROL, ControlConfig, LightControl
from x2jax.flux import FLUX_DEV, FLUX_TINY, PAD, SOURCE, TARGET, Flux, ImageStream
from x2jax.trees import Skeleton, prefixed

SMALL = ControlConfig((4, 6, 8), (8, 16), (4, 8), time_features=12, time_width=10)
FLUX = dataclasses.replace(
    FLUX_TINY, width=24, heads=2, head_dim=12, axes=(4, 4, 4), double_blocks=2, single_blocks=1,
    text_width=16, pooled_width=12, channels=8,
)  # fmt: skip
T = np.array([0.3, 0.937], np.float32)


class Reference(nn.Module):
    """One control net, in the published order of layers and under the published names."""

    def __init__(self, cfg: ControlConfig, width: int):
        super().__init__()
        self.time_proj = Timesteps(cfg.time_features, True, 0)
        self.time_embedding = TimestepEmbedding(cfg.time_features, cfg.time_width)
        stem, before = [], 3
        for k, after in enumerate(cfg.stem):
            stem += [nn.Conv2d(before, after, 3, 1 if k else 2, 1), nn.GroupNorm(2, after)]
            stem.append(nn.ReLU())
            before = after
        self.embedding = nn.Sequential(*stem)
        self.down_res, self.down_sample = nn.ModuleList(), nn.ModuleList()
        for after, groups in zip(cfg.widths, cfg.groups, strict=True):
            sizes = dict(in_channels=before, out_channels=after, groups=groups)
            self.down_res.append(ResnetBlock2D(**sizes, temb_channels=cfg.time_width))
            self.down_sample.append(Downsample2D(after, use_conv=True, padding=1, name="op"))
            before = after
        pair = nn.Sequential(
            nn.Conv2d(before, before, 3, padding=1),
            nn.ReLU(),
            nn.GroupNorm(8, before),
            nn.Conv2d(before, before, 3, padding=1),
            nn.GroupNorm(8, before),
        )
        self.mid_convs = nn.ModuleList([pair, nn.Conv2d(before, width, 2, 2)])

    def forward(self, pixels_BHW3, t_B):
        time = self.time_embedding(self.time_proj(1000 * torch.tensor(t_B)))
        x = self.embedding(torch.tensor(np.asarray(pixels_BHW3)).permute(0, 3, 1, 2))
        for res, down in zip(self.down_res, self.down_sample, strict=True):
            x = down(res(x, time))
        x = self.mid_convs[1](x + self.mid_convs[0](x))
        return x.flatten(2).transpose(1, 2)


@pytest.fixture(scope="module")
def pair():
    """Reference nets and ours, with the same weights."""
    nets = nn.ModuleList([Reference(SMALL, FLUX.width) for _ in range(FLUX.double_blocks)])
    parity.randomise(nets)
    make = lambda: LightControl(SMALL, FLUX, dtype=jnp.float32, rngs=nnx.Rngs(0))  # noqa: E731
    table = control_table(SMALL, FLUX.double_blocks, prefix="")
    return nets, parity.fill(make, table, parity.tensors(nets))


def pixels(height, width, batch=2):
    rng = np.random.default_rng(5)
    return rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def block(ours, k):
    return jax.tree.map(lambda x: x[k], ours.nets)


@jax.jit
def tokens(net, x, sizes, t):
    y = net(x, sizes, t)
    return y.reshape(y.shape[0], -1, y.shape[-1])


@torch.no_grad()
def run(nets, x):
    return [net(x, T).numpy() for net in nets]


def test_parity_and_every_weight_matters(pair):
    nets, ours = pair
    x = pixels(32, 48)
    found = [tokens(block(ours, k), x, None, T) for k in range(FLUX.double_blocks)]
    parity.assert_every_weight_matters(nets, lambda: run(nets, x), found)


def test_valid_sizes_on_a_canvas_equal_the_unpadded_net(pair):
    _, ours = pair
    x = pixels(48, 48, 3)
    sizes = np.array([[32, 48], [48, 16], [0, 0]])
    net, t = block(ours, 0), np.array([0.3, 0.9, 0.5], np.float32)
    canvas = jax.jit(lambda net, x: net(x, sizes, t))(net, x)
    for row, (height, width) in enumerate(sizes[:2]):
        alone = jax.jit(lambda net, x, t: net(x, None, t))(
            net, x[row : row + 1, :height, :width], t[row : row + 1]
        )[0]
        h, w = height // 16, width // 16
        np.testing.assert_allclose(canvas[row, :h, :w], alone, atol=1e-5)
        assert not canvas[row, h:].any() and not canvas[row, :, w:].any()
    assert not canvas[2].any(), "a sample without a source gets nothing"


def stream(grid, sources=0, pads=0, batch=2):
    """A stream of target tokens, then some source and padding tokens."""
    rows, cols = np.divmod(np.arange(grid[0] * grid[1]), grid[1])
    target = np.stack([np.zeros_like(rows), rows, cols], -1)
    rest = np.full((sources + pads, 3), 1)
    roles = np.repeat([TARGET, SOURCE, PAD], [len(rows), sources, pads])
    tokens = np.random.default_rng(0).standard_normal((batch, len(roles), FLUX.channels))
    spread = lambda x: jnp.broadcast_to(x, (batch, *x.shape))  # noqa: E731
    return ImageStream(
        jnp.asarray(tokens, jnp.float32), spread(roles), spread(np.concatenate([target, rest]))
    )


def conditions(batch=2):
    rng = np.random.default_rng(1)
    shapes = (batch, 5, FLUX.text_width), (batch, FLUX.pooled_width)
    return [rng.standard_normal(s).astype(np.float32) for s in shapes]


@pytest.fixture(scope="module")
def base():
    config = {k: v for k, v in FLUX.to_diffusers().items() if not k.startswith("_")}
    model = parity.randomise(diffusers.FluxTransformer2DModel(**config))
    make = lambda: Flux(FLUX, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))  # noqa: E731
    return model, parity.fill(make, flux_table(FLUX), parity.tensors(model))


@jax.jit
def velocity(flux, control, img, txt, pooled):
    return flux(img, txt, pooled, T, T, control=control).velocity_BIC


def test_flux_adds_each_net_after_its_double_block(pair, base):
    nets, ours = pair
    model, flux = base
    x, img, (txt, pooled) = pixels(32, 48), stream((2, 3)), conditions()
    sizes = np.full((2, 2), (32, 48))
    with torch.no_grad():
        expected = model(
            hidden_states=torch.tensor(np.asarray(img.tokens_BIC)),
            encoder_hidden_states=torch.tensor(txt),
            pooled_projections=torch.tensor(pooled),
            timestep=torch.tensor(T),
            guidance=torch.tensor(T),
            img_ids=torch.tensor(np.asarray(img.positions_BI3[0]), dtype=torch.float32),
            txt_ids=torch.zeros(5, 3),
            controlnet_block_samples=[net(x, T) for net in nets],
            return_dict=False,
        )[0].numpy()
    found = velocity(flux, ours(jnp.asarray(x), sizes), img, txt, pooled)
    parity.assert_parity([found], [expected], 2e-5)
    without = velocity(flux, None, img, txt, pooled)
    assert float(jnp.abs(found - without).max()) > 1e-2


def test_only_target_tokens_are_touched(pair):
    _, ours = pair
    control = ours(jnp.asarray(pixels(32, 48)), np.array([[32, 48], [32, 32]]))
    img = stream((2, 2), sources=3, pads=2)
    delta = jax.jit(lambda net: control.delta(net, img, T))(block(ours, 0))
    canvas = jax.jit(lambda net: net(control.pixels_BHW3, control.sizes_B2, T))(block(ours, 0))
    for n, (row, col) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        np.testing.assert_allclose(delta[:, n], canvas[:, row, col], atol=1e-6)
    assert not delta[:, 4:].any()


@pytest.mark.parametrize("zero", [True, False])
def test_an_untrained_control_changes_nothing_if_it_starts_at_zero(base, zero):
    cfg = dataclasses.replace(SMALL, zero=zero)
    fresh = LightControl(cfg, FLUX, dtype=jnp.float32, rngs=nnx.Rngs(3))
    control = fresh(jnp.asarray(pixels(32, 48)), np.full((2, 2), (32, 48)))
    args = (stream((2, 3)), *conditions())
    with_control, without = velocity(base[1], control, *args), velocity(base[1], None, *args)
    assert bool((with_control == without).all()) == zero


def test_published_size():
    """5.9 M parameters a net, by the layers of the specification."""
    make = lambda: LightControl(LIGHT_CONTROL, FLUX_DEV, dtype=jnp.float32, rngs=nnx.Rngs(0))  # noqa: E731
    abstract = Skeleton(nnx.eval_shape(make)).abstract
    with torch.device("meta"):
        net = Reference(LIGHT_CONTROL, FLUX_DEV.width)
    expected = 19 * sum(p.numel() for p in net.parameters())
    assert sum(x.size for x in abstract.values()) == expected
    assert LIGHT_CONTROL.factor == 16
    mesh = sharding.make_mesh({"fsdp": 4}, jax.devices()[:4])
    placed = sharding.param_shardings(prefixed(abstract, "control"), mesh)
    assert placed["control/nets/out/kernel"].spec[4] == "fsdp"


def test_a_file_says_its_sizes(pair):
    nets, _ = pair
    shapes = {f"module.{n}": tuple(p.shape) for n, p in nets.named_parameters()}
    found = sizes(shapes)
    assert found.pop("prefix") == "module."
    assert found.pop("blocks") == FLUX.double_blocks and found.pop("width") == FLUX.width
    assert ControlConfig(**found, groups=SMALL.groups) == SMALL
    ours = {p: tuple(x.shape) for p, x in Skeleton(pair[1]).abstract.items()}
    assert sizes_of_ours(ours) == sizes(shapes)
    with pytest.raises(ValueError, match="not a LightControl: lacks"):
        sizes({"module.0.weight": (1,)})
    with pytest.raises(ValueError, match="nets up to number 1000000000"):
        sizes(shapes | {"module.999999999.x": (1,)})


def test_sizes_that_do_not_fit_are_refused(pair):
    with pytest.raises(ValueError, match="6 channels in 4 groups"):
        ControlConfig(widths=(6,), groups=(4,))
    with pytest.raises(ValueError, match="a group count for each width"):
        ControlConfig(widths=(8, 8), groups=(4,))
    with pytest.raises(ValueError, match="canvas 24x32 must be a multiple of 16"):
        pair[1](jnp.zeros((1, 24, 32, 3)), jnp.zeros((1, 2), int))
