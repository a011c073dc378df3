"""Editing tasks of the tiny world that change an object or what is behind it."""

from __future__ import annotations

import dataclasses

from x2jax.tiny.captions import CHINESE, article, background
from x2jax.tiny.phrases import HIDES, Change, Rng, both, free_colour, noun, refer, say, some_scene
from x2jax.tiny.world import (
    ACTIONS,
    COLOURED_BACKGROUNDS,
    COLOURS,
    MATERIALS,
    PLACES,
    POSITIONS,
    SHAPE_NAMES,
    SIZES,
    Object,
    Scene,
    backdrop,
    fits,
    pick,
    sample_scene,
)


def removal(rng: Rng) -> Change:
    """1: an object, or the word, goes away."""
    if rng.random() < 0.15:
        source = sample_scene(rng, int(rng.integers(1, 3)), written=True)
        en, zh = say(
            rng,
            ('remove the word "{w}"', "erase the text at the {at}", "delete the text"),
            ("去掉文字“{w}”", "擦除{at}的文字", "删除文字"),
            w=source.word,
            at=both(source.word_at),
        )
        return source, source.replace(word=""), en, zh
    source, i = some_scene(rng)
    en, zh = say(
        rng,
        ("remove the {x}", "delete the {x} from the picture", "take away the {x}", "erase the {x}"),
        ("移除{x}", "删除图中的{x}", "去掉{x}", "把{x}从图片中删掉"),
        x=refer(rng, source.objects[i]),
    )
    return source, source.replace(objects=source.objects[:i] + source.objects[i + 1 :]), en, zh


def addition(rng: Rng) -> Change:
    """2: a new object at a named place, or a word."""
    if rng.random() < 0.12:
        target = sample_scene(rng, int(rng.integers(1, 3)), written=True)
        source = target.replace(word="")
        en, zh = say(
            rng,
            ('write "{w}" at the {at}', 'add the text "{w}" at the {at}'),
            ("在{at}写上“{w}”", "在图片{at}添加文字“{w}”"),
            w=target.word,
            at=both(target.word_at),
        )
        return source, target, en, zh
    while True:
        source = sample_scene(rng, int(rng.integers(1, 3)))
        size, at = pick(rng, SIZES), pick(rng, POSITIONS)
        shape = pick(rng, SHAPE_NAMES, [o.shape for o in source.objects])
        colour = free_colour(rng, source)
        new = Object(shape, colour, pick(rng, MATERIALS), *POSITIONS[at], SIZES[size])
        if fits(source.objects, new):
            break
    en, zh = say(
        rng,
        ("add {x} {at}", "put {x} {at}", "draw {x} {at} of the picture"),
        ("在{at}添加一个{x}", "在图片{at}放一个{x}", "{at}加上一个{x}"),
        x=(article(f"{size} {noun(new)[0]}"), f"{CHINESE[size]}的{noun(new)[1]}"),
        at=("in the centre" if at == "centre" else f"at the {at}", CHINESE[at]),
    )
    return source, source.replace(objects=(*source.objects, new)), en, zh


def change_background(rng: Rng) -> Change:
    """4: the same objects elsewhere."""
    source, _ = some_scene(rng)
    while True:
        kind, colour = backdrop(rng, [o.colour for o in source.objects])
        if kind != source.background:
            break
    target = source.replace(background=kind, background_colour=colour)
    en, zh = say(
        rng,
        (
            "change the background to {b}",
            "replace the background with {b}",
            "put everything on {b}",
        ),
        ("把背景换成{b}", "将背景改为{b}", "背景替换为{b}"),
        b=(background(target, "en"), background(target, "zh")),
    )
    return source, target, en, zh


def change_colour(rng: Rng) -> Change:
    """5: another colour for an object or for the background."""
    source, i = some_scene(rng, figure="person" if rng.random() < 0.15 else "")
    if source.background in COLOURED_BACKGROUNDS and rng.random() < 0.25:
        used = [o.colour for o in source.objects]
        colour = pick(rng, COLOURS, [source.background_colour, "black", "brown", *used])
        target = source.replace(background_colour=colour)
        what = ("background", "背景")
    else:
        target = source.with_object(i, colour=free_colour(rng, source))
        colour, what = target.objects[i].colour, refer(rng, source.objects[i])
        if source.objects[i].shape == "person":
            what = ("clothes of the person", "人的衣服")
    en, zh = say(
        rng,
        ("make the {x} {c}", "change the colour of the {x} to {c}", "paint the {x} {c}"),
        ("把{x}变成{c}", "将{x}的颜色改为{c}", "把{x}涂成{c}"),
        x=what,
        c=both(colour),
    )
    return source, target, en, zh


