"""How backgrounds, objects and materials of the tiny world look: colours and signed distances."""

from __future__ import annotations

import numpy as np

from x2jax.tiny import shapes
from x2jax.tiny.scene import BACKGROUNDS, COLOURS, SHAPE_NAMES, Object, Scene

_SKIN = np.array((246, 204, 164), np.float32)
_INK = np.array((40, 30, 34), np.float32)


def background(scene: Scene, x: np.ndarray, y: np.ndarray, px: float) -> np.ndarray:
    """Background colours (h, w, 3) float32 at world coordinates x (1, w), y (h, 1)."""
    base = np.array(COLOURS[scene.background_colour], np.float32)
    kind = scene.background

    def rgb(*value: int) -> np.ndarray:
        return np.array(value, np.float32)

    def cover(distance: np.ndarray) -> np.ndarray:
        return np.clip(0.5 - distance / px, 0, 1)[..., None]

    def mix(below: np.ndarray, above: np.ndarray, alpha: np.ndarray) -> np.ndarray:
        return below + (above - below) * alpha

    pale = mix(base, rgb(255, 255, 255), np.float32(0.3))
    shape = np.broadcast_shapes(x.shape, y.shape)
    down = np.clip(y * 0.5 + 0.5, 0, 1)[..., None]
    if kind == "plain":
        return np.broadcast_to(pale, (*shape, 3)).copy()
    if kind == "gradient":
        return np.broadcast_to(mix(base, rgb(255, 255, 255), 0.75 * (1 - down)), (*shape, 3)).copy()
    if kind == "checkered":
        sign = np.sin(x * 2 * np.pi) * np.sin(y * 2 * np.pi)
        alpha = np.clip(0.5 + sign / (2 * np.pi * px), 0, 1)[..., None]
        return mix(pale, mix(base, rgb(255, 255, 255), np.float32(0.68)), alpha)
    if kind == "meadow":
        sky = mix(rgb(116, 190, 246), rgb(214, 238, 255), np.clip(y[..., None] + 1, 0, 1))
        hill = 0.22 + 0.09 * np.sin(x * 3.0) - y
        return mix(sky, mix(rgb(124, 200, 84), rgb(72, 156, 56), down), cover(hill))
    if kind == "beach":
        sea = mix(rgb(150, 214, 248), rgb(40, 146, 206), cover(-0.25 - y))
        return mix(sea, rgb(244, 222, 158), cover(0.1 + 0.05 * np.sin(x * 4.0) - y))
    if kind == "sea":
        wave = y * 3.2 + 0.25 * np.sin(x * 7.0)
        alpha = np.clip(0.5 + np.sin(wave * np.pi) / (3.2 * np.pi * px), 0, 1)[..., None]
        return mix(rgb(30, 128, 190), rgb(70, 172, 222), alpha)
    if kind == "snow":
        sky = mix(rgb(140, 178, 222), rgb(176, 204, 234), down)
        return mix(sky, rgb(220, 231, 244), cover(0.15 - 0.1 * np.sin(x * 2.5 + 1) - y))
    if kind == "starry sky":
        # One star per cell of a skewed lattice: endless, so that the camera may move.
        u, v = (x + 0.35 * y) / 0.42, (y - 0.35 * x) / 0.42
        star = np.hypot(u - np.round(u), v - np.round(v)) * 0.42 - 0.035
        return mix(mix(rgb(14, 14, 54), rgb(52, 34, 104), down), rgb(255, 246, 206), cover(star))
    raise ValueError(f"background {kind!r} is unknown; use one of {BACKGROUNDS}")


def layers(obj: Object, x: np.ndarray, y: np.ndarray) -> list[tuple[np.ndarray, np.ndarray | str]]:
    """Signed distances (local units) and colours (3,) or (h, w, 3), back to front, of an object."""
    rgb = np.array(COLOURS[obj.colour], np.float32)
    if obj.shape in shapes.SHAPES:
        return [(shapes.SHAPES[obj.shape](x, y), _surface(obj, rgb, x, y))]
    if obj.shape == "face":
        eyes = np.hypot(np.abs(x) - 0.3, y - 0.02) - 0.11
        if obj.pose == "surprised":
            mouth = np.hypot(x, y - 0.5) - 0.17
        else:
            # The lower (smile) or upper (sad) half of a thick circle.
            side = 1.0 if obj.pose == "smiling" else -1.0
            cy = 0.26 if obj.pose == "smiling" else 0.78
            arc = np.abs(np.hypot(x, y - cy) - 0.34) - 0.075
            mouth = np.maximum(arc, -side * (y - cy) + 0.08)
        out = [
            (np.hypot(x, y + 0.08) - 0.9, rgb),
            (np.hypot(x / 0.74, (y - 0.14) / 0.74) * 0.74 - 0.74, _SKIN),
            (np.maximum(np.hypot(x, y + 0.08) - 0.9, y + 0.28), rgb),
            (eyes, _INK),
            (mouth, np.array((170, 40, 50), np.float32)),
        ]
        if obj.extra == "glasses":
            frame = np.abs(np.hypot(np.abs(x) - 0.3, y - 0.02) - 0.24) - 0.055
            bar = np.maximum(np.abs(x) - 0.1, np.abs(y - 0.02) - 0.05)
            out.append((np.minimum(frame, bar), _INK))
        if obj.extra == "hat":
            brim = np.maximum(np.abs(x) - 0.95, np.abs(y + 0.5) - 0.09)
            crown = np.maximum(np.abs(x) - 0.55, np.abs(y + 0.74) - 0.26)
            out.append((np.minimum(brim, crown), np.array((70, 48, 120), np.float32)))
        return out
    if obj.shape == "person":
        left, right, foot_l, foot_r = shapes.PERSON_LIMBS[obj.pose or "standing"]
        arms = np.minimum(
            shapes.capsule(x, y, (-0.18, -0.25), left, 0.1),
            shapes.capsule(x, y, (0.18, -0.25), right, 0.1),
        )
        legs = np.minimum(
            shapes.capsule(x, y, (-0.1, 0.3), foot_l, 0.12),
            shapes.capsule(x, y, (0.1, 0.3), foot_r, 0.12),
        )
        return [
            (legs, np.array((52, 58, 84), np.float32)),
            (arms, _SKIN),
            (shapes.capsule(x, y, (0, -0.15), (0, 0.25), 0.26), rgb),
            (np.hypot(x, y + 0.66) - 0.26, _SKIN),
        ]
    raise ValueError(f"shape {obj.shape!r} is unknown; use one of {SHAPE_NAMES}, face or person")


def _surface(obj: Object, rgb: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The colour of a shape under its material: (3,) or (h, w, 3)."""
    if obj.material == "matte":
        return rgb
    if obj.material == "shiny":
        light = np.clip(1 - np.hypot(x + 0.3, y + 0.35) / 0.55, 0, 1)[..., None]
        shade = np.clip((x + y) * 0.3, -0.1, 0.4)[..., None]
        return rgb * (1 - shade) + (255 - rgb) * np.minimum(1.6 * light, 1) * 0.95
    # A pattern of white, or of dark grey where the object itself is white.
    other = np.full(3, 96.0 if obj.colour == "white" else 250.0, np.float32)
    if obj.material == "striped":
        alpha = np.clip(np.sin(x * 9.0) * 3.0 + 0.2, 0, 1)
    else:
        u, v = x / 0.5, y / 0.5
        alpha = np.clip(2.2 - np.hypot(u - np.round(u), v - np.round(v)) * 7.5, 0, 1)
    return rgb + (other - rgb) * alpha[..., None]
