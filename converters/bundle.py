"""A folder for diffusers users: the X2Edit trio as safetensors, and one PyTorch file that runs it.

The folder is an X2Edit adapter too: `python -m converters import` reads it back.
"""

import json
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from converters.rules import WeightsError
from x2jax.data.edits import BUCKETS
from x2jax.data.tasks import TASKS

NAME = "diffusers-pipeline"
WHAT = "folder with an X2Edit adapter and a PyTorch file that runs it on diffusers' FLUX.1"
TEMPLATES = Path(__file__).parent / "templates"
PIPELINE = "pipeline.py"
CONFIG = "x2edit.json"
COMPONENTS = ("transformer", "vae", "scheduler", "mllm", "mllm_tokenizer", "alignnet")


class Bundle(NamedTuple):
    """What can be exported and is no format of its own: its name on the command line, and help."""

    name: str = NAME
    what: str = WHAT


def settings(config: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """What the PyTorch file needs to know beside the weights.

    Args:
      config: of the trio, as `formats.x2edit.x2edit_config` gives it.
      meta: of the run: `config`, and `step` and `fingerprints` where there are any.

    Raises:
      WeightsError: an adapter that is not X2Edit's: every difference is listed.
    """
    run, lora = meta["config"], dict(config["lora"])
    series = tuple(run["adapter"].get("series", ("img_attn/proj",)))
    wanted = tuple(p for p in lora["double"] if p == "img_attn/proj")
    if series != wanted:
        reason = f"series adapters {series}; the published form has {wanted} in series"
        raise WeightsError(f"export as {NAME}", [reason])
    lora["double"] = [p.removeprefix("img_attn/") for p in lora["double"]]
    lora["single"] = [p.removeprefix("attn/") for p in lora["single"]]
    lora["top_k"] = run["adapter"]["top_k"]
    rows = config["tasks"]
    names = [*TASKS[:rows], *(f"task {i}" for i in range(len(TASKS), rows))]
    return {
        "lora": lora,
        "alignnet": dict(config["alignnet"]),
        "tasks": names,
        "text": {k: run["text"][k] for k in ("length", "template")},
        "source_offset": run["objective"]["source_offset"],
        "buckets": [list(b) for b in BUCKETS[run["image"]["buckets"]]],
        "sampler": {k: run["preview"][k] for k in ("steps", "guidance")},
        "trained": {k: meta[k] for k in ("step", "fingerprints") if k in meta},
    }


def write(out: Path, content: Mapping[str, Any]) -> list[Path]:
    """Writes what stands beside the weights: settings, pipeline, index and a note; returns them."""
    index = {"_class_name": ["pipeline", "X2EditPipeline"], "_diffusers_version": "0.31.0"}
    index |= {name: [None, None] for name in COMPONENTS}
    note = string.Template((TEMPLATES / "README.md.txt").read_text())
    texts = {
        CONFIG: json.dumps(content, indent=2) + "\n",
        "model_index.json": json.dumps(index, indent=2) + "\n",
        PIPELINE: (TEMPLATES / f"{PIPELINE}.txt").read_text(),
        "README.md": note.substitute(tasks=", ".join(content["tasks"])),
    }
    for name, text in texts.items():
        (out / name).write_text(text)
    return [out / name for name in texts]
