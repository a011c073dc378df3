"""Bilingual phrases and random choices that the editing tasks of the tiny world share."""

from __future__ import annotations

import numpy as np

from x2jax.tiny.captions import CHINESE, name
from x2jax.tiny.world import (
    COLOURS,
    Object,
    Scene,
    pick,
    sample_scene,
)

Rng = np.random.Generator
# Background -> colours that do not show on it.
HIDES = {
    "meadow": ("green",),
    "beach": ("yellow",),
    "sea": ("blue",),
    "starry sky": ("black", "purple"),
    "snow": ("white",),
}
# What a task returns: the scenes before and after, and the instruction in English and Chinese.
Change = tuple[Scene, Scene, str, str]


def say(rng: Rng, english: tuple[str, ...], chinese: tuple[str, ...], **words) -> tuple[str, str]:
    """Fill an English and a Chinese pattern; a word is (English, Chinese) or a string for both."""
    pairs = {k: v if isinstance(v, tuple) else (v, v) for k, v in words.items()}
    en = pick(rng, english).format(**{k: v[0] for k, v in pairs.items()})
    zh = pick(rng, chinese).format(**{k: v[1] for k, v in pairs.items()})
    return en[0].upper() + en[1:], zh


def both(word: str) -> tuple[str, str]:
    """A word of the world with its Chinese name."""
    return word, CHINESE[word]


def noun(obj: Object, material: bool = True) -> tuple[str, str]:
    """A noun phrase for an object in both languages, without an article."""
    return name(obj, "en", material), name(obj, "zh", material)


def refer(rng: Rng, obj: Object) -> tuple[str, str]:
    """A short or full name for an object; shapes and colours differ within a scene."""
    form = int(rng.integers(3))
    if form == 0 and obj.shape in CHINESE:
        return both(obj.shape)
    return noun(obj, material=form == 1)


def free_colour(rng: Rng, scene: Scene) -> str:
    """A colour that no object has and that shows on the background."""
    used = {scene.background_colour, *HIDES.get(scene.background, ())}
    return pick(rng, COLOURS, used | {o.colour for o in scene.objects})


def some_scene(rng: Rng, low: int = 1, figure: str = "") -> tuple[Scene, int]:
    """A scene of `low` to 3 objects and the index of one of them."""
    count = int(rng.integers(low, 4))
    return sample_scene(rng, count, figure), int(rng.integers(count))
