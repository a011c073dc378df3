"""A procedural picture world, small enough to train on a CPU: draw a `Scene` at any size.

The scenes themselves are in x2jax/tiny/scene.py; its names are exported here too.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from x2jax.tiny import shapes
from x2jax.tiny.paint import background, layers
from x2jax.tiny.scene import (
    ACCESSORIES,
    ACTIONS,
    BACKGROUNDS,
    COLOURED_BACKGROUNDS,
    COLOURS,
    EXPRESSIONS,
    MATERIALS,
    PLACES,
    POSITIONS,
    SHAPE_NAMES,
    SIZES,
    STYLES,
    TONES,
    WORDS,
    Object,
    Scene,
    backdrop,
    fits,
    pick,
    sample_scene,
)

__all__ = [
    "ACCESSORIES",
    "ACTIONS",
    "BACKGROUNDS",
    "COLOURED_BACKGROUNDS",
    "COLOURS",
    "EXPRESSIONS",
    "MATERIALS",
    "PLACES",
    "POSITIONS",
    "SHAPE_NAMES",
    "SIZES",
    "STYLES",
    "TONES",
    "WORDS",
    "Object",
    "Scene",
    "backdrop",
    "centre",
    "coverage",
    "fits",
    "pick",
    "render",
    "sample_scene",
    "word_box",
]

_TONE_MATRICES = {
    "warm": ((1.1, 0.1, 0.0), (0.04, 0.86, 0.0), (0.0, 0.0, 0.56)),
    "cold": ((0.62, 0.0, 0.0), (0.0, 0.86, 0.06), (0.0, 0.14, 1.08)),
    "night": ((0.26, 0.02, 0.02), (0.02, 0.3, 0.04), (0.04, 0.08, 0.5)),
    "sepia": ((0.393, 0.769, 0.189), (0.349, 0.686, 0.168), (0.272, 0.534, 0.131)),
    "grey": ((0.299, 0.587, 0.114),) * 3,
}


@lru_cache(maxsize=64)
def _grid(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    w, h = size
    half = min(w, h) / 2
    x = (np.arange(w, dtype=np.float32) + 0.5 - w / 2) / half
    y = (np.arange(h, dtype=np.float32) + 0.5 - h / 2) / half
    return x[None, :], y[:, None]


def _window(obj: Object, scene: Scene, size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the picture that can show `obj`."""
    w, h = size
    half = min(w, h) / 2
    cx, cy = centre(obj, scene, size)
    reach = obj.size * scene.zoom * half * 1.15 + 3
    x0, x1 = (int(np.clip(v, 0, w)) for v in (cx - reach, cx + reach + 1))
    y0, y1 = (int(np.clip(v, 0, h)) for v in (cy - reach, cy + reach + 1))
    return slice(y0, y1), slice(x0, x1)


def centre(obj: Object, scene: Scene, size: tuple[int, int]) -> tuple[float, float]:
    """Where the middle of `obj` falls in a picture of `size` (width, height), in pixels (x, y)."""
    w, h = size
    half = min(w, h) / 2
    x = (obj.x * w / 2 / half - scene.pan[0]) * scene.zoom * half + w / 2
    y = (obj.y * h / 2 / half - scene.pan[1]) * scene.zoom * half + h / 2
    return x, y


def _local(obj: Object, scene: Scene, size: tuple[int, int], window) -> tuple:
    """The object's own coordinates on a window, and the pixel size in them."""
    half = min(size) / 2
    cx, cy = centre(obj, scene, size)
    gx, gy = _grid(size)
    scale = 1 / (obj.size * scene.zoom)
    dx = (gx[:, window[1]] - np.float32((cx - size[0] / 2) / half)) * np.float32(scale)
    dy = (gy[window[0]] - np.float32((cy - size[1] / 2) / half)) * np.float32(scale)
    c, s = (np.float32(f(np.deg2rad(obj.angle))) for f in (np.cos, np.sin))
    return c * dx + s * dy, c * dy - s * dx, scale / half


