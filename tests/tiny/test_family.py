"""The shipped family: public layouts, and trained enough to build on."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from x2jax.encoders.t5_clip import T5ClipTokenizer
from x2jax.sources import TINY
from x2jax.tiny import base, captioned, draw, vae


@functools.cache
def family():
    """(skeleton, frozen weights, weights that `base` trains), float32."""
    return base.open_family(TINY)


@pytest.fixture(scope="module")
def pictures():
    return vae.pictures(seed=123, count=32)


def test_the_autoencoder_reconstructs_unseen_pictures(pictures):
    skeleton, frozen, trained = family()
    params = frozen | trained

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
    skeleton, frozen, trained = family()
    params = frozen | trained
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


def test_the_whole_folder_is_a_flux_pipeline_that_draws_the_same():
    """diffusers' FluxPipeline against ours: tokenizers, T5, CLIP, FLUX, sampler, VAE; pixels."""
    skeleton, frozen, trained = family()
    pipeline = diffusers.FluxPipeline.from_pretrained(TINY / "flux", torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["A small red star at the top on snow.", "右上角有一个大的粉色光亮星星，背景是星空。"]
    noise = np.random.default_rng(0).standard_normal((2, 64, 64)).astype(np.float32)
    theirs = pipeline(
        prompts,
        height=captioned.EDGE,
        width=captioned.EDGE,
        num_inference_steps=3,
        guidance_scale=3.0,
        latents=torch.tensor(noise),
        max_sequence_length=captioned.TEXT,
        output_type="pt",
    ).images.numpy()

    @jax.jit
    def ours(weights, noise, text):
        model = skeleton.merge(weights)
        return draw.pictures(model, model.condition(text), noise, steps=3, guidance=3.0)

    text = T5ClipTokenizer(TINY / "flux", captioned.TEXT)(prompts)
    made = ours(frozen | trained, noise, text)
    mine = (np.clip(made, -1, 1) + 1).transpose(0, 3, 1, 2) / 2
    np.testing.assert_allclose(mine, theirs, atol=2e-3)


def test_the_base_draws_what_the_text_says():
    """Flow loss on captions of unseen scenes, against the same pictures under others' captions."""
    skeleton, frozen, trained = family()
    drawn = captioned.scenes(321, 128, captioned.Tokenizers(TINY))
    held = captioned.encoded(skeleton, frozen | trained, *drawn[:2])
    losses = base.evaluator(skeleton, frozen, held)(trained)
    print("held-out flow loss: " + ", ".join(f"{k} {v:.3f}" for k, v in losses.items()))
    for how in ("t5", "alignnet"):
        own = [losses[f"{how} {language}"] for language in captioned.LANGUAGES]
        assert max(own) < 0.4, "an untrained model is at 2"
        assert losses[f"{how}, others' captions"] > 1.02 * max(own)


def test_the_weights_are_small_enough_to_ship():
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file()) < 12e6
