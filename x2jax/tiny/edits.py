"""Miniature versions of the 15 editing tasks: pairs of pictures with instructions.

Every edit follows from the source and the instruction alone: things are named so that they can be
told apart, and what is new is named with its colour, place and size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from x2jax.tiny import lowlevel, object_edits, picture_edits
from x2jax.tiny.captions import caption
from x2jax.tiny.phrases import Change, Rng
from x2jax.tiny.world import (
    COLOURED_BACKGROUNDS,
    Scene,
    coverage,
    render,
    word_box,
)

TASKS = tuple(range(1, 16))
CHANGES: dict[int, Callable[[Rng], Change]] = {
    1: object_edits.removal,
    2: object_edits.addition,
    3: picture_edits.style,
    4: object_edits.change_background,
    5: object_edits.change_colour,
    6: object_edits.change_material,
    7: object_edits.change_action,
    8: object_edits.replacement,
    9: picture_edits.portrait,
    10: picture_edits.change_text,
    11: picture_edits.change_tone,
    12: picture_edits.move_camera,
    13: picture_edits.reasoning,
    15: object_edits.subject,
}


@dataclasses.dataclass(frozen=True)
class Edit:
    """One sample: images uint8 (h, w, 3) and `keep_mask` bool (h, w), the pixels that must stay.

    `keep_mask` is all False where the whole picture may change (style, tone, camera and the like).
    """

    source: np.ndarray
    target: np.ndarray
    instruction_en: str
    instruction_zh: str
    caption_source: str
    caption_target: str
    task: int
    keep_mask: np.ndarray


def keep_mask(source: Scene, target: Scene, size: tuple[int, int]) -> np.ndarray:
    """Pixels that an edit from one scene to another must not touch: bool (h, w), `size` (w, h)."""

    def view(scene: Scene) -> tuple:
        return scene.style, scene.tone, scene.zoom, scene.pan

    shape = (size[1], size[0])
    if view(source) != view(target):
        return np.zeros(shape, bool)
    keep = np.ones(shape, bool)

    def ground(scene: Scene) -> tuple:
        coloured = scene.background in COLOURED_BACKGROUNDS
        return scene.background, scene.background_colour if coloured else ""

    if ground(source) != ground(target):
        keep[:] = False
        for obj in source.objects:
            if obj in target.objects:
                keep |= coverage(obj, source, size) >= 1
        if source.word:
            keep[word_box(source, size)] = True
    for scene, other in ((source, target), (target, source)):
        for obj in scene.objects:
            if obj not in other.objects:
                keep &= coverage(obj, scene, size) == 0
    if source.word != target.word:
        keep[word_box(target if target.word else source, size)] = False
    return keep


def sample_edit(rng: Rng, task: int, size: tuple[int, int] = (64, 64)) -> Edit:
    """A random edit of one of the tasks 1..15 at `size` (width, height)."""
    if task == 14:
        source, target, en, zh, captions = lowlevel.sample(rng, size)
        return Edit(source, target, en, zh, *captions, 14, np.zeros(source.shape[:2], bool))
    if task not in CHANGES:
        raise ValueError(f"task {task!r}: the tiny world has the tasks 1..15")
    before, after, en, zh = CHANGES[task](rng)
    return Edit(
        source=render(before, size),
        target=render(after, size),
        instruction_en=en + ".",
        instruction_zh=zh + "。",
        caption_source=caption(before, rng),
        caption_target=caption(after, rng),
        task=task,
        keep_mask=keep_mask(before, after, size),
    )


def edit(seed: int, index: int, task: int | None = None, size: tuple[int, int] = (64, 64)) -> Edit:
    """Sample `index` of the stream `seed`, the same on every machine; `task` None draws one."""
    rng = np.random.default_rng([seed, index])
    drawn = int(rng.integers(1, 16))
    return sample_edit(rng, drawn if task is None else task, size)
