"""What stands where in a picture of the tiny world, in the language model's own words.

The first lesson of the tiny vision tower: a token should look like the words for what is seen in
its cell. Input embeddings of words lie close together, at four fifths of their length; what tells
words of one kind apart is where they lie around the middle of their kind. A cell's target is the
middle of all words, and from there a step towards every word that is true of it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from x2jax.tiny import world
from x2jax.tiny.captions import position_name, size_name

KINDS = {
    "colour": tuple(world.COLOURS),
    "shape": (*world.SHAPE_NAMES, "face", "person"),
    "size": tuple(world.SIZES),
    "place": tuple(world.POSITIONS),
    "material": tuple(world.MATERIALS),
    "background": tuple(world.BACKGROUNDS),
    "its colour": tuple(world.COLOURS),
    "written": tuple(world.WORDS),
}
STEP = 0.3
"""Length of a step: about as far as words of a kind lie from its middle."""


class Words(NamedTuple):
    """Attributes:
    middle_D: mean embedding of all words.
    steps: kind -> a unit vector for each word, from the middle of the kind.
    """

    middle_D: Float[np.ndarray, "D"]
    steps: dict[str, Float[np.ndarray, "words D"]]


class Sights(NamedTuple):
    """Cells of a batch of pictures, row by row.

    Attributes:
      targets_BMD: what their tokens should be.
      truth: kind -> index of the true word, -1 where a cell shows no such thing, or little of it.
    """

    targets_BMD: Float[np.ndarray, "B M D"]
    truth: dict[str, Int[np.ndarray, "B M"]]


def words_of(tokenizer, embedding: Float[np.ndarray, "vocab D"]) -> Words:
    """The world's words by their input embeddings; several tokens of a name add up."""
    found = {
        kind: np.stack([embedding[tokenizer(" " + n)["input_ids"]].sum(axis=0) for n in names])
        for kind, names in KINDS.items()
    }
    middle_D = np.mean([x.mean(axis=0) for x in found.values()], axis=0)
    steps = {kind: x - x.mean(axis=0) for kind, x in found.items()}
    return Words(
        middle_D, {k: x / np.linalg.norm(x, axis=1, keepdims=True) for k, x in steps.items()}
    )


def facts(scene: world.Scene, obj: world.Object | None) -> dict[str, str]:
    """Kind -> word of what is said of an object, or of the background."""
    if obj is not None:
        own = {"colour": obj.colour, "shape": obj.shape, "material": obj.material}
        return own | {"size": size_name(obj), "place": position_name(obj)}
    own = {"background": scene.background}
    if scene.background in world.COLOURED_BACKGROUNDS:
        own["its colour"] = scene.background_colour
    return own


def cells(scene: world.Scene, edge: int, rows: int) -> list[dict[str, tuple[str, float]]]:
    """Kind -> (word, weight up to 1), for every cell of a picture of `rows` x `rows` cells."""

    def by_cell(picture_HW):
        n = edge // rows
        return picture_HW.reshape(rows, n, rows, n).mean(axis=(1, 3)).reshape(-1)

    covers = [by_cell(world.coverage(o, scene, (edge, edge))) for o in scene.objects]
    shown = np.zeros((edge, edge))
    if scene.word:
        shown[world.word_box(scene, (edge, edge))] = 1
    banner = by_cell(shown)
    out = []
    for m in range(rows * rows):
        best = max(range(len(covers)), key=lambda k, m=m: covers[k][m])
        # A quarter of a cell is as good as all of it.
        free = 1 - 0.7 * banner[m]
        share = min(1.0, 4 * float(covers[best][m]))
        near = {k: (w, free * share) for k, w in facts(scene, scene.objects[best]).items()}
        far = {k: (w, free * (1 - share)) for k, w in facts(scene, None).items()}
        out.append(near | far | ({"written": (scene.word, banner[m])} if scene.word else {}))
    return out


def look(scenes: list[world.Scene], words: Words, edge: int, rows: int) -> Sights:
    """What the cells of some pictures show."""
    shape = len(scenes), rows * rows
    targets_BMD = np.tile(words.middle_D.astype(np.float32), (*shape, 1))
    truth = {kind: np.full(shape, -1, np.int32) for kind in KINDS}
    for b, scene in enumerate(scenes):
        for m, said in enumerate(cells(scene, edge, rows)):
            for kind, (word, weight) in said.items():
                index = KINDS[kind].index(word)
                targets_BMD[b, m] += STEP * weight * words.steps[kind][index]
                if weight > 0.6:
                    truth[kind][b, m] = index
    return Sights(targets_BMD, truth)


def likeness(tokens_BMD, words: Words, kind: str):
    """How much tokens are like each word of a kind; 1 is a whole step towards it."""
    return (tokens_BMD - words.middle_D) @ words.steps[kind].T / STEP


def nearest(tokens_BMD: Float[np.ndarray, "B M D"], sights: Sights, words: Words) -> dict:
    """Kind -> how often a cell's token is most like the true word, of all words of the kind."""
    out = {}
    for kind, truth in sights.truth.items():
        there = truth >= 0
        found = likeness(tokens_BMD[there], words, kind).argmax(axis=-1)
        out[kind] = float((found == truth[there]).mean())
    return out
