"""What precomputing saves of a step, side by side in one run: tiny family, AlignNet frozen.

    python -m benchmarks.precompute_speedup [--steps 20] [--batch 16]

Two compiled steps of the same run, one that reads features and one that runs VAE, MLLM and
AlignNet, take turns on the same samples; their losses are compared too.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    config = get_config()
    config.data, config.batch_size, config.held_out = "tiny:320", args.batch, 8
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
    print(f"  features: {size / 320 / 1024:.0f} KiB a sample on disk, two languages, float32")


if __name__ == "__main__":
    main()
