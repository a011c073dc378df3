"""The shipped family: public layouts, and trained enough to build on."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from x2jax.children import Precision, configs_of, find_sources, load_child
from x2jax.encoders.tokenize import TextTokenizer
from x2jax.model import make_skeleton
from x2jax.sharding import make_mesh, param_shardings
from x2jax.sources import TINY
from x2jax.tiny import base, vae


@functools.cache
def family():
    """(skeleton, all weights in float32, tokenizer)."""
    tiny = dict.fromkeys(("flux", "mllm", "alignnet"), "tiny")
    found = find_sources(tiny, ("flux", "vae", "mllm", "alignnet"))
    skeleton = make_skeleton(configs_of(found), Precision("float32", "float32"))
    by_path = param_shardings(skeleton.abstract, make_mesh({"fsdp": 1}, jax.devices()[:1]))
    params = {}
    for name in found:
        params |= load_child(skeleton, found, name, by_path)
    return skeleton, params, TextTokenizer(TINY / "qwen", base.TEXT)


@pytest.fixture(scope="module")
def pictures():
    return vae.pictures(seed=123, count=32)


def test_the_autoencoder_reconstructs_unseen_pictures(pictures):
    skeleton, params, _ = family()

    @jax.jit
    def reconstruct(params, x):
        model = skeleton.merge(params).vae
        mean, _ = model.encode(x)
        return model.normalise(mean), model.decode(mean)

    x = pictures.astype(np.float32) / 127.5 - 1
    latents, y = reconstruct(params, jnp.asarray(x))
    quality = vae.psnr(np.asarray(y), x)
    print(f"PSNR on unseen pictures {quality:.2f} dB")
    assert quality > 28
    # Shift and scale bring latents to FLUX's range.
    assert abs(float(latents.mean())) < 0.2 and 0.8 < float(latents.std()) < 1.2


def test_diffusers_reads_the_folders_and_agrees(pictures):
    skeleton, params, _ = family()
    model = skeleton.merge(params)
    reference = diffusers.AutoencoderKL.from_pretrained(
        TINY / "flux" / "vae", torch_dtype=torch.float32
    )
    x = pictures[:2].astype(np.float32) / 127.5 - 1
    with torch.no_grad():
        mean = reference.encode(torch.tensor(x.transpose(0, 3, 1, 2))).latent_dist.mean.numpy()
    ours, _ = jax.jit(lambda m, x: m.encode(x))(model.vae, jnp.asarray(x))
    np.testing.assert_allclose(ours, mean.transpose(0, 2, 3, 1), atol=2e-4)
    flux = diffusers.FluxTransformer2DModel.from_pretrained(
        TINY / "flux" / "transformer", torch_dtype=torch.float32
    )
    ours = {p: x for p, x in params.items() if p.startswith("flux/")}
    assert sum(x.size for x in ours.values()) == sum(p.numel() for p in flux.parameters())


def test_the_base_draws_what_the_text_says():
    """Flow loss on captions of unseen scenes, against the same pictures under others' captions."""
    skeleton, params, tokenize = family()
    trained = {p: x for p, x in params.items() if p.startswith(("flux/", "alignnet/"))}
    frozen = {p: x for p, x in params.items() if p not in trained}
    pixels, ids, masks = base.examples(321, 128, tokenize)
    mean, logvar = base.moments(skeleton, frozen, trained, pixels)
    loss = jax.jit(base.make_loss(skeleton))

    def at(ids, masks):
        batch = (mean, logvar, ids, masks)
        return np.mean([float(loss(trained, frozen, batch, jax.random.key(k))) for k in range(2)])

    losses = {
        "own captions": at(ids[:, 0], masks[:, 0]),
        "in Chinese": at(ids[:, 1], masks[:, 1]),
        "others' captions": at(np.roll(ids[:, 0], 1, 0), np.roll(masks[:, 0], 1, 0)),
    }
    print("held-out flow loss: " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))
    assert losses["own captions"] < 0.5, "an untrained model is at 2"
    assert losses["in Chinese"] < 0.5
    assert losses["others' captions"] > 1.02 * losses["own captions"]
