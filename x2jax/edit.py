"""Edits an image: `python -m x2jax.edit --model RUN --image in.png --prompt '...' --out out.png`.

What was trained on captions draws instead: leave out --image, and give --size if you like.

RUN is the workdir of a training run, a folder of `python -m converters import`, or a folder with an
X2Edit adapter. The frozen weights come from where the run had them, or from --flux and --mllm.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from x2jax import sharding
from x2jax.children import load_child
from x2jax.data import tasks, transforms
from x2jax.data.batch import Batch
from x2jax.data.edits import BUCKETS
from x2jax.edit_text import read
from x2jax.encoders.media import open_image
from x2jax.recipes import recipe_class
from x2jax.samples import to_uint8
from x2jax.trained import fit, open_trained, placed
from x2jax.trees import Params


class Editor:
    """A trained adapter on its base, ready to edit, or to draw if it was trained on captions.

    Attributes:
      buckets: sizes (width, height) that pictures are brought to.
      draws: whether it takes no source picture.
    """

    def __init__(
        self,
        run: str | Path,
        *,
        step: int | None = None,
        ema: bool = False,
        flux: str = "",
        mllm: str = "",
    ):
        """Loads what was trained, and its frozen weights.

        Args:
          run: as `x2jax.trained.open_trained` takes it.
          step: which checkpoint; None for the newest.
          ema: the moving average instead of the parameters.
          flux, mllm: where the frozen weights are now; empty for where the run had them.

        Raises:
          FileNotFoundError: no checkpoint, or frozen weights that are gone.
          ValueError: weights that do not fit.
        """
        trained, meta = open_trained(run, step, ema=ema)
        config: Any = ConfigDict(meta["config"])
        config.flux, config.mllm = flux or config.flux, mllm or config.mllm
        recipe: Any = recipe_class(config.recipe).open(config)
        skeleton = recipe.skeleton
        mesh = sharding.make_mesh({"fsdp": -1})
        by_path = sharding.param_shardings(skeleton.abstract, mesh)
        self._frozen: Params = {}
        for name in recipe.found:
            self._frozen |= load_child(skeleton, recipe.found, name, by_path)
        trained = fit(trained, skeleton.abstract, str(run))
        self._frozen = {p: x for p, x in self._frozen.items() if p not in trained}
        self._params = placed(trained, skeleton.abstract, by_path)
        missing = [p for p in skeleton.paths if p not in self._frozen and p not in self._params]
        if missing:
            raise ValueError(f"{run} lacks parameters: {missing}")
        self._tokenize = recipe.tokenizer()
        self._slots, self._where = config.image.slots, str(run)
        self.draws = self._slots == 1
        self.buckets = BUCKETS[config.image.buckets]
        self._run = jax.jit(recipe.edit, static_argnames=("steps", "shift"))
        self._preview = dict(config.preview)

    def __call__(
        self,
        image: Image.Image | None,
        prompt: str,
        *,
        size: tuple[int, int] = (1, 1),
        task: str = "unknown",
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
    ) -> Image.Image:
        """The picture, in the bucket nearest to the source's aspect ratio.

        Args:
          image: source picture, any size; None for what draws.
          prompt: what to do, or to draw, in English or Chinese.
          size: (width, height) whose aspect ratio a picture without a source takes.
          task: name of the task, in any of the spellings that data sets use.
          seed: of the noise.
          steps, guidance: of the sampler; None for those of the run's previews.

        Raises:
          ValueError: empty prompt, unknown task, a source that is missing, or one for what draws.
          BadImage: a mode that is not understood.
        """
        if not prompt.strip():
            raise ValueError("the prompt is empty: say what to change, or to draw")
        if self.draws and image is not None:
            raise ValueError(
                f"{self._where} was trained on captions and draws from text alone: give no image"
            )
        if not self.draws and image is None:
            raise ValueError(f"{self._where} edits pictures: give an image")
        bucket = transforms.nearest_bucket(*(image.size if image else size), self.buckets)
        height, width = transforms.canvas_size(self.buckets)
        pixels = np.zeros((1, self._slots, height, width, 3), np.uint8)
        sizes = np.zeros((1, self._slots, 2), np.int32)
        sizes[0, :2] = bucket[::-1]
        if image is not None:
            picture = transforms.resize_crop(transforms.to_rgb(image), bucket)
            transforms.place(picture, bucket, pixels[0, 1])
        batch = Batch(
            pixels=jnp.asarray(pixels),
            sizes=jnp.asarray(sizes),
            text=jax.tree.map(jnp.asarray, read(self._tokenize, [prompt], pixels, sizes)),
            task=jnp.asarray([task_id(task)], jnp.int32),
            sample_id=jnp.zeros((1,), jnp.int32),
        )
        options = self._preview | {
            k: v for k, v in (("steps", steps), ("guidance", guidance)) if v is not None
        }
        out = self._run(self._params, self._frozen, batch, jax.random.key(seed), **options)
        return Image.fromarray(to_uint8(np.asarray(out[0]))[: bucket[1], : bucket[0]])


def task_id(name: str) -> int:
    """Row of the task table for a task's name; "unknown" is row 0.

    Raises:
      ValueError: not a task; the tasks are listed.
    """
    found = 0 if tasks.normalise(name) == "unknown" else tasks.lookup(name)
    if found is None:
        raise ValueError(f"unknown task {name!r}; the tasks are: {', '.join(tasks.TASKS)}")
    return found


def size_of(text: str) -> tuple[int, int]:
    """(width, height) of "WIDTHxHEIGHT".

    Raises:
      ValueError: something else.
    """
    width, height = map(int, text.split("x"))
    if min(width, height) < 1:
        raise ValueError(f"size {text}: needs positive numbers")
    return width, height


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m x2jax.edit", description=__doc__)
    parser.add_argument("--model", required=True, help="run, or folder of an adapter")
    parser.add_argument("--image", type=Path, help="source picture; none for what draws from text")
    parser.add_argument("--prompt", required=True, help="what to change, English or Chinese")
    parser.add_argument("--out", required=True, type=Path, help="where the picture goes")
    parser.add_argument(
        "--size",
        type=size_of,
        default=(1, 1),
        help="WIDTHxHEIGHT whose aspect ratio a picture without a source takes; default square",
    )
    parser.add_argument(
        "--task", default="unknown", help=f"what kind of edit: {', '.join(tasks.TASKS)}"
    )
    parser.add_argument("--steps", type=int, help="sampler steps; default as in the run's previews")
    parser.add_argument("--guidance", type=float, help="guidance scale; default as in the run")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--flux", default="", help="diffusers folder of FLUX.1, if it moved")
    parser.add_argument("--mllm", default="", help="folder of Qwen2.5-VL, if it moved")
    parser.add_argument("--step", type=int, help="which checkpoint; default the newest")
    parser.add_argument("--ema", action="store_true", help="use the moving average")
    args = parser.parse_args(argv)
    try:
        image = open_image(args.image) if args.image else None
        editor = Editor(args.model, step=args.step, ema=args.ema, flux=args.flux, mllm=args.mllm)
        edited = editor(
            image,
            args.prompt,
            size=args.size,
            task=args.task,
            seed=args.seed,
            steps=args.steps,
            guidance=args.guidance,
        )
    except (OSError, ValueError) as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    args.out.parent.mkdir(parents=True, exist_ok=True)
    edited.save(args.out)
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
