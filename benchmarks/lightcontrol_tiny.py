"""Does LightControl keep what an edit should keep? On the tiny family, at equal steps.

    python -m benchmarks.lightcontrol_tiny [--steps 200] [--seeds 3]

Trains the same nets twice a seed, on the same batches from the same start: once they see the
source, once a blank picture. The MLLM reads the instruction, and with `--pictures-to-mllm` sees the
source too, in both arms. The world says which pixels of a held-out edit must stay
(`x2jax.tiny.edits.Edit.keep_mask`); the error there is the mean absolute difference to the target,
of 255, after sampling from the same noise. The untrained base stands beside it, and the error over
the pixels that the edit changes.
"""

import argparse
import dataclasses
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from configs.lightcontrol import get_config
from x2jax import optim, recipes, sharding
from x2jax import state as states
from x2jax.data.batch import Batch
from x2jax.edit_text import read
from x2jax.samples import to_uint8
from x2jax.step import make_step
from x2jax.tiny import edits

TASKS = (1, 2, 5, 6, 8)
"""Deletion, addition, colour, material and replacement: edits that keep most of a picture."""
EDGE = 64


def held_out(count: int, tokenize) -> tuple[Batch, np.ndarray]:
    """Edits of a stream that no training set draws from, and the pixels that they keep."""
    found = [edits.edit(987, k, TASKS[k % len(TASKS)]) for k in range(count)]
    pixels = np.stack([np.stack([e.target, e.source]) for e in found])
    sizes = np.full((count, 2, 2), EDGE, np.int32)
    batch = Batch(
        pixels=pixels,
        sizes=sizes,
        text=read(tokenize, [e.instruction_en for e in found], pixels, sizes),
        task=np.array([e.task for e in found], np.int32),
        sample_id=np.arange(count, dtype=np.int32),
    )
    return batch, np.stack([e.keep_mask for e in found])


def blank(batch: Batch) -> Batch:
    """The same batch with nothing to see in its source slot."""
    pixels = np.array(batch.pixels)
    pixels[:, 1] = 128
    return dataclasses.replace(batch, pixels=pixels)


class Arena:
    """One recipe, one compiled step and sampler, for all seeds and both arms."""

    def __init__(self, steps: int, batch_size: int, pictures: int, seen: bool, workdir: Path):
        self.config = get_config().unlock()
        self.config.update(steps=steps, batch_size=batch_size, data=f"tiny:{pictures}", held_out=2)
        self.config.text.language = "en"
        self.config.text.pictures = seen
        self.recipe = recipes.build(self.config, workdir)
        mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
        self.by_path = sharding.param_shardings(self.recipe.skeleton.abstract, mesh)
        self.frozen = self.recipe.load_frozen(self.by_path)
        self.tx = optim.build(steps=steps, **self.config.optimizer)
        # One program: seeds differ in where they start and in their batches.
        self.step = jax.jit(make_step(self.recipe.loss, self.tx, seed=0, ema_decay=0.0))
        self.batch, self.keep = held_out(60, self.recipe.tokenizer())
        self.sample = jax.jit(self.recipe.edit, static_argnames=("steps", "shift"))

    def start(self, seed: int):
        return states.create(self.recipe.initial(seed, self.by_path), self.tx, False)

    def train(self, seed: int, see) -> dict:
        """Parameters after all steps; `see` changes what the nets are shown."""
        state = self.start(seed)
        # Seeds draw other batches: each begins where the one before it ended.
        stream = self.recipe.data.iterate(seed * self.config.steps)
        for _ in range(self.config.steps):
            batch = jax.tree.map(lambda x: jnp.asarray(x)[None], see(next(stream)))
            state, _ = self.step(state, self.frozen, batch)
        return state.params

    def errors(self, params: dict, see) -> tuple[float, float]:
        """Mean absolute error over kept and over changed pixels, of 255."""
        options = dict(self.config.preview)
        out = self.sample(
            params, self.frozen, jax.tree.map(jnp.asarray, see(self.batch)), jax.random.key(7),
            **options,
        )  # fmt: skip
        gap = np.abs(to_uint8(np.asarray(out)).astype(float) - self.batch.pixels[:, 0]).mean(-1)
        return float(gap[self.keep].mean()), float(gap[~self.keep].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pictures", type=int, default=2048, help="edits to train on")
    parser.add_argument("--pictures-to-mllm", action="store_true", help="it sees the source too")
    args = parser.parse_args()
    shown = {"sees the source": lambda b: b, "sees a blank": blank}
    with tempfile.TemporaryDirectory() as folder:
        arena = Arena(args.steps, args.batch, args.pictures, args.pictures_to_mllm, Path(folder))
        print(f"{args.steps} steps of {args.batch}; mean absolute error of 255, kept / changed")
        base = arena.errors(arena.start(0).params, blank)
        print(f"  untrained base            {base[0]:6.2f} / {base[1]:6.2f}", flush=True)
        kept: dict[str, list[float]] = {name: [] for name in shown}
        for seed in range(args.seeds):
            for name, see in shown.items():
                found = arena.errors(arena.train(seed, see), see)
                kept[name].append(found[0])
                print(f"  seed {seed}, {name:16}  {found[0]:6.2f} / {found[1]:6.2f}", flush=True)
        means = {name: float(np.mean(values)) for name, values in kept.items()}
        change = means["sees the source"] / means["sees a blank"] - 1
        summary = ", ".join(f"{name} {value:.2f}" for name, value in means.items())
        print(f"error over what must stay, mean of {args.seeds} seeds: {summary} ({change:+.0%})")


if __name__ == "__main__":
    main()
