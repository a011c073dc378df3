"""Sample grids: source, target and prediction of a fixed held-out batch, with the instruction."""

import textwrap
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image, ImageDraw

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


def grid(
    recipe: Any, params: Params, frozen: Params, batch: Any, step: int, workdir: Path
) -> np.ndarray | None:
    """Edits the held-out batch from fixed noise and writes `samples/STEP.png`; None elsewhere.

    Every process computes; the first one draws.
    """
    predicted = to_uint8(jax.device_get(recipe.preview(params, frozen, batch)))
    if jax.process_index() != 0:
        return None
    rows = []
    pixels, sizes = np.asarray(recipe.data.held_out.pixels), np.asarray(recipe.data.held_out.sizes)
    for n, text in enumerate(recipe.data.held_out_instructions[:8]):
        cut = lambda image, size: image[: size[0], : size[1]]  # noqa: E731
        images = [
            cut(pixels[n, 1], sizes[n, 1]),
            cut(pixels[n, 0], sizes[n, 0]),
            cut(predicted[n], sizes[n, 0]),
        ]
        rows.append((text, images))
    picture = draw(rows, ("source", "target", "prediction"))
    folder = workdir / "samples"
    folder.mkdir(exist_ok=True)
    Image.fromarray(picture).save(folder / f"{step:07d}.png")
    return picture
