"""Write tiny-world edits in the on-disk format of X2Edit-Dataset.

    python -m x2jax.tiny.shards --out DIR --n 10000 --seed 0

gives `DIR/<source>/0/00000.tar` and so on: webdataset tars of adjacent members `000000000.1.0.jpg`
(source), `.2.jpg` (target), `.json` and `.txt` (the instruction). Raw task names, languages and
scores vary as they do in the published data; every row passes the filters of the reference. The
same arguments give the same bytes with the same versions of Pillow and NumPy.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from x2jax.tiny.edits import TASKS, Edit, edit
from x2jax.tiny.world import pick

# Names of each task that occur in the published data (the English ones of several spellings too).
RAW_NAMES: dict[int, tuple[str, ...]] = {
    1: ("删除主体", "removal", "remove", "ObjectRemoval"),
    2: ("添加主体", "addition", "add"),
    3: ("风格更改", "style", "style_change", "change style"),
    4: ("背景更改", "background_change"),
    5: ("颜色更改", "color_alter", "color change"),
    6: ("材料更改", "材质更改", "material_alter", "material_change"),
    7: ("动作更改", "motion_change", "action_change"),
    8: ("替换主体", "subject-replace", "swap", "replace"),
    9: ("人物修图", "ps_human", "appearance_alter", "portrait editing"),
    10: ("文字更改", "text_change"),
    11: ("色调变换", "色调迁移", "tune_transfer", "tone_transfer", "tone transform"),
    12: ("相机移动", "movement", "Camera Move Editing", "camera movement"),
    13: ("Reasoning", "implicit_change", "relation", "Reasoning Editing"),
    14: ("low_leval",),
    15: ("subject", "personalized generation"),
}
# The reference drops rows of this label and these tasks.
_NOT_GPT4O = (7, 9, 10)


def jpeg(image: np.ndarray) -> bytes:
    """Encode uint8 (h, w, 3) at quality 95 without chroma subsampling."""
    out = io.BytesIO()
    Image.fromarray(image).save(out, "JPEG", quality=95, subsampling=0)
    return out.getvalue()


def _scores(rng: np.random.Generator, label: str) -> dict:
    """Scores that pass the filters for a label (x2edit.md, section 6)."""

    def between(low: float, high: float) -> float:
        return round(float(rng.uniform(low, high)), 3)

    pair = [int(v) for v in rng.integers(9, 11, 2)]
    common = {"clip_score": between(0.7, 0.99), "dino": between(0.6, 0.99)}
    common |= {"aesthetic_score": between(6, 7), "liqe_score": between(3, 5)}
    # Both forms occur: a list, and a string that holds one.
    score = pair if rng.random() < 0.5 else str(pair)
    if label == "step1x" and rng.random() < 0.5:
        common |= {
            "liqe_score_edit": between(3, 5),
            "aesthetic_score_v2_5_edit": between(4.8, 7),
            "liqe_score_clip_edit": between(0.6, 0.95),
            "score_7b": [int(v) for v in rng.integers(5, 11, 2)],
        }
    elif label == "gpt4o" and rng.random() < 0.5:
        common |= {"score_7b": [int(v) for v in rng.integers(5, 11, 2)]}
    return {"score": score, **common}


def record(sample: Edit, rng: np.random.Generator) -> tuple[str, dict]:
    """The label (which is also the source folder) and the JSON of a sample."""
    options = ("bagel", "step1x") if sample.task in _NOT_GPT4O else ("bagel", "step1x", "gpt4o")
    label = "Delete" if sample.task == 1 else pick(rng, options)
    instruction = sample.instruction_en if rng.random() < 0.5 else sample.instruction_zh
    height, width = sample.target.shape[:2]
    return label, {
        "instruction": instruction,
        "instruction_zh": sample.instruction_zh,
        "instruction_en": sample.instruction_en,
        "caption_source": sample.caption_source,
        "caption_target": sample.caption_target,
        "task": pick(rng, RAW_NAMES[sample.task]),
        "model": "x2jax-tiny-world",
        "label": label,
        **_scores(rng, label),
        "width": width,
        "height": height,
    }


class _Tar:
    """A tar that appears under its name when it is complete."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.partial, self.samples = path, path.with_name(path.name + ".partial"), 0
        # Stays open across many calls of `add`; `close` ends it.
        self.tar = tarfile.open(self.partial, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115

    def add(self, key: str, members: dict[str, bytes]) -> None:
        for suffix, data in members.items():
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(data)
            self.tar.addfile(info, io.BytesIO(data))
        self.samples += 1

    def close(self) -> Path:
        self.tar.close()
        os.replace(self.partial, self.path)
        return self.path


def write_shards(
    out_dir: str | Path,
    n: int,
    seed: int,
    samples_per_tar: int = 256,
    tasks: Sequence[int] | None = None,
    sizes: Sequence[tuple[int, int]] = ((64, 64),),
    progress: bool = True,
) -> list[Path]:
    """Write `n` edits and return the tars, sorted.

    Tasks (default: all 15) and sizes (width, height) are drawn uniformly from the given ones.
    Sample i is `edit(seed, i, task, size)`, whatever `n` and `samples_per_tar` are.
    """
    tasks = TASKS if tasks is None else tuple(tasks)
    unknown = sorted(set(tasks) - set(TASKS))
    if unknown or not tasks:
        raise ValueError(f"tasks {unknown or '()'}: give some of 1..15, or None for all")
    if n < 1 or samples_per_tar < 1 or not sizes:
        raise ValueError("n and samples_per_tar must be at least 1, and sizes not empty")
    done: list[Path] = []
    count: dict[str, int] = {}
    still_open: dict[str, _Tar] = {}
    for index in tqdm(range(n), disable=not progress, desc="tiny world", unit="edit"):
        rng = np.random.default_rng([seed, index, 1])
        task, size = int(rng.choice(tasks)), tuple(sizes[int(rng.integers(len(sizes)))])
        sample = edit(seed, index, task, size)
        label, meta = record(sample, rng)
        if label not in still_open:
            name = f"{count.get(label, 0):05d}.tar"
            count[label] = count.get(label, 0) + 1
            still_open[label] = _Tar(Path(out_dir) / label / "0" / name)
        members = {
            "1.0.jpg": jpeg(sample.source),
            "2.jpg": jpeg(sample.target),
            "json": json.dumps(meta, ensure_ascii=False).encode(),
            "txt": meta["instruction"].encode(),
        }
        still_open[label].add(f"{index:09d}", members)
        if still_open[label].samples == samples_per_tar:
            done.append(still_open.pop(label).close())
    return sorted(done + [tar.close() for tar in still_open.values()])


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m x2jax.tiny.shards", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--n", type=int, required=True, help="number of edits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--samples_per_tar", type=int, default=256)
    parser.add_argument("--tasks", type=int, nargs="*", help="some of 1..15 (default: all)")
    parser.add_argument("--size", type=int, nargs=2, action="append", metavar=("W", "H"))
    args = parser.parse_args()
    sizes = [tuple(s) for s in args.size] if args.size else [(64, 64)]
    tars = write_shards(args.out, args.n, args.seed, args.samples_per_tar, args.tasks, sizes)
    print(f"wrote {args.n} edits in {len(tars)} tars under {args.out}")


if __name__ == "__main__":
    main()
