"""Signed distances and the bitmap font of the tiny world (numpy only).

Every shape is a function of local coordinates in units of the object's radius (x right, y down, the
shape inside the unit disc, unrotated); it returns a signed distance, negative inside.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Field = np.ndarray
Distance = Callable[[Field, Field], Field]


def circle(x: Field, y: Field) -> Field:
    """Disc of radius 0.92."""
    return np.hypot(x, y) - 0.92


def square(x: Field, y: Field) -> Field:
    """Square of half side 0.76."""
    return np.maximum(np.abs(x), np.abs(y)) - 0.76


def triangle(x: Field, y: Field) -> Field:
    """Isosceles triangle, apex up."""
    return np.maximum(0.8660254 * np.abs(x) - 0.5 * (y + 0.0), y - 0.1) - 0.45


def star(x: Field, y: Field) -> Field:
    """Five-pointed star, one point up (folded into one tenth of a turn)."""
    step = np.float32(2 * np.pi / 5)
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - step * np.round(angle / step))
    radius = np.hypot(x, y)
    px, py = radius * np.sin(angle), radius * np.cos(angle)
    # The edge runs from the outer point (0, 1) to the inner corner at half a step.
    inner = 0.46
    bx, by = inner * np.sin(step / 2), inner * np.cos(step / 2)
    nx, ny = 1.0 - by, bx
    return (px * nx + (py - 1.0) * ny) / np.hypot(nx, ny)


def heart(x: Field, y: Field) -> Field:
    """Heart, point down: two discs and the square between them."""
    ax = np.abs(x)
    disc = np.hypot(ax - 0.42, y + 0.3) - 0.5
    wedge = np.maximum(0.74 * ax + 0.67 * y - 0.6, -0.25 - y)
    return np.minimum(disc, np.maximum(wedge, ax - 0.9))


def ring(x: Field, y: Field) -> Field:
    """Annulus."""
    return np.abs(np.hypot(x, y) - 0.68) - 0.25


def cross(x: Field, y: Field) -> Field:
    """Plus sign."""
    ax, ay = np.abs(x), np.abs(y)
    return np.minimum(np.maximum(ax - 0.9, ay - 0.32), np.maximum(ay - 0.9, ax - 0.32))


def moon(x: Field, y: Field) -> Field:
    """Crescent, open to the right."""
    return np.maximum(np.hypot(x, y) - 0.92, 0.72 - np.hypot(x - 0.5, y + 0.1))


def capsule(x: Field, y: Field, a: tuple, b: tuple, radius: float) -> Field:
    """Thick segment from `a` to `b`, points in local coordinates."""
    dx, dy = b[0] - a[0], b[1] - a[1]
    t = ((x - a[0]) * dx + (y - a[1]) * dy) / (dx * dx + dy * dy)
    t = np.clip(t, 0.0, 1.0)
    return np.hypot(x - a[0] - t * dx, y - a[1] - t * dy) - radius


SHAPES: dict[str, Distance] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "heart": heart,
    "ring": ring,
    "cross": cross,
    "moon": moon,
}

# The limbs of a person per action: (elbow or hand points of both arms, foot points of both legs).
PERSON_LIMBS: dict[str, tuple[tuple, ...]] = {
    "standing": ((-0.5, 0.22), (0.5, 0.22), (-0.2, 0.9), (0.2, 0.9)),
    "raising both arms": ((-0.55, -0.75), (0.55, -0.75), (-0.2, 0.9), (0.2, 0.9)),
    "waving": ((-0.5, 0.22), (0.6, -0.75), (-0.2, 0.9), (0.2, 0.9)),
    "doing the splits": ((-0.75, -0.2), (0.75, -0.2), (-0.78, 0.62), (0.78, 0.62)),
}

_ROWS = {
    "A": "01110 10001 10001 11111 10001 10001 10001",
    "B": "11110 10001 10001 11110 10001 10001 11110",
    "C": "01110 10001 10000 10000 10000 10001 01110",
    "D": "11110 10001 10001 10001 10001 10001 11110",
    "E": "11111 10000 10000 11110 10000 10000 11111",
    "F": "11111 10000 10000 11110 10000 10000 10000",
    "G": "01110 10001 10000 10111 10001 10001 01110",
    "H": "10001 10001 10001 11111 10001 10001 10001",
    "I": "11111 00100 00100 00100 00100 00100 11111",
    "J": "00111 00010 00010 00010 00010 10010 01100",
    "K": "10001 10010 10100 11000 10100 10010 10001",
    "L": "10000 10000 10000 10000 10000 10000 11111",
    "M": "10001 11011 10101 10101 10001 10001 10001",
    "N": "10001 11001 10101 10011 10001 10001 10001",
    "O": "01110 10001 10001 10001 10001 10001 01110",
    "P": "11110 10001 10001 11110 10000 10000 10000",
    "Q": "01110 10001 10001 10001 10101 10010 01101",
    "R": "11110 10001 10001 11110 10100 10010 10001",
    "S": "01111 10000 10000 01110 00001 00001 11110",
    "T": "11111 00100 00100 00100 00100 00100 00100",
    "U": "10001 10001 10001 10001 10001 10001 01110",
    "V": "10001 10001 10001 10001 10001 01010 00100",
    "W": "10001 10001 10001 10101 10101 11011 10001",
    "X": "10001 10001 01010 00100 01010 10001 10001",
    "Y": "10001 10001 01010 00100 00100 00100 00100",
    "Z": "11111 00001 00010 00100 01000 10000 11111",
}
FONT = {
    k: np.array([[int(c) for c in row] for row in v.split()], np.float32) for k, v in _ROWS.items()
}


def word_bitmap(word: str) -> np.ndarray:
    """5x7 bitmap of an upper-case word with one empty column between letters: float32 (7, 6n-1)."""
    unknown = sorted(set(word) - set(FONT))
    if unknown or not word:
        raise ValueError(f"word {word!r}: the tiny font has the letters A-Z only, not {unknown}")
    gap = np.zeros((7, 1), np.float32)
    return np.concatenate([part for c in word for part in (FONT[c], gap)], axis=1)[:, :-1]
