"""What the JSON of a sample says: task, instruction, and whether its scores pass the filters."""

from __future__ import annotations

import ast
import dataclasses
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from x2jax.data import tasks

ENGLISH, CHINESE = 1, 2
"""Bits of the languages that a sample has an instruction in."""

EDITS, PICTURES = "edits", "pictures"
LAYOUTS = (EDITS, PICTURES)
"""What a sample is: source, instruction and target; or a picture and its caption."""

_CJK = re.compile(r"[㐀-䶿一-鿿豈-﫿]")


class Dropped(Exception):
    """A sample that is not used; the message is the reason under which it is counted."""


@dataclasses.dataclass(frozen=True)
class Filters:
    """Score thresholds by `label`, as in the published X2Edit data code."""

    delete_score: float = 9.0
    step1x_liqe: float = 3.0
    step1x_aesthetic: float = 4.8
    step1x_liqe_clip: float = 0.6
    step1x_score_7b: float = 9.0
    step1x_score: float = 18.0
    gpt4o_aesthetic: float = 6.0
    gpt4o_dropped: tuple[str, ...] = ("动作更改", "人物修图", "文字更改")


def parse(data: bytes) -> dict[str, Any]:
    """The JSON object of a sample.

    Raises:
      Dropped: it is not a JSON object.
    """
    try:
        record = json.loads(data.decode("utf-8-sig"))
    except ValueError:
        raise Dropped("unreadable JSON") from None
    if not isinstance(record, dict):
        raise Dropped("unreadable JSON")
    return record


def task_of(record: Mapping[str, Any]) -> int:
    """Task index.

    Raises:
      Dropped: no task, or one that the alias table does not know.
    """
    name = record.get("task")
    if not isinstance(name, str) or not name.strip():
        raise Dropped("no task")
    task = tasks.lookup(name)
    if task is None:
        raise Dropped(f"unknown task: {name.strip()}")
    return task


def instructions(record: Mapping[str, Any]) -> dict[int, str]:
    """Instruction by language bit; `instruction` counts for the language that it is written in."""
    out: dict[int, str] = {}
    for key, language in (("instruction_en", ENGLISH), ("instruction_zh", CHINESE)):
        text = record.get(key)
        if isinstance(text, str) and text.strip():
            out[language] = text.strip()
    text = record.get("instruction")
    if isinstance(text, str) and text.strip():
        out.setdefault(CHINESE if _CJK.search(text) else ENGLISH, text.strip())
    return out


CAPTION_KEYS = ("caption_target", "caption", "text", "prompt")
"""Where the JSON of a picture has its caption: X2Edit's key, and the usual ones."""


def captions(data: bytes) -> dict[int, str]:
    """Caption of a picture by language bit: of a JSON object, or the text itself.

    Raises:
      Dropped: broken JSON, or text that is not UTF-8.
    """
    if data.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        record = parse(data)
        text = next((v for k in CAPTION_KEYS if isinstance(v := record.get(k), str)), "")
    else:
        try:
            text = data.decode("utf-8-sig")
        except ValueError:
            raise Dropped("caption is not UTF-8") from None
    text = text.strip()
    return {CHINESE if _CJK.search(text) else ENGLISH: text} if text else {}


def texts(data: bytes, layout: str) -> dict[int, str]:
    """What conditions a sample, by language bit: instructions of "edits", captions of "pictures".

    Raises:
      Dropped: there is none, or it is broken.
    """
    found = captions(data) if layout == PICTURES else instructions(parse(data))
    if not found:
        raise Dropped("no caption" if layout == PICTURES else "no instruction")
    return found


def choose(found: Mapping[int, str], language: int) -> str:
    """The text in `language`, or in the other one where that is all there is."""
    return found.get(language) or next(iter(found.values()))


def total(value: Any) -> float | None:
    """Sum of a score, which is a number, a list, or a string that holds either; None if absent."""
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, (int, float)):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, (list, tuple)) and value:
        parts = [total(v) for v in value]
        return None if None in parts else float(sum(p for p in parts if p is not None))
    return None


def check_scores(record: Mapping[str, Any], filters: Filters) -> None:
    """Applies the filters of the record's label; a score that is missing fails its threshold.

    Raises:
      Dropped: with the threshold that it missed.
    """
    label = str(record.get("label") or "").strip().lower()

    def at_least(key: str, least: float) -> None:
        value = total(record.get(key))
        if value is None:
            raise Dropped(f"{label}: no {key}")
        if value < least:
            raise Dropped(f"{label}: {key} below {least:g}")

    if label == "delete":
        at_least("score", filters.delete_score)
    elif label == "step1x":
        if total(record.get("score_7b")) is None and total(record.get("score")) is not None:
            at_least("score", filters.step1x_score)  # rows that only the 72B model judged
        else:
            at_least("liqe_score_edit", filters.step1x_liqe)
            at_least("aesthetic_score_v2_5_edit", filters.step1x_aesthetic)
            at_least("liqe_score_clip_edit", filters.step1x_liqe_clip)
            at_least("score_7b", filters.step1x_score_7b)
    elif label == "gpt4o":
        if total(record.get("score_7b")) is None:
            at_least("aesthetic_score", filters.gpt4o_aesthetic)
        elif tasks.normalise(str(record.get("task"))) in filters.gpt4o_dropped:
            raise Dropped(f"gpt4o: task {str(record['task']).strip()}")
