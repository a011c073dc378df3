"""The shipped family: public layouts, and trained enough to build on."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from x2jax.conditioning import Conditioner
from x2jax.encoders.qwen2_5_vl import QWEN_TINY, QWEN_TINY_VISION, QwenConfig, VisionConfig
from x2jax.encoders.t5_clip import T5ClipTokenizer
from x2jax.sources import TINY, read_config
from x2jax.tiny import base, captioned, draw, language, seeing, vae, vision


@functools.cache
def family():
    """(skeleton, frozen weights, weights that `base` trains), float32."""
    return base.open_family(TINY)


@functools.cache
def seeing_family():
    """(skeleton, weights) of FLUX, AlignNet and the language model with its tower, float32."""
    skeleton, frozen, trained = seeing.open_model(TINY, fresh=False)
    return skeleton, seeing.whole(frozen, trained)


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


def test_flux_draws_what_the_message_shows():
    """Flow loss of unseen pictures: with the picture itself in the message, and with another."""
    skeleton, weights = seeing_family()
    losses = vision.measure(TINY, skeleton, weights, 64)
    print("held-out flow loss: " + ", ".join(f"{k} {v:.4f}" for k, v in losses.items()))
    assert losses["another picture"] > 1.03 * losses["the picture"]


def test_transformers_reads_the_language_model_and_sees_the_same():
    """Every hidden state and the logits, through transformers' own preprocessing and model."""
    folder = TINY / "qwen"
    config = read_config(folder)
    assert QwenConfig.from_transformers(config) == QWEN_TINY
    assert VisionConfig.from_transformers(config) == QWEN_TINY_VISION
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.convert_tokens_to_ids(list(language.VISION))
    assert ids == list(range(seeing.FIRST, QWEN_TINY.vocab))
    images = [Image.fromarray(x) for x in seeing.scenes(5, 2)[1]]
    seen = Qwen2VLImageProcessorPil.from_pretrained(folder)(images, return_tensors="pt")
    content = [{"type": "image"}, {"type": "text", "text": "A red star, and"}, {"type": "image"}]
    turn = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    pad, count = language.VISION[2], seeing.ROWS**2
    assert turn.count(pad) == 2
    given = tokenizer(turn.replace(pad, count * pad), return_tensors="pt")
    shows = given["input_ids"] == QWEN_TINY_VISION.image_token
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        theirs = model(**given, **seen, mm_token_type_ids=shows.int(), output_hidden_states=True)

    for item, image in zip((content[0], content[2]), images, strict=True):
        item["image"] = image
    length, edge = shows.shape[1], captioned.EDGE
    conditioner = Conditioner(folder, QWEN_TINY_VISION, length=length, images=2, edge=edge)
    inputs = conditioner([[{"role": "user", "content": content}]])
    np.testing.assert_array_equal(inputs.ids_BT, given["input_ids"].numpy())
    skeleton, weights = seeing_family()

    @jax.jit
    def ours(weights, x):
        mllm = skeleton.merge(weights).mllm
        more = dict(positions_BT3=x.positions_BT3, vision=x.vision)
        states = mllm.hidden_states(x.ids_BT, x.mask_BT, **more)
        return states, mllm.logits(states[-1])

    states, logits = ours(weights, inputs)
    np.testing.assert_allclose(states, torch.stack(theirs.hidden_states), atol=2e-3)
    np.testing.assert_allclose(logits, theirs.logits, atol=2e-3)
    blind = inputs._replace(vision=jax.tree.map(np.zeros_like, inputs.vision))
    assert np.abs(ours(weights, blind)[1] - logits).max() > 0.1, "the pictures matter"


def test_the_weights_are_small_enough_to_ship():
    assert sum(p.stat().st_size for p in TINY.rglob("*") if p.is_file()) < 12e6