def change_material(rng: Rng) -> Change:
    """6: another material for an object."""
    source, i = some_scene(rng)
    old = source.objects[i]
    target = source.with_object(i, material=pick(rng, MATERIALS, (old.material,)))
    en, zh = say(
        rng,
        ("make the {x} {m}", "change the material of the {x} to {m}", "give the {x} a {m} look"),
        ("把{x}变成{m}的", "将{x}的材质改为{m}", "让{x}看起来是{m}材质"),
        x=both(old.shape) if rng.random() < 0.5 else noun(old, material=False),
        m=both(target.objects[i].material),
    )
    return source, target, en, zh


def change_action(rng: Rng) -> Change:
    """7: a person does something else, or an object turns."""
    if rng.random() < 0.7:
        source = sample_scene(rng, int(rng.integers(1, 3)), "person")
        target = source.with_object(0, pose=pick(rng, ACTIONS, (source.objects[0].pose,)))
        en, zh = say(
            rng,
            (
                "make the person {a}",
                "change the action of the person to {a}",
                "show the person {a}",
            ),
            ("让这个人{a}", "把人的动作改为{a}", "改成人在{a}"),
            a=both(target.objects[0].pose),
        )
        for gerund, verb in (
            ("standing", "stand"),
            ("raising", "raise"),
            ("waving", "wave"),
            ("doing", "do"),
        ):
            en = en.replace(f"Make the person {gerund}", f"Make the person {verb}")
        return source, target, en, zh
    while True:
        source, i = some_scene(rng)
        if source.objects[i].shape not in ("circle", "ring"):
            break
    side = pick(rng, (("right", 30.0), ("left", -30.0)))
    target = source.with_object(i, angle=side[1])
    en, zh = say(
        rng,
        ("tilt the {x} to the {s}", "make the {x} lean to the {s}"),
        ("把{x}向{s}倾斜", "让{x}向{s}歪"),
        x=refer(rng, source.objects[i]),
        s=(side[0], {"left": "左", "right": "右"}[side[0]]),
    )
    return source, target, en, zh


def replacement(rng: Rng) -> Change:
    """8: another object in the place of one."""
    source, i = some_scene(rng)
    old = source.objects[i]
    new = dataclasses.replace(
        old,
        shape=pick(rng, SHAPE_NAMES, [o.shape for o in source.objects]),
        colour=free_colour(rng, source),
        material=pick(rng, MATERIALS),
    )
    target = source.with_object(i, **dataclasses.asdict(new))
    en, zh = say(
        rng,
        ("replace the {x} with {y}", "swap the {x} for {y}", "turn the {x} into {y}"),
        ("把{x}替换成{z}", "将{x}换成{z}", "用{z}代替{x}"),
        x=refer(rng, old),
        y=article(noun(new)[0]),
        z=noun(new)[1],
    )
    return source, target, en, zh


def subject(rng: Rng) -> Change:
    """15: the object of the source, large in the centre of a new place."""
    source = sample_scene(rng, 1, pick(rng, ("", "", "", "face", "person")))
    obj = source.objects[0]
    kind = pick(rng, PLACES, [source.background, *(k for k in PLACES if obj.colour in HIDES[k])])
    new = dataclasses.replace(obj, x=0.0, y=0.0, size=0.62)
    target = Scene(kind, source.background_colour, (new,))
    en, zh = say(
        rng,
        ("show this {x} large in the centre, on {b}", "a close-up of the same {x} on {b}"),
        ("在{b}上展示这个{x}，居中放大", "同一个{x}在{b}上的特写"),
        x=both(obj.shape),
        b=(background(target, "en"), CHINESE[kind]),
    )
    return source, target, en, zh
