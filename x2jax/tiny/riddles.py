"""Descriptions that have to be understood: for the reasoning task of the tiny world."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from x2jax.tiny.world import Object

# Colour -> a thing of that colour, in English and Chinese.
COLOUR_OF: dict[str, tuple[str, str]] = {
    "red": ("a ripe strawberry", "成熟草莓"),
    "orange": ("a carrot", "胡萝卜"),
    "yellow": ("a lemon", "柠檬"),
    "green": ("grass", "青草"),
    "blue": ("a clear sky", "晴空"),
    "purple": ("an eggplant", "茄子"),
    "pink": ("a flamingo", "火烈鸟"),
    "brown": ("chocolate", "巧克力"),
    "white": ("milk", "牛奶"),
    "black": ("coal", "煤炭"),
}
SHAPE_IS: dict[str, tuple[str, str]] = {
    "circle": ("the shape of a wheel", "像车轮的图形"),
    "square": ("the shape with four equal sides", "四条边相等的图形"),
    "triangle": ("the shape with three sides", "有三条边的图形"),
    "star": ("the shape with five points", "有五个尖角的图形"),
    "heart": ("the symbol of love", "象征爱情的图形"),
    "ring": ("the thing worn on a finger", "戴在手指上的东西"),
    "cross": ("the sign for adding numbers", "表示加法的符号"),
    "moon": ("the thing that circles the Earth", "绕着地球转的东西"),
}
# What happens to a meadow or a beach: English, Chinese, the fields of the scene that change.
EVENTS: tuple[tuple[tuple[str, ...], tuple[str, ...], dict[str, str]], ...] = (
    (
        ("show this place after the sun has set", "what does this look like at midnight"),
        ("展示太阳下山后的样子", "午夜时这里是什么样子"),
        {"tone": "night"},
    ),
    (
        ("a photo of this taken a hundred years ago", "make it an old photograph"),
        ("变成一百年前拍的照片", "做成一张老照片"),
        {"tone": "sepia"},
    ),
    (
        ("show this place after a blizzard", "winter has come to this place"),
        ("展示暴风雪过后的样子", "这里到了冬天"),
        {"background": "snow"},
    ),
)
_PLACES = (
    ("the leftmost object", "最左边的物体", lambda o: -o.x),
    ("the rightmost object", "最右边的物体", lambda o: o.x),
    ("the highest object", "位置最高的物体", lambda o: -o.y),
    ("the lowest object", "位置最低的物体", lambda o: o.y),
    ("the largest object", "最大的物体", lambda o: 2 * o.size),
    ("the smallest object", "最小的物体", lambda o: -2 * o.size),
)


def describe(rng: np.random.Generator, objects: Sequence[Object], index: int) -> tuple[str, str]:
    """Name object `index` by what it is like or where it is, in English and Chinese.

    Superlatives are used only with a clear margin (a sixth of the half picture).
    """
    obj = objects[index]
    english, chinese = COLOUR_OF[obj.colour]
    options = [
        (f"the object that has the colour of {english}", f"颜色像{chinese}的物体"),
        SHAPE_IS[obj.shape],
    ]
    for english, chinese, score in _PLACES:
        others = [score(o) for k, o in enumerate(objects) if k != index]
        if others and score(obj) > max(others) + 1 / 6:
            options.append((english, chinese))
    return options[int(rng.integers(len(options)))]
