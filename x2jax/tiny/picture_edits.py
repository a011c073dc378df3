"""Editing tasks of the tiny world on portraits, words, the whole picture, and by reasoning."""

from __future__ import annotations

from x2jax.tiny import riddles
from x2jax.tiny.captions import CHINESE
from x2jax.tiny.phrases import Change, Rng, both, free_colour, say, some_scene
from x2jax.tiny.world import (
    ACCESSORIES,
    EXPRESSIONS,
    STYLES,
    TONES,
    WORDS,
    pick,
    sample_scene,
)


def style(rng: Rng) -> Change:
    """3: another style for the whole picture."""
    source = sample_scene(rng)
    target = source.replace(style=pick(rng, STYLES, ("realistic",)))
    en, zh = say(
        rng,
        ("turn the picture into {s} style", "change the style to {s}", "make it look like {s} art"),
        ("把图片变成{s}风格", "将风格改为{s}", "转换为{s}风格"),
        s=both(target.style),
    )
    return source, target, en.replace("art art", "art"), zh


def portrait(rng: Rng) -> Change:
    """9: expression, accessory or hair of a face."""
    source = sample_scene(rng, 1 if rng.random() < 0.6 else 2, "face")
    face = source.objects[0]
    what = pick(rng, ("pose", "extra", "colour"))
    if what == "pose":
        new = pick(rng, EXPRESSIONS, (face.pose,))
        en, zh = say(
            rng,
            ("change the expression to {e}", "make the face look {e}"),
            ("把表情改成{e}", "让这张脸显得{e}"),
            e=both(new),
        )
    elif what == "colour":
        new = free_colour(rng, source)
        en, zh = say(
            rng,
            ("dye the hair {c}", "change the hair colour to {c}", "give the face {c} hair"),
            ("把头发染成{c}", "将发色改为{c}"),
            c=both(new),
        )
    else:
        new = pick(rng, ACCESSORIES, (face.extra,))
        if new:
            english = ("let the face wear {a}", "put {a} on the face")
            chinese = ("给这张脸戴上{a}", "戴上{a}")
            if face.extra:  # one accessory at a time, so say that the old one goes
                english, chinese = ("replace the {o} with {a}",), ("把{o}换成{a}",)
        else:
            english, chinese = (
                ("take off the {o}", "remove the {o} from the face"),
                ("摘下{o}", "去掉{o}"),
            )
        worn = ("a hat" if new == "hat" else new, CHINESE.get(new, ""))
        en, zh = say(rng, english, chinese, a=worn, o=(face.extra, CHINESE.get(face.extra, "")))
    return source, source.with_object(0, **{what: new}), en, zh


def change_text(rng: Rng) -> Change:
    """10: another word in the same place."""
    source = sample_scene(rng, int(rng.integers(1, 3)), written=True)
    target = source.replace(word=pick(rng, WORDS, (source.word,)))
    en, zh = say(
        rng,
        ('change the text "{a}" to "{b}"', 'replace "{a}" with "{b}"', 'make the text say "{b}"'),
        ("把文字“{a}”改成“{b}”", "将“{a}”替换为“{b}”", "让文字变成“{b}”"),
        a=source.word,
        b=target.word,
    )
    return source, target, en, zh


def change_tone(rng: Rng) -> Change:
    """11: another colour tone for the whole picture."""
    source = sample_scene(rng)
    target = source.replace(tone=pick(rng, TONES, ("neutral",)))
    en, zh = say(
        rng,
        ("give the picture {t} tones", "change the tone to {t}", "apply a {t} colour grade"),
        ("把图片改成{t}色调", "将色调变为{t}", "使用{t}调色"),
        t=both(target.tone),
    )
    return source, target, en, zh


def move_camera(rng: Rng) -> Change:
    """12: zoom by 1.5 or 1/1.5, or move by a fifth of the picture."""
    source, _ = some_scene(rng)
    moves = {
        "zoom in": ("把镜头拉近", {"zoom": 1.5}),
        "zoom out": ("把镜头拉远", {"zoom": 1 / 1.5}),
        "move the camera to the left": ("相机向左移动", {"pan": (-0.4, 0.0)}),
        "move the camera to the right": ("相机向右移动", {"pan": (0.4, 0.0)}),
        "move the camera up": ("相机向上移动", {"pan": (0.0, -0.4)}),
        "move the camera down": ("相机向下移动", {"pan": (0.0, 0.4)}),
    }
    move = pick(rng, moves)
    en, zh = say(rng, ("{m}", "please {m}"), ("{m}", "请{m}"), m=(move, moves[move][0]))
    return source, source.replace(**moves[move][1]), en, zh


def reasoning(rng: Rng) -> Change:
    """13: the thing to edit, or the outcome, has to be inferred."""
    if rng.random() < 0.2:
        source, _ = some_scene(rng)
        source = source.replace(background=pick(rng, ("meadow", "beach")))
        english, chinese, changes = riddles.EVENTS[int(rng.integers(len(riddles.EVENTS)))]
        return source, source.replace(**changes), *say(rng, english, chinese)
    source, i = some_scene(rng, 2)
    what = riddles.describe(rng, source.objects, i)
    if rng.random() < 0.4:
        rest = source.objects[:i] + source.objects[i + 1 :]
        return (
            source,
            source.replace(objects=rest),
            *say(rng, ("remove {x}",), ("移除{x}",), x=what),
        )
    colour = free_colour(rng, source)
    plain = rng.random() < 0.5
    en, zh = say(
        rng,
        ("make {x} {c}",) if plain else ("give {x} the colour of {c}",),
        ("把{x}变成{c}",) if plain else ("把{x}变成{c}的颜色",),
        x=what,
        c=both(colour) if plain else riddles.COLOUR_OF[colour],
    )
    return source, source.with_object(i, colour=colour), en, zh
