"""The autoencoder against diffusers, and the masked canvas against the unpadded network."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from flax import nnx

from converters.vae_diffusers import vae_table
from tests import parity
from x2jax.encoders import vae_layers
from x2jax.encoders.vae import FLUX_VAE, TINY_VAE, VAE, VAEConfig

# Widths that differ from level to level, more than one layer, more than two channels a group.
SMALL = VAEConfig((8, 16, 24), layers_per_block=2, norm_num_groups=4, latent_channels=4)


@pytest.fixture(scope="module")
def pair():
    kwargs = {k: v for k, v in SMALL.to_diffusers().items() if k != "_class_name"}
    reference = parity.randomise(AutoencoderKL(**kwargs))

    def make():
        return VAE(SMALL, rngs=nnx.Rngs(0))

    return reference, parity.fill(make, vae_table(SMALL), parity.tensors(reference))


def run_reference(reference, pixels_BHW3, z_BhwC):
    with torch.no_grad():
        posterior = reference.encode(torch.tensor(pixels_BHW3).permute(0, 3, 1, 2)).latent_dist
        pixels = reference.decode(torch.tensor(z_BhwC).permute(0, 3, 1, 2)).sample
    return [x.permute(0, 2, 3, 1).numpy() for x in (posterior.mean, posterior.logvar, pixels)]


def inputs(height=16, width=24, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)
    z = rng.normal(size=(batch, height // 4, width // 4, 4)).astype(np.float32)
    return pixels, z


def test_parity_and_every_weight_matters(pair):
    reference, ours = pair
    pixels, z = inputs()
    outputs = [*ours.encode(jnp.asarray(pixels)), ours.decode(jnp.asarray(z))]
    exempt = {
        r".*\.attentions\.0\.to_k\.bias": "adds a constant to a query's scores: softmax drops it"
    }
    parity.assert_every_weight_matters(
        reference, lambda: run_reference(reference, pixels, z), outputs, 1e-4, exempt
    )


# Heights and widths in pixels on a canvas of 32 x 40; multiples of the factor 4.
SIZES = [(32, 40), (16, 24), (8, 40), (28, 4), (20, 36)]


def test_masked_canvas_equals_unpadded(pair):
    _, ours = pair
    rng = np.random.default_rng(3)
    pixels = jnp.asarray(rng.uniform(-1, 1, (len(SIZES) + 1, 32, 40, 3)), jnp.float32)
    z = jnp.asarray(rng.normal(size=(len(SIZES) + 1, 8, 10, 4)), jnp.float32)
    sizes = jnp.asarray([*SIZES, (0, 0)], jnp.int32)
    # What lies outside the valid area must not matter, whatever it is.
    mean, logvar = jax.jit(ours.encode)(pixels * 1.0, sizes)
    image = jax.jit(ours.decode)(z, sizes)
    for i, (h, w) in enumerate(SIZES):
        m, v = ours.encode(pixels[i : i + 1, :h, :w])
        np.testing.assert_allclose(mean[i, : h // 4, : w // 4], m[0], atol=1e-5)
        np.testing.assert_allclose(logvar[i, : h // 4, : w // 4], v[0], atol=1e-5)
        y = ours.decode(z[i : i + 1, : h // 4, : w // 4])
        np.testing.assert_allclose(image[i, :h, :w], y[0], atol=1e-5)
        for full, (a, b) in ((mean, (h // 4, w // 4)), (logvar, (h // 4, w // 4)), (image, (h, w))):
            assert not full[i, a:].any()
            assert not full[i, :, b:].any()
    assert not mean[-1].any()  # an empty slot is zeros, not NaN
    assert not image[-1].any()


def test_unmasked_padding_would_be_noticed(pair):
    """The comparison above can fail: without sizes the valid part is another."""
    _, ours = pair
    pixels = jnp.asarray(inputs(32, 40, 1)[0])
    h, w = 16, 24
    padded = vae_layers.mask_canvas(pixels, jnp.asarray([[h, w]]))
    gap = ours.encode(padded)[0][0, : h // 4, : w // 4] - ours.encode(pixels[:, :h, :w])[0][0]
    assert np.abs(gap).max() > 1e-2


def test_attention_in_chunks_is_the_same(pair, monkeypatch):
    _, ours = pair
    z = jnp.asarray(inputs(32, 40, 2)[1])  # 80 tokens in the middle
    sizes = jnp.asarray([(32, 40), (20, 36)])
    whole = ours.decode(z, sizes)
    grad = jax.grad(lambda z: jnp.square(ours.decode(z, sizes)).sum())(z)
    monkeypatch.setattr(vae_layers, "QUERY_CHUNK", 32)
    np.testing.assert_allclose(ours.decode(z, sizes), whole, atol=1e-5)
    chunked = jax.grad(lambda z: jnp.square(ours.decode(z, sizes)).sum())(z)
    np.testing.assert_allclose(chunked, grad, rtol=1e-4, atol=1e-4 * float(jnp.abs(grad).max()))


def test_gradient_of_decode_is_torchs(pair):
    reference, ours = pair
    _, z = inputs()
    weight = np.random.default_rng(1).normal(size=(2, 16, 24, 3)).astype(np.float32)
    grad = jax.grad(lambda z: (ours.decode(z) * weight).sum())(jnp.asarray(z))
    zt = torch.tensor(z).permute(0, 3, 1, 2).requires_grad_()
    (reference.decode(zt).sample * torch.tensor(weight).permute(0, 3, 1, 2)).sum().backward()
    parity.assert_parity([grad], [zt.grad.permute(0, 2, 3, 1).numpy()], 1e-4)


def test_sample_and_normalise(pair):
    _, ours = pair
    mean, logvar = jnp.full((1, 64, 64, 4), 2.0), jnp.full((1, 64, 64, 4), np.log(9.0))
    z = ours.sample(mean, logvar, jax.random.key(0))
    assert abs(float(z.mean()) - 2) < 0.1
    assert abs(float(z.std()) - 3) < 0.1
    np.testing.assert_allclose(ours.normalise(z), (z - 0.1159) * 0.3611, rtol=1e-6)
    np.testing.assert_allclose(ours.denormalise(ours.normalise(z)), z, atol=1e-5)


def test_bfloat16_stays_bfloat16_inside():
    model = VAE(TINY_VAE, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    mean, logvar = jax.eval_shape(model.encode, jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32))
    assert mean.shape == logvar.shape == (1, 16, 16, 16)
    assert mean.dtype == jnp.float32
    image = jax.eval_shape(model.decode, mean)
    assert (image.shape, image.dtype) == ((1, 64, 64, 3), jnp.bfloat16)


@pytest.mark.parametrize(("cfg", "count"), [(FLUX_VAE, 83_819_683), (TINY_VAE, 510_171)])
def test_sizes(cfg, count):
    """Parameter counts (diffusers' FLUX VAE has the first) and configs survive the round trip."""
    state = nnx.state(nnx.eval_shape(lambda: VAE(cfg, rngs=nnx.Rngs(0))))
    assert sum(x.size for x in jax.tree.leaves(state)) == count
    assert VAEConfig.from_diffusers(cfg.to_diffusers()) == cfg


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "VQModel"}, "AutoencoderKL"),
        ({"use_quant_conv": True}, "use_quant_conv"),
        ({"shift_factor": None}, "shift_factor"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention"),
        ({"act_fn": "relu"}, "act_fn"),
    ],
)
def test_foreign_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        VAEConfig.from_diffusers(FLUX_VAE.to_diffusers() | change)
    with pytest.raises(ValueError, match="block_out_channels"):
        VAEConfig.from_diffusers({k: v for k, v in FLUX_VAE.to_diffusers().items() if k[0] != "b"})


def test_bad_sizes_are_refused(pair):
    _, ours = pair
    with pytest.raises(ValueError, match="factor 4"):
        ours.encode(jnp.zeros((1, 30, 32, 3)))
    with pytest.raises(ValueError, match="norm_num_groups"):
        dataclasses.replace(SMALL, norm_num_groups=5)
