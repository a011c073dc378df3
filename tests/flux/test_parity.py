"""FLUX.1 against diffusers, through the shipped table: outputs and gradients."""

import dataclasses

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from converters.flux_diffusers import flux_table
from tests import parity
from x2jax.flux import FLUX_DEV, FLUX_SCHNELL, FLUX_TINY, PAD, SOURCE, TARGET, Flux, ImageStream

GRID, TEXT = (3, 4), 5
SMALL = dataclasses.replace(
    FLUX_TINY, width=32, heads=2, head_dim=16, axes=(4, 6, 6), double_blocks=2, single_blocks=2,
    text_width=24, pooled_width=20, channels=8,
)  # fmt: skip


def reference(cfg):
    config = {k: v for k, v in cfg.to_diffusers().items() if not k.startswith("_")}
    return parity.randomise(diffusers.FluxTransformer2DModel(**config))


def build(cfg, model):
    make = lambda: Flux(cfg, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))  # noqa: E731
    return parity.fill(make, flux_table(cfg), parity.tensors(model))


def inputs(cfg, batch=2):
    rng = np.random.default_rng(0)
    rows, cols = np.divmod(np.arange(GRID[0] * GRID[1]), GRID[1])
    positions = np.stack([np.zeros_like(rows), rows, cols], axis=-1)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {
        "img": normal(batch, len(rows), cfg.channels),
        "txt": normal(batch, TEXT, cfg.text_width),
        "pooled": normal(batch, cfg.pooled_width),
        "t": np.array([0.3, 0.937], np.float32)[:batch],
        "guidance": np.array([3.5, 1.0], np.float32)[:batch],
        "positions": positions,
    }


def run_reference(model, cfg, x, *, grad=False):
    tensor = {k: torch.tensor(x[k], requires_grad=grad) for k in ("img", "txt", "pooled")}
    out = model(
        hidden_states=tensor["img"],
        encoder_hidden_states=tensor["txt"],
        pooled_projections=tensor["pooled"],
        timestep=torch.tensor(x["t"]),
        guidance=torch.tensor(x["guidance"]) if cfg.guidance else None,
        img_ids=torch.tensor(x["positions"], dtype=torch.float32),
        txt_ids=torch.zeros(TEXT, 3),
        return_dict=False,
    )[0]
    return out, tensor


def run_ours(model, cfg, x, img=None, txt=None, pooled=None, **kw):
    img = x["img"] if img is None else img
    batch, count = img.shape[:2]
    positions = jnp.broadcast_to(x["positions"], (batch, count, 3))
    stream = ImageStream(img, jnp.full((batch, count), TARGET), positions)
    txt, pooled = x["txt"] if txt is None else txt, x["pooled"] if pooled is None else pooled
    guidance = x["guidance"] if cfg.guidance else None
    return model(stream, txt, pooled, x["t"], guidance, **kw).velocity_BIC


@pytest.mark.parametrize("guidance", [True, False])
def test_outputs_equal_diffusers_and_every_weight_matters(guidance):
    cfg = dataclasses.replace(SMALL, guidance=guidance)
    model, x = reference(cfg), inputs(cfg)
    ours = np.asarray(run_ours(build(cfg, model), cfg, x))

    def run():
        return [run_reference(model, cfg, x)[0].detach().numpy()]

    parity.assert_every_weight_matters(model, run, [ours], tol=2e-5)


@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("remat", ["none", "full", "attention"])
def test_gradients_with_respect_to_inputs_equal_diffusers(guidance, remat):
    cfg = dataclasses.replace(SMALL, guidance=guidance)
    model, x = reference(cfg), inputs(cfg)
    out, tensors = run_reference(model, cfg, x, grad=True)
    probe = np.random.default_rng(1).standard_normal(out.shape).astype(np.float32)
    (out * torch.tensor(probe)).sum().backward()
    flux = build(cfg, model)

    def scalar(img, txt, pooled):
        return (run_ours(flux, cfg, x, img, txt, pooled, remat=remat) * probe).sum()

    grads = jax.grad(scalar, argnums=(0, 1, 2))(
        *(jnp.asarray(x[k]) for k in ("img", "txt", "pooled"))
    )
    expected = [tensors[k].grad.numpy() for k in ("img", "txt", "pooled")]
    assert parity.assert_parity(grads, expected) < 1e-4
    with pytest.raises(AssertionError):
        parity.assert_parity([g * 1.001 for g in grads], expected, tol=1e-4)


