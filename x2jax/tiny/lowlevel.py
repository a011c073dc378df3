"""The low-level task of the tiny world: edge and depth maps, noise and blur."""

from __future__ import annotations

import numpy as np

from x2jax.tiny.captions import caption
from x2jax.tiny.world import Scene, coverage, pick, render, sample_scene

PATTERNS: dict[str, tuple[str, str]] = {
    "edges to image": ("Turn this edge map into a picture: {c}", "根据这张边缘图生成图片：{z}"),
    "depth to image": ("Turn this depth map into a picture: {c}", "根据这张深度图生成图片：{z}"),
    "image to edges": ("Show the edge map of this picture.", "提取这张图片的边缘图。"),
    "image to depth": ("Show the depth map of this picture.", "生成这张图片的深度图。"),
    "denoise": ("Remove the noise from this picture.", "去除图片中的噪点。"),
    "deblur": ("Make this blurry picture sharp.", "让这张模糊的图片变清晰。"),
}
DEGRADED = {"denoise": "A noisy picture.", "deblur": "A blurry picture."}


def edge_map(image: np.ndarray) -> np.ndarray:
    """White edges on black from the colour gradient: uint8 (h, w, 3) to uint8 (h, w, 3)."""
    padded = np.pad(image.astype(np.float32), ((1, 1), (1, 1), (0, 0)), mode="edge")
    dx = padded[1:-1, 2:] - padded[1:-1, :-2]
    dy = padded[2:, 1:-1] - padded[:-2, 1:-1]
    strength = np.sqrt((dx**2 + dy**2).sum(-1)) * (min(image.shape[:2]) / 64) ** 0.5
    grey = np.clip((strength - 30) * 3, 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def depth_map(scene: Scene, size: tuple[int, int]) -> np.ndarray:
    """Near is bright: later objects lie nearer, the ground comes nearer downwards."""
    w, h = size
    depth = np.broadcast_to(np.linspace(20, 90, h, dtype=np.float32)[:, None], (h, w)).copy()
    for i, obj in enumerate(scene.objects):
        depth += (150 + 45 * i - depth) * coverage(obj, scene, size)
    return np.repeat((depth + 0.5).astype(np.uint8)[..., None], 3, axis=-1)


def degrade(rng: np.random.Generator, image: np.ndarray, kind: str) -> np.ndarray:
    """Add Gaussian noise (sigma 32 of 255) or a box blur of a tenth of the shorter side."""
    if kind == "denoise":
        noisy = image + rng.normal(0, 32, image.shape)
        return np.clip(noisy + 0.5, 0, 255).astype(np.uint8)
    reach = max(1, min(image.shape[:2]) // 20)
    out = image.astype(np.float32)
    for axis in (0, 1):
        pad = [(reach, reach) if a == axis else (0, 0) for a in range(3)]
        padded = np.pad(out, pad, mode="edge")
        n = image.shape[axis]
        taps = [np.take(padded, range(k, k + n), axis=axis) for k in range(2 * reach + 1)]
        out = np.mean(taps, axis=0)
    return (out + 0.5).astype(np.uint8)


def sample(
    rng: np.random.Generator, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, str, str, tuple[str, str]]:
    """Source, target, instruction in English and Chinese, captions of source and target."""
    scene = sample_scene(rng, int(rng.integers(1, 3)))
    image, words = render(scene, size), caption(scene, form=2)
    kind = pick(rng, PATTERNS)
    english, chinese = PATTERNS[kind]
    en = english.format(c=words[0].lower() + words[1:])
    zh = chinese.format(z=caption(scene, language="zh", form=2))
    if kind in ("denoise", "deblur"):
        return degrade(rng, image, kind), image, en, zh, (DEGRADED[kind], words)
    hint = "edge" if "edges" in kind else "depth"
    control = edge_map(image) if hint == "edge" else depth_map(scene, size)
    captions = (f"An {hint} map." if hint == "edge" else f"A {hint} map.", words)
    if kind.startswith("image"):
        return image, control, en, zh, (words, captions[0])
    return control, image, en, zh, captions
