"""What is seen in the tiny world: scenes of shapes, faces and people, and their random sampling.

Scene coordinates: positions are fractions of the half width and half height (-1..1, x right, y
down), sizes are radii in half shorter sides.
"""

from __future__ import annotations

import dataclasses

import numpy as np

from x2jax.tiny import shapes

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (226, 38, 44),
    "orange": (248, 136, 18),
    "yellow": (250, 214, 30),
    "green": (36, 160, 62),
    "blue": (32, 92, 220),
    "purple": (136, 52, 180),
    "pink": (248, 128, 176),
    "brown": (124, 74, 40),
    "white": (246, 246, 246),
    "black": (28, 28, 32),
}
COLOURED_BACKGROUNDS = ("plain", "gradient", "checkered")
PLACES = ("meadow", "beach", "sea", "starry sky", "snow")
BACKGROUNDS = COLOURED_BACKGROUNDS + PLACES
SHAPE_NAMES = tuple(shapes.SHAPES)
MATERIALS = ("matte", "shiny", "striped", "dotted")
EXPRESSIONS = ("smiling", "sad", "surprised")
ACCESSORIES = ("", "glasses", "hat")
ACTIONS = tuple(shapes.PERSON_LIMBS)
TONES = ("neutral", "warm", "cold", "night", "sepia", "grey")
STYLES = ("realistic", "cartoon", "sketch", "pixel art", "blueprint")
WORDS = ("HI", "GO", "YES", "NO", "CAT", "SUN", "JAX", "ART", "LOVE", "STAR", "OPEN", "SALE")
SIZES = {"small": 0.28, "medium": 0.38, "large": 0.5}
POSITIONS = {
    "top left": (-0.52, -0.52),
    "top": (0.0, -0.52),
    "top right": (0.52, -0.52),
    "left": (-0.52, 0.0),
    "centre": (0.0, 0.0),
    "right": (0.52, 0.0),
    "bottom left": (-0.52, 0.52),
    "bottom": (0.0, 0.52),
    "bottom right": (0.52, 0.52),
}


@dataclasses.dataclass(frozen=True)
class Object:
    """One thing in a scene.

    `shape` is one of SHAPE_NAMES, "face" (`colour` is the hair, `pose` an expression, `extra` an
    accessory) or "person" (`colour` is the clothing, `pose` an action). `size` is the radius in
    half shorter sides of the picture, `angle` in degrees clockwise.
    """

    shape: str
    colour: str
    material: str = "matte"
    x: float = 0.0
    y: float = 0.0
    size: float = SIZES["large"]
    angle: float = 0.0
    pose: str = ""
    extra: str = ""


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture: background, objects back to front, an optional word, tone, style and camera.

    `zoom` > 1 brings the scene closer; `pan` moves the camera, in half shorter sides.
    """

    background: str = "plain"
    background_colour: str = "blue"
    objects: tuple[Object, ...] = ()
    word: str = ""
    word_at: str = "bottom"
    tone: str = "neutral"
    style: str = "realistic"
    zoom: float = 1.0
    pan: tuple[float, float] = (0.0, 0.0)

    def replace(self, **changes) -> Scene:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def with_object(self, index: int, **changes) -> Scene:
        """A copy in which object `index` has some fields changed."""
        objects = list(self.objects)
        objects[index] = dataclasses.replace(objects[index], **changes)
        return self.replace(objects=tuple(objects))


def pick(rng: np.random.Generator, options, exclude=()) -> str:
    """One of `options` that is not in `exclude`, uniformly."""
    left = [o for o in options if o not in exclude]
    return left[int(rng.integers(len(left)))]


def backdrop(rng: np.random.Generator, avoid_colours=()) -> tuple[str, str]:
    """A background (kind, colour) whose colour hides no object of the given colours."""
    hidden = {"green": "meadow", "yellow": "beach", "blue": "sea", "black": "starry sky"}
    hidden |= {"white": "snow", "purple": "starry sky"}
    kind = pick(rng, BACKGROUNDS, {hidden[c] for c in avoid_colours if c in hidden})
    return kind, pick(rng, COLOURS, {*avoid_colours, "brown", "black", "white"})


def fits(objects, obj: Object) -> bool:
    """True if `obj` overlaps none of `objects` (by their discs, on a square picture)."""
    return all(np.hypot(o.x - obj.x, o.y - obj.y) > 0.94 * (o.size + obj.size) for o in objects)


def sample_scene(
    rng: np.random.Generator,
    objects: int | None = None,
    figure: str = "",
    written: bool | None = None,
) -> Scene:
    """A random realistic, neutral scene of 1-3 objects that differ in colour and in shape.

    `objects` fixes their number, `figure` ("face" or "person") makes the first object that figure.
    `written` says whether there is a word; None: sometimes, if `objects` is None.
    """
    count = int(rng.integers(1, 4)) if objects is None else objects
    if written is None:
        written = objects is None and count < 3 and rng.random() < 0.25
    word = pick(rng, WORDS) if written else ""
    word_at = pick(rng, ("top", "bottom"))
    found: list[Object] = []
    while len(found) < count:
        kind = figure if figure and not found else pick(rng, SHAPE_NAMES, [o.shape for o in found])
        size = "small" if count == 3 else pick(rng, tuple(SIZES)[count == 1 :])
        radius = SIZES[size]
        if figure and not found:
            radius = max(radius, SIZES["medium"] if count > 1 else 0.6)
        colour = pick(rng, COLOURS, [o.colour for o in found])
        material = "matte" if kind in ("face", "person") else pick(rng, MATERIALS)
        pose = {"face": EXPRESSIONS, "person": ACTIONS}.get(kind, ("",))
        extra = pick(rng, ACCESSORIES) if kind == "face" else ""
        for _ in range(20):
            x, y = rng.uniform(-1, 1, 2) * max(0.0, 0.94 - radius)
            if word:  # clear of the banner, a fifth of the picture
                y = y * max(0.0, 0.78 - radius) / (0.94 - radius) + (
                    0.2 if word_at == "top" else -0.2
                )
            angle = 0.0
            candidate = Object(
                kind, colour, material, float(x), float(y), radius, angle, pick(rng, pose), extra
            )
            if fits(found, candidate):
                found.append(candidate)
                break
        else:
            found.clear()  # a crowded start: lay the picture out again
    kind, colour = backdrop(rng, [o.colour for o in found])
    return Scene(kind, colour, tuple(found), word, word_at)