def test_rope_theta_is_seen_by_the_parity():
    cfg = SMALL
    model, x = reference(cfg), inputs(cfg)
    wrong = build(dataclasses.replace(cfg, theta=1000), model)
    with pytest.raises(AssertionError):
        parity.assert_parity(
            [run_ours(wrong, cfg, x)], [run_reference(model, cfg, x)[0].detach().numpy()]
        )


@pytest.mark.parametrize("cfg", [FLUX_DEV, FLUX_SCHNELL])
def test_full_size_has_diffusers_parameters(cfg):
    make = lambda: Flux(cfg, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))  # noqa: E731
    count = sum(x.size for x in jax.tree.leaves(nnx.state(nnx.eval_shape(make))))
    config = {k: v for k, v in cfg.to_diffusers().items() if not k.startswith("_")}
    with torch.device("meta"):
        expected = sum(p.numel() for p in diffusers.FluxTransformer2DModel(**config).parameters())
    assert count == expected
    if cfg.guidance:
        assert count == 11_901_408_320


def sources(x, cfg, pads=0):
    """A stream of target tokens, source tokens at an offset, and padding with garbage in it."""
    batch, count = x["img"].shape[:2]
    rng = np.random.default_rng(7)
    shape = (batch, count, cfg.channels)
    tokens = [
        x["img"],
        rng.standard_normal(shape),
        9 * rng.standard_normal((batch, pads, cfg.channels)),
    ]
    target = np.broadcast_to(x["positions"], (batch, count, 3))
    positions = [target, target + np.array([0, 16, 0]), np.full((batch, pads, 3), 3)]
    roles = np.repeat([TARGET, SOURCE, PAD], [count, count, pads])
    return ImageStream(
        jnp.asarray(np.concatenate(tokens, 1), jnp.float32),
        jnp.broadcast_to(roles, (batch, len(roles))),
        jnp.asarray(np.concatenate(positions, 1)),
    )


def test_padding_does_not_change_the_velocity():
    cfg = SMALL
    flux, x = build(cfg, reference(cfg)), inputs(cfg)

    def run(pads):
        stream = sources(x, cfg, pads)
        out = flux(stream, x["txt"], x["pooled"], x["t"], x["guidance"]).velocity_BIC
        return out[:, : 2 * x["img"].shape[1]]

    np.testing.assert_allclose(run(0), run(7), atol=1e-5)


def test_source_tokens_are_modulated_at_timestep_zero():
    """With t = 0 everywhere source and target are modulated alike, so roles change nothing."""
    cfg = SMALL
    flux, x = build(cfg, reference(cfg)), inputs(cfg)
    stream = sources(x, cfg)
    as_target = stream._replace(roles_BI=jnp.full_like(stream.roles_BI, TARGET))

    def gap(t):
        a = flux(stream, x["txt"], x["pooled"], t, x["guidance"]).velocity_BIC
        b = flux(as_target, x["txt"], x["pooled"], t, x["guidance"]).velocity_BIC
        return float(jnp.abs(a - b).max())

    assert gap(jnp.zeros(2)) < 1e-6
    assert gap(jnp.asarray(x["t"])) > 1e-2


def test_position_offset_of_sources_matters():
    cfg = SMALL
    flux, x = build(cfg, reference(cfg)), inputs(cfg)
    stream = sources(x, cfg)
    moved = stream._replace(
        positions_BI3=stream.positions_BI3
        - jnp.where(stream.roles_BI == SOURCE, 16, 0)[..., None] * jnp.array([0, 1, 0])
    )
    a, b = (
        flux(s, x["txt"], x["pooled"], x["t"], x["guidance"]).velocity_BIC for s in (stream, moved)
    )
    assert float(jnp.abs(a - b).max()) > 1e-3


def test_guidance_must_fit_the_model():
    cfg = SMALL
    flux, x = build(cfg, reference(cfg)), inputs(cfg)
    with pytest.raises(ValueError, match="pass guidance_B"):
        flux(sources(x, cfg), x["txt"], x["pooled"], x["t"])
    with pytest.raises(ValueError, match="unknown remat policy 'half'"):
        run_ours(flux, cfg, x, remat="half")
