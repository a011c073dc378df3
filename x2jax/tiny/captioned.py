"""Captioned scenes for text to image: pictures, and captions as each text encoder reads them."""

from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from x2jax.encoders.t5_clip import T5ClipInputs, T5ClipTokenizer
from x2jax.encoders.tokenize import TextInputs, TextTokenizer
from x2jax.tiny import captions, world
from x2jax.trees import Params, Skeleton

EDGE, TEXT = 64, 64
LANGUAGES = ("en", "zh")


class Texts(NamedTuple):
    """The same captions for both conditionings; leaves are (..., tokens)."""

    t5: T5ClipInputs
    alignnet: TextInputs


class Examples(NamedTuple):
    """Attributes: posterior moments of pictures, and captions by (picture, language)."""

    mean: np.ndarray
    logvar: np.ndarray
    texts: Texts

    def rows(self, rows: Any, languages: Any) -> "Examples":
        """Some pictures, each with its caption in one language."""
        texts = jax.tree.map(lambda x: x[rows, languages], self.texts)
        return Examples(self.mean[rows], self.logvar[rows], texts)


class Tokenizers:
    """All tokenizers of a family, at this task's lengths."""

    def __init__(self, root: Path):
        self.t5 = T5ClipTokenizer(root / "flux", TEXT, TEXT)
        self.qwen = TextTokenizer(root / "qwen", TEXT)

    def __call__(self, texts: list[str]) -> Texts:
        return Texts(self.t5(texts), self.qwen(texts))


def scenes(seed: int, count: int, tokenize: Tokenizers):
    """(pixels, captions for the encoders by language, the captions): of scenes of one seed."""
    rng = np.random.default_rng(seed)
    drawn = [world.sample_scene(rng) for _ in range(count)]
    pixels = np.stack([world.render(s, (EDGE, EDGE)) for s in drawn])
    words = [[captions.caption(s, rng, lang) for s in drawn] for lang in LANGUAGES]
    texts = jax.tree.map(lambda *x: np.stack(x, axis=1), *(tokenize(w) for w in words))
    return pixels, texts, words


def encoded(skeleton: Skeleton, weights: Params, pixels, texts) -> Examples:
    """Pictures as posterior moments, encoded once."""

    @jax.jit
    def encode(weights, x):
        return skeleton.merge(weights).vae.encode(x.astype(jnp.float32) / 127.5 - 1)

    parts = [encode(weights, pixels[k : k + 64]) for k in range(0, len(pixels), 64)]
    mean, logvar = (np.concatenate(p) for p in zip(*parts, strict=True))
    return Examples(mean, logvar, texts)
