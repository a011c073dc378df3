"""English and Chinese words for what is seen in the tiny world."""

from __future__ import annotations

from typing import Literal

import numpy as np

from x2jax.tiny.world import COLOURED_BACKGROUNDS, POSITIONS, SIZES, Object, Scene

Language = Literal["en", "zh"]

# English name -> Chinese name. Several English phrases are keys of their own in world.py.
CHINESE: dict[str, str] = {
    "red": "红色",
    "orange": "橙色",
    "yellow": "黄色",
    "green": "绿色",
    "blue": "蓝色",
    "purple": "紫色",
    "pink": "粉色",
    "brown": "棕色",
    "white": "白色",
    "black": "黑色",
    "circle": "圆形",
    "square": "正方形",
    "triangle": "三角形",
    "star": "星星",
    "heart": "爱心",
    "ring": "圆环",
    "cross": "十字",
    "moon": "月亮",
    "face": "人脸",
    "person": "人",
    "matte": "哑光",
    "shiny": "光亮",
    "striped": "条纹",
    "dotted": "圆点",
    "plain": "纯色",
    "gradient": "渐变",
    "checkered": "格子",
    "meadow": "草地",
    "beach": "沙滩",
    "sea": "大海",
    "starry sky": "星空",
    "snow": "雪地",
    "smiling": "微笑",
    "sad": "难过",
    "surprised": "惊讶",
    "glasses": "眼镜",
    "hat": "帽子",
    "standing": "站立",
    "raising both arms": "举起双手",
    "waving": "挥手",
    "doing the splits": "劈叉",
    "neutral": "正常",
    "warm": "暖色",
    "cold": "冷色",
    "night": "夜晚",
    "sepia": "复古棕褐色",
    "grey": "黑白",
    "realistic": "写实",
    "cartoon": "卡通",
    "sketch": "素描",
    "pixel art": "像素画",
    "blueprint": "蓝图",
    "small": "小",
    "medium": "中等",
    "large": "大",
    "top left": "左上角",
    "top": "上方",
    "top right": "右上角",
    "left": "左边",
    "centre": "中间",
    "right": "右边",
    "bottom left": "左下角",
    "bottom": "下方",
    "bottom right": "右下角",
}


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def position_name(obj: Object) -> str:
    """The nearest of the nine named positions."""
    return min(POSITIONS, key=lambda k: np.hypot(POSITIONS[k][0] - obj.x, POSITIONS[k][1] - obj.y))


def size_name(obj: Object) -> str:
    """The nearest of the named sizes."""
    return min(SIZES, key=lambda k: abs(SIZES[k] - obj.size))


def name(obj: Object, language: Language, material: bool = True, details: bool = False) -> str:
    """A noun phrase without an article.

    `material` names the material where it is not matte, `details` the pose and the accessory.
    """
    zh = language == "zh"
    colour = CHINESE[obj.colour] if zh else obj.colour
    if obj.shape == "face":
        pose = "" if not details else f"{CHINESE[obj.pose]}的" if zh else f"{obj.pose} "
        extra = ""
        if details and obj.extra:
            extra = f"戴{CHINESE[obj.extra]}的" if zh else f" and {obj.extra}"
        return f"{pose}{extra}{colour}头发的人脸" if zh else f"{pose}face with {colour} hair{extra}"
    if obj.shape == "person":
        if zh:
            return f"{'正在' + CHINESE[obj.pose] + '的' if details else ''}穿{colour}衣服的人"
        return f"person in {colour} clothes{' ' + obj.pose if details else ''}"
    if zh:
        kind = CHINESE[obj.material] if material and obj.material != "matte" else ""
        return f"{colour}{kind}{CHINESE[obj.shape]}"
    return (
        f"{obj.material + ' ' if material and obj.material != 'matte' else ''}{colour} {obj.shape}"
    )


def background(scene: Scene, language: Language) -> str:
    """The background as a noun phrase with its article."""
    kind, zh = scene.background, language == "zh"
    if kind in COLOURED_BACKGROUNDS:
        if zh:
            return f"{CHINESE[scene.background_colour]}{CHINESE[kind]}背景"
        return f"a {kind} {scene.background_colour} background"
    if zh:
        return CHINESE[kind]
    return {"snow": "snow", "sea": "the sea", "starry sky": "a starry sky"}.get(kind, f"a {kind}")


def caption(
    scene: Scene,
    rng: np.random.Generator | None = None,
    language: Language = "en",
    form: int = 0,
) -> str:
    """Describe a scene in one sentence: objects, background, word, style and tone.

    Forms 0 and 1 name sizes and places, form 2 does not; `rng` draws the form.
    """
    zh = language == "zh"
    form = form if rng is None else int(rng.integers(3))
    things = []
    for obj in scene.objects:
        noun, size, at = name(obj, language, details=True), size_name(obj), position_name(obj)
        if zh:
            things.append(f"{CHINESE[at]}有一个{CHINESE[size]}的{noun}" if form < 2 else f"{noun}")
        else:
            where = "in the centre" if at == "centre" else f"at the {at}"
            things.append(f"a {size} {noun} {where}" if form < 2 else article(noun))
    if zh:
        text = ("，".join(things) if form < 2 else "和".join(things)) or "空无一物"
        text = f"{text}，背景是{background(scene, language)}"
        text += f"，{CHINESE[scene.word_at]}写着“{scene.word}”" if scene.word else ""
        text += f"，{CHINESE[scene.style]}风格" if scene.style != "realistic" else ""
        text += f"，{CHINESE[scene.tone]}色调" if scene.tone != "neutral" else ""
        return text + "。"
    listed = ", ".join(things[:-1]) + " and " + things[-1] if len(things) > 1 else "".join(things)
    text = f"{listed or 'nothing'} on {background(scene, language)}"
    text += f', with the word "{scene.word}" at the {scene.word_at}' if scene.word else ""
    text += f", in {scene.style} style" if scene.style != "realistic" else ""
    text += f", in {scene.tone} tones" if scene.tone != "neutral" else ""
    text = ("A picture of " + text) if form == 1 else text[0].upper() + text[1:]
    return text + "."
