"""The whole story on a laptop: `make demo`, or `python -m x2jax.tiny.demo [--workdir DIR]`.

Trains an edit adapter on the tiny family, edits a picture that was never trained on, and exports
the adapter in X2Edit's format. Each stage is the command that a user would type.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image

from x2jax.tiny import edits


def run(*arguments: str) -> None:
    """Shows and runs `python -m ...`; stops the demo where it fails."""
    print(
        "\n$ python -m " + " ".join(a if " " not in a else f"'{a}'" for a in arguments), flush=True
    )
    done = subprocess.run([sys.executable, "-m", *arguments], check=False)
    if done.returncode:
        sys.exit(f"the demo stopped: the command above failed with status {done.returncode}")


def held_out(workdir: Path) -> tuple[float, float]:
    """Held-out flow loss of the untrained and of the trained adapter."""
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    values = [x["held_out_flow"] for x in lines if "held_out_flow" in x]
    return values[0], values[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workdir", type=Path, default=Path("runs/demo"))
    parser.add_argument("--steps", type=int, default=600, help="training steps")
    args = parser.parse_args()
    began, workdir = time.monotonic(), args.workdir
    config = "configs/x2edit.py"
    run(
        "x2jax.train", "--config", config, "--workdir", str(workdir), f"--config.steps={args.steps}"
    )
    sample = edits.edit(seed=987, index=0, task=5)
    picture = workdir / "edit_source.png"
    Image.fromarray(sample.source).save(picture)
    edited = workdir / "edit_result.png"
    run(
        *("x2jax.edit", "--model", str(workdir), "--image", str(picture), "--out", str(edited)),
        *("--task", "colour change", "--prompt", sample.instruction_en),
    )
    trio = workdir / "x2edit"
    run("converters", "export", "--from", str(workdir), "--format", "x2edit", "--out", str(trio))
    before, after = held_out(workdir)
    grid = sorted((workdir / "samples").glob("*.png"))[-1]
    print(
        f"\ndone in {time.monotonic() - began:.0f} s\n"
        f"  held-out flow loss  {before:.4f} untrained -> {after:.4f} trained "
        f"({after / before:.0%})\n"
        f"  sample grid         {grid}\n"
        f"  edited picture      {edited}, from {picture}: {sample.instruction_en}\n"
        f"  X2Edit trio         {trio}\n"
        f"  metrics             {workdir / 'metrics.jsonl'} and {workdir / 'tensorboard'}"
    )


if __name__ == "__main__":
    main()
