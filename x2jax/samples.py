"""Sample grids: source, target and prediction of a fixed held-out batch, with the instruction."""

import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

from x2jax.data.batch import Batch
from x2jax.trees import Params

CELL = 128
"""Smallest edge of a shown picture in pixels; smaller ones are enlarged by whole factors."""


def to_uint8(x: np.ndarray) -> np.ndarray:
    """[-1, 1] to [0, 255], clipped and rounded."""
    return np.clip(np.rint((np.asarray(x, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def draw(rows: list[tuple[str, list[np.ndarray]]], titles: tuple[str, ...]) -> np.ndarray:
    """A picture of rows: images side by side over their caption.

    Args:
      rows: caption and uint8 (h, w, 3) images; sizes may differ between rows.
      titles: of the columns.

    Returns:
      uint8 (H, W, 3).
    """
    factor = max(1, CELL // max(1, min(min(i.shape[:2]) for _, images in rows for i in images)))
    big = [
        (text, [np.kron(i, np.ones((factor, factor, 1), np.uint8)) for i in images])
        for text, images in rows
    ]
    width = max(i.shape[1] for _, images in big for i in images)
    total = (width + 8) * len(titles) + 8
    wrapped = [textwrap.wrap(text, max(20, total // 6)) or [""] for text, _ in big]
    heights = [max(i.shape[0] for i in images) for _, images in big]
    height = 24 + sum(h + 14 * len(t) + 12 for h, t in zip(heights, wrapped, strict=True))
    canvas = Image.new("RGB", (total, height), "white")
    pen = ImageDraw.Draw(canvas)
    for k, title in enumerate(titles):
        pen.text((8 + k * (width + 8), 6), title, fill="black")
    y = 24
    for (_, images), lines, h in zip(big, wrapped, heights, strict=True):
        for k, image in enumerate(images):
            canvas.paste(Image.fromarray(image), (8 + k * (width + 8), y))
        for n, line in enumerate(lines):
            pen.text((8, y + h + 2 + 14 * n), line, fill="black")
        y += h + 14 * len(lines) + 12
    return np.asarray(canvas)


def given(batch: Any) -> dict[str, list[np.ndarray]]:
    """Columns that a batch of images holds: sources, then the target; each picture cut to size."""
    if not isinstance(batch, Batch):
        return {}
    pixels, sizes = np.asarray(batch.pixels), np.asarray(batch.sizes)
    titles = {k: "source" if k == 1 else f"source {k}" for k in range(1, pixels.shape[1])}
    return {
        title: [x[:h, :w] for x, (h, w) in zip(pixels[:, slot], sizes[:, slot], strict=True)]
        for slot, title in [*titles.items(), (0, "target")]
        if sizes[:, slot].any()
    }


def grid(
    recipe: Any, params: Params, frozen: Params, batch: Any, step: int, workdir: Path
) -> np.ndarray | None:
    """Draws the held-out batch and what `recipe.preview` makes of it to `samples/STEP.png`.

    Every process computes; the first one draws, the others return None.
    """
    predicted = jax.device_get(recipe.preview(params, frozen, batch))
    if jax.process_index() != 0:
        return None
    held = recipe.data.held_out
    columns: dict[str, Any] = given(held)
    sizes = [x.shape[:2] for x in columns.get("target", ())]
    for title, pixels in predicted.items():
        images = list(to_uint8(pixels))
        if sizes:
            images = [x[:h, :w] for x, (h, w) in zip(images, sizes, strict=False)]
        columns[title] = images
    rows = [
        (text, [images[n] for images in columns.values()])
        for n, text in enumerate(recipe.data.held_out_instructions[:8])
    ]
    picture = draw(rows, tuple(columns))
    folder = workdir / "samples"
    folder.mkdir(exist_ok=True)
    Image.fromarray(picture).save(folder / f"{step:07d}.png")
    return picture
