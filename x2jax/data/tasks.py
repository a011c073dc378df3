"""The 16 tasks of X2Edit and the names that data sets give them."""

from __future__ import annotations

TASKS = (
    "unknown",
    "subject deletion",
    "subject addition",
    "style change",
    "background change",
    "colour change",
    "material change",
    "action change",
    "subject replacement",
    "portrait editing",
    "text change",
    "tone transform",
    "camera movement",
    "reasoning",
    "low-level",
    "subject-driven generation",
)
"""Task names by index; the index is the row of the task table."""

_NAMES: dict[int, tuple[str, ...]] = {
    1: ("删除主体", "removal", "remove", "ObjectRemoval", "WaterMarkRemoval", "SnowRemoval"),
    2: ("添加主体", "addition", "add"),
    3: ("风格更改", "style", "style_change", "change style"),
    4: ("背景更改", "background_change"),
    # The published 512 px recipe files attribute_modification under 5, the 1024 px one under 7.
    5: ("颜色更改", "color_alter", "Colorization", "color change"),
    6: ("材料更改", "材质更改", "material_alter", "material_change", "visual_material_change"),
    7: ("动作更改", "motion_change", "action_change", "attribute_modification"),
    8: ("替换主体", "subject-replace", "swap", "replace"),
    9: ("人物修图", "ps_human", "appearance_alter", "change expression", "portrait"),
    10: ("文字更改", "text_change"),
    11: ("色调变换", "色调迁移", "tune_transfer", "tone_transfer", "tone transform"),
    12: ("相机移动", "movement", "rotation_change", "resize", "Camera Move Editing"),
    13: ("Reasoning", "implicit_change", "relation", "Reasoning Editing"),
    14: ("low_leval", "low_level"),  # the first is how the data spells it
    15: ("subject", "style transfer", "personalized generation"),
}


def normalise(name: str) -> str:
    """Lower case, outer whitespace off, underscores to spaces."""
    return name.strip().lower().replace("_", " ")


def _aliases() -> dict[str, int]:
    table: dict[str, int] = {}
    for task, names in _NAMES.items():
        for name in (TASKS[task], *names):
            if table.setdefault(normalise(name), task) != task:
                raise ValueError(
                    f"alias {name!r} stands for tasks {table[normalise(name)]} and {task}"
                )
    return table


ALIASES = _aliases()
"""Normalised name to task index; "unknown" is not in it, so nothing becomes task 0 by accident."""


def lookup(name: str) -> int | None:
    """Task index of a raw name, or None for a name that is not in the table."""
    return ALIASES.get(normalise(name))
