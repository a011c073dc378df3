"""Instructions read together with the pictures that they change."""

import jax
import numpy as np
import pytest

from x2jax import recipes
from x2jax.conditioning import Conditioner, message_shapes
from x2jax.edit_text import PictureTokenizer, read
from x2jax.encoders.qwen2_5_vl import VisionConfig
from x2jax.encoders.tokenize import TextTokenizer
from x2jax.sources import folder, read_config

QWEN = folder("tiny", "mllm", "qwen")
LENGTH, EDGE, TEXTS = 96, 64, ["make the sky pink", "remove the heart"]


@pytest.fixture(scope="module")
def vision():
    return VisionConfig.from_transformers(read_config(QWEN))


@pytest.fixture(scope="module")
def tokenize(vision):
    return PictureTokenizer(QWEN, vision, length=LENGTH, template="raw", sources=2, edge=EDGE)


def samples():
    """Pixels and sizes of a sample with one source, and of one with two."""
    pixels = np.random.default_rng(0).integers(0, 255, (2, 3, 64, 64, 3), np.uint8)
    sizes = np.array([[[64, 64], [48, 64], [0, 0]], [[64, 64], [64, 48], [64, 64]]], np.int32)
    return pixels, sizes


def test_a_sample_is_one_turn_of_its_sources_and_its_instruction(vision, tokenize):
    pixels, sizes = samples()
    images = [[pixels[0, 1, :48]], [pixels[1, 1, :, :48], pixels[1, 2]]]
    conversations = [
        [{"role": "user", "content": [*({"type": "image", "image": x} for x in seen),
                                      {"type": "text", "text": text}]}]
        for seen, text in zip(images, TEXTS, strict=True)
    ]  # fmt: skip
    found = read(tokenize, TEXTS, pixels, sizes)
    expected = Conditioner(QWEN, vision, length=LENGTH, images=2, edge=EDGE)(conversations)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    shapes = message_shapes(2, length=LENGTH, images=2, edge=EDGE, vision=vision)
    assert jax.tree.map(lambda x: (x.shape, str(x.dtype)), found) == jax.tree.map(
        lambda x: (x.shape, str(x.dtype)), shapes
    )


def test_sources_are_seen_and_targets_are_not(tokenize):
    pixels, sizes = samples()
    before = tokenize(TEXTS, pixels, sizes)
    pixels[:, 0] = 0
    jax.tree.map(np.testing.assert_array_equal, tokenize(TEXTS, pixels, sizes), before)
    pixels[:, 1] = 0
    assert (tokenize(TEXTS, pixels, sizes).vision.patches_BPC != before.vision.patches_BPC).any()


def test_long_instructions_are_cut_at_their_end(tokenize):
    pixels, sizes = samples()
    before = tokenize.truncated
    short = tokenize(TEXTS, pixels, sizes)
    long = tokenize([TEXTS[0], TEXTS[1] + " and the star" * 99], pixels, sizes)
    assert tokenize.truncated == before + 1
    np.testing.assert_array_equal(long.ids_BT[0], short.ids_BT[0])
    np.testing.assert_array_equal(long.ids_BT[1, -2:], short.ids_BT[1, -2:])
    assert long.mask_BT[1].sum() in (LENGTH - 1, LENGTH)


def test_tokenizers_of_text_are_not_shown_pictures():
    pixels, sizes = samples()
    tokenize = TextTokenizer(QWEN, 64)
    jax.tree.map(
        np.testing.assert_array_equal, read(tokenize, TEXTS, pixels, sizes), tokenize(TEXTS)
    )


def test_what_cannot_be_seen_is_refused():
    from configs.lora import get_config

    config = get_config("pictures").unlock()
    config.text.update(pictures=True, encoders="mllm")
    with pytest.raises(ValueError, match=r"image\.slots=1 there are none"):
        recipes.outline(config)
    config = get_config().unlock()
    config.text.update(pictures=True, encoders="t5+clip")
    with pytest.raises(ValueError, match=r"t5\+clip cannot see"):
        recipes.outline(config)
