"""What precomputing saves of a step: operations at full size, and time side by side in one run.

    python -m benchmarks.precompute_speedup [--steps 20] [--batch 16]

First the share of the frozen encoders (VAE, MLLM, AlignNet) in the floating point operations of a
step, counted in the programs themselves: at full size, and in the tiny family. Without them a step
is at most 1 / (1 - share) times as fast. Then two compiled steps of a tiny run, one that reads
features and one that runs the encoders, take turns on the same samples; their losses are compared.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.flops import flops
from configs.x2edit import get_config
from x2jax import optim, recipes, sharding
from x2jax import state as states
from x2jax.precompute import precompute
from x2jax.step import make_step


class Run:
    """One way to train, ready to step."""

    def __init__(self, config: Any, workdir: Path):
        self.mesh = sharding.make_mesh({"fsdp": 1}, jax.devices()[:1])
        recipe: Any = recipes.build(config, workdir)
        by_path = sharding.param_shardings(recipe.skeleton.abstract, self.mesh)
        self.frozen = recipe.load_frozen(by_path)
        tx = optim.build(steps=config.steps, **config.optimizer)
        self.state = states.create(recipe.initial(config.seed, by_path), tx, False)
        step = make_step(recipe.loss, tx, seed=config.seed, ema_decay=0.0)
        self.step = jax.jit(step, donate_argnums=0)
        self.batches = recipe.data.iterate(0)

    def __call__(self) -> tuple[float, float, float]:
        """One step: its loss, seconds of it, and seconds that its batch took to read."""
        began = time.perf_counter()
        batch = jax.tree.map(lambda x: np.asarray(x)[None], next(self.batches))
        read = time.perf_counter()
        self.state, metrics = self.step(self.state, self.frozen, batch)
        loss = float(metrics["loss"])
        return loss, time.perf_counter() - read, read - began


def operations(recipe: Any) -> int:
    """Of loss and gradients of a micro-batch."""
    trains = recipe.trainable_abstract
    frozen = {p: x for p, x in recipe.skeleton.abstract.items() if p not in trains}
    key = jax.eval_shape(lambda: jax.random.key(0))
    step = jax.value_and_grad(recipe.loss, has_aux=True)
    return flops(step, trains, frozen, recipe.batch(), key)


def share(stage: str) -> str:
    """A line about a stage of X2Edit with AlignNet frozen."""
    config = get_config(stage)
    config.trainable, config.batch_size = (r"adapter/.*",), 8
    recipe = recipes.outline(config)
    whole, rest = operations(recipe), operations(recipe.from_features())
    return (
        f"  {stage or 'tiny':5} {whole / 8e12:9.4f} TFLOP a sample, {1 - rest / whole:5.1%} in "
        f"frozen encoders: at most {whole / rest:.2f} times as fast"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--samples", type=int, default=320)
    args = parser.parse_args()
    print("X2Edit's step, AlignNet frozen:")
    for stage in ("512", "1024", ""):
        print(share(stage), flush=True)
    config = get_config()
    config.data, config.batch_size, config.held_out = f"tiny:{args.samples}", args.batch, 8
    config.trainable, config.text.language = (r"adapter/.*",), "mixed"
    with tempfile.TemporaryDirectory() as name:
        workdir = Path(name)
        folder = precompute(config, workdir, batch=16)
        size = sum(p.stat().st_size for p in folder.glob("*.array_record"))
        runs = {"features": Run(config, workdir)}
        config.features = "none"
        runs["online"] = Run(config, workdir)
        for run in runs.values():
            run()  # compiles
        times: dict[str, list] = {name: [] for name in runs}
        for _ in range(args.steps):
            for name, run in runs.items():
                times[name].append(run())
    loss, step, read = (np.array([times[n] for n in runs])[..., k] for k in range(3))
    ratio = step[1] / step[0]
    low, middle, high = np.percentile(ratio, [25, 50, 75])
    print(f"\n{jax.devices()[0].device_kind}, {args.batch} samples a step, {args.steps} steps each")
    for n, name in enumerate(runs):
        print(f"  {name:9} {np.median(step[n]):.3f} s a step, {np.median(read[n]):.3f} s to read")
    print(f"  a step from features is {middle:.2f} times as fast (quartiles {low:.2f}, {high:.2f})")
    print(f"  largest difference of the losses: {np.abs(loss[0] - loss[1]).max():.1e}")
    print(
        f"  features: {size / args.samples / 1024:.0f} KiB a sample on disk, two languages, float32"
    )


if __name__ == "__main__":
    main()
