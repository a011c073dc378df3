"""The scale of a LoRA: alpha over rank, from a tensor or from PEFT's settings."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.rules import WeightsError

METADATA = "lora_adapter_metadata"
"""Key of the header under which diffusers keeps PEFT's settings, as JSON."""
CONFIG = "adapter_config.json"
"""PEFT's own file of settings, beside the weights."""


def read_settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any] | None:
    """PEFT's settings of a LoRA file: from its header, or from the file beside it.

    Args:
      path: the file or its folder.
      metadata: of the file's header.

    Raises:
      WeightsError: settings that are not JSON, or of something that is not a plain LoRA.
    """
    beside = (path if path.is_dir() else path.parent) / CONFIG
    text, where = metadata.get(METADATA), f"{METADATA} in the header of {path}"
    if text is None:
        if not beside.is_file():
            return None
        text, where = beside.read_text(), str(beside)
    try:
        found = json.loads(text)
        if not isinstance(found, dict):
            raise ValueError(f"a {type(found).__name__}, not an object")
    except ValueError as e:
        raise WeightsError(f"settings of a LoRA, {where}", [f"not readable: {e}"]) from None
    found = {k.removeprefix("transformer."): v for k, v in found.items()}
    wrong = [
        f"{key}: {found[key]!r}; only plain LoRA can be read"
        for key in ("use_dora", "use_qalora", "alora_invocation_tokens", "arrow_config")
        if found.get(key)
    ]
    if found.get("peft_type", "LORA") != "LORA":
        wrong.append(f"peft_type: {found['peft_type']!r}; only LORA can be read")
    if wrong:
        raise WeightsError(f"settings of a LoRA, {where}", wrong)
    return found


def scale_of(
    target: str, rank: int, alpha: float | None, settings: Mapping[str, Any] | None
) -> float:
    """alpha / rank of one linear; 1 where neither a tensor nor settings say otherwise.

    Args:
      target: name of the linear.
      rank: of its tensors.
      alpha: from its own tensor.
      settings: as `read_settings` gives them.

    Raises:
      ValueError: settings that contradict the tensors.
    """
    if not settings or "lora_alpha" not in settings:
        return 1.0 if alpha is None else alpha / rank
    stated = _pattern(settings.get("rank_pattern"), target, settings.get("r", rank))
    if stated != rank:
        raise ValueError(f"{target} has rank {rank}, the settings beside it say {stated}")
    of_settings = _pattern(settings.get("alpha_pattern"), target, settings["lora_alpha"])
    if alpha is not None and alpha != of_settings:
        raise ValueError(
            f"{target} has an alpha of {alpha:g}, the settings beside it say {of_settings:g}"
        )
    return of_settings / (math.sqrt(rank) if settings.get("use_rslora") else rank)


def _pattern(patterns: Mapping[str, Any] | None, target: str, default: Any) -> Any:
    """The value of the first pattern that names this linear, as PEFT looks it up."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", target):
            return value
    return default