def coverage(obj: Object, scene: Scene, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """The share of each pixel that `obj` covers, occlusion aside: float32 (h, w) in 0..1."""
    out = np.zeros((size[1], size[0]), np.float32)
    window = _window(obj, scene, size)
    x, y, px = _local(obj, scene, size, window)
    for distance, _ in layers(obj, x, y):
        out[window] = np.maximum(out[window], np.clip(0.5 - distance / px, 0, 1))
    return out


def word_box(scene: Scene, size: tuple[int, int] = (64, 64)) -> tuple[slice, slice]:
    """Rows and columns of the banner that carries the word."""
    w, h = size
    height = max(9, round(0.2 * min(w, h)))
    return (slice(0, height) if scene.word_at == "top" else slice(h - height, h)), slice(0, w)


def _write_word(image: np.ndarray, scene: Scene, size: tuple[int, int]) -> None:
    """Draw the banner with the word, dark on white: exact pixel coverage of square font cells."""
    rows, cols = word_box(scene, size)
    bitmap = shapes.word_bitmap(scene.word)
    height, width = rows.stop - rows.start, cols.stop
    cell = min(height / 9, width / (bitmap.shape[1] + 2))

    def overlap(pixels: int, cells: int) -> np.ndarray:
        first = (pixels - cells * cell) / 2 + cell * np.arange(cells)
        left = np.arange(pixels)[:, None]
        return np.clip(np.minimum(left + 1, first + cell) - np.maximum(left, first), 0, 1)

    ink = overlap(height, 7) @ bitmap @ overlap(width, bitmap.shape[1]).T
    image[rows, cols] = (252 - 232 * ink)[..., None]


def _outlines(scene: Scene, size: tuple[int, int], width: float) -> np.ndarray:
    """Coverage (h, w) of the contours of all visible objects, `width` in pixels."""
    out = np.zeros((size[1], size[0]), np.float32)
    for obj in scene.objects:
        window = _window(obj, scene, size)
        x, y, px = _local(obj, scene, size, window)
        for distance, _ in layers(obj, x, y):
            inside = np.clip(0.5 - distance / px, 0, 1)
            line = np.clip(width / 2 + 0.5 - np.abs(distance) / px, 0, 1)
            out[window] = np.maximum(out[window] * (1 - inside), line)
    return out


def render(scene: Scene, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """Draw a scene at `size` (width, height): uint8 (h, w, 3), anti-aliased by signed distance."""
    w, h = size
    gx, gy = _grid(size)
    px = 2 / min(size) / scene.zoom
    line = max(1.2, min(size) / 64 * 1.6)
    if scene.style in ("sketch", "blueprint"):
        paper, ink = ((250, 248, 240), (40, 40, 44))
        if scene.style == "blueprint":
            paper, ink = ((24, 70, 150), (236, 244, 255))
        alpha = _outlines(scene, size, line)[..., None]
        image = np.array(paper, np.float32) * (1 - alpha) + np.array(ink, np.float32) * alpha
    else:
        image = background(
            scene, gx / scene.zoom + scene.pan[0], gy / scene.zoom + scene.pan[1], px
        )
        for obj in scene.objects:
            window = _window(obj, scene, size)
            x, y, local_px = _local(obj, scene, size, window)
            view = image[window]
            for distance, colour in layers(obj, x, y):
                view += (colour - view) * np.clip(0.5 - distance / local_px, 0, 1)[..., None]
        if scene.style == "cartoon":
            image *= 1 - _outlines(scene, size, line * 1.25)[..., None]
    if scene.style == "pixel art":
        block = max(2, min(size) // 16)
        rows, cols = (np.minimum(np.arange(n) // block * block + block // 2, n - 1) for n in (h, w))
        image = image[rows][:, cols]
    if scene.word:
        _write_word(image, scene, size)
    if scene.tone != "neutral":
        image = image @ np.array(_TONE_MATRICES[scene.tone], np.float32).T
    return np.clip(image + 0.5, 0, 255).astype(np.uint8)
