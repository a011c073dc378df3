"""Trains an adapter: `python -m x2jax.train --config configs/x2edit.py [--workdir DIR]`.

The only loop. Running the same command again in the same WORKDIR resumes, bitwise: the state, the
position in the data and the randomness of a step are functions of the checkpoint and the config.
"""

import collections
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import config_flags

from x2jax import optim, recipes, samples, sharding
from x2jax import state as states
from x2jax.checkpoint import Checkpointer
from x2jax.metrics import Progress, Writer, parameter_table
from x2jax.step import make_step
from x2jax.trained import fit, open_trained, placed
from x2jax.trees import Params

FREE = (
    "steps", "log_every", "checkpoint_every", "keep", "sample_every", "workers", "mesh", "preview",
    "init_from", "flux", "mllm", "alignnet", "data", "features",
)  # fmt: skip
"""Config keys that may change when a run is resumed. Weights and data are checked by content."""


def check_same_run(meta: dict, config: Any, prints: dict[str, str], data: str) -> None:
    """Refuses to resume with another config, base or data.

    Raises:
      ValueError: every difference, with both values.
    """
    then, now = _flat(meta["config"]), _flat(json.loads(config.to_json()))
    keys = [k for k in sorted(then.keys() | now.keys()) if k.split(".")[0] not in FREE]
    wrong = [
        f"  config.{k}: {then.get(k, 'absent')!r} then, {now.get(k, 'absent')!r} now"
        for k in keys
        if then.get(k) != now.get(k)
    ]
    before = meta["fingerprints"] | {"data": meta["data"]["fingerprint"]}
    after = prints | {"data": data}
    wrong += [
        f"  the contents of {k}: {before.get(k, 'absent')} then, {after.get(k, 'absent')} now"
        for k in sorted(before.keys() | after.keys())
        if before.get(k) != after.get(k)
    ]
    if wrong:
        raise ValueError(
            "this WORKDIR holds a run of another config; use a new --workdir, or undo:\n"
            + "\n".join(wrong)
        )


def _flat(tree: dict, prefix: str = "") -> dict:
    out = {}
    for k, v in tree.items():
        out |= _flat(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k: v}
    return out


def inherited(recipe, config: Any) -> Params:
    """What `init_from` trained: it replaces what initialisation and the sources would give.

    Raises:
      ValueError: it does not fit this model, or lacks adapters that train here; all are listed.
    """
    if not config.init_from:
        return {}
    what = f"--config.init_from={config.init_from}"
    params = open_trained(config.init_from).params
    # What was computed before is checked by the fingerprints of the features.
    params = {p: x for p, x in params.items() if p.split("/")[0] not in recipe.without}
    given = fit(params, recipe.skeleton.abstract, what)
    fresh = ("adapter/", "control/")
    lacking = [p for p in recipe.trainable_abstract if p.startswith(fresh) and p not in given]
    if lacking:
        raise ValueError(f"{what} lacks parameters:\n" + "\n".join(f"  {p}" for p in lacking))
    return given


def train(config: Any, workdir: Path) -> Params:
    """Runs a config to its last step; returns the trainable tree.

    Writes `checkpoints/`, `metrics.jsonl`, `tensorboard/`, `samples/` and `config.json` below
    `workdir`.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh(config.mesh)
    recipe = recipes.build(config, workdir)
    tx = optim.build(steps=config.steps, **config.optimizer)
    # Rules of the optimizer that match nothing are found here, before weights are read.
    create = lambda p: states.create(p, tx, config.ema_decay > 0)  # noqa: E731
    abstract = jax.eval_shape(create, recipe.trainable_abstract)

    by_path = sharding.param_shardings(recipe.skeleton.abstract, mesh)
    with jax.set_mesh(mesh):
        given = inherited(recipe, config)
        frozen = recipe.load_frozen(by_path)
        frozen |= placed(given, frozen, by_path)
        prints = recipe.fingerprints(frozen)

    checkpoints = Checkpointer(workdir, every=config.checkpoint_every, keep=config.keep)
    shardings = states.shardings(abstract, by_path, mesh)
    start = checkpoints.latest()
    if start is None:
        start = 0
        with jax.set_mesh(mesh):
            params = recipe.initial(config.seed, by_path)
            params |= placed(given, params, by_path)
            state = jax.jit(create, out_shardings=shardings)(params)
    else:
        check_same_run(checkpoints.meta(start), config, prints, recipe.data.fingerprint)
        abstract = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, shardings
        )
        state, _ = checkpoints.restore(start, abstract)
    meta = {
        "config": json.loads(config.to_json()),
        "fingerprints": prints,
        "sources": recipe.source_paths,
        "data": {"fingerprint": recipe.data.fingerprint},
    }
    if jax.process_index() == 0:
        (workdir / "config.json").write_text(config.to_json_best_effort(indent=2) + "\n")
        print(parameter_table(state.params, frozen, by_path), *recipe.notes, sep="\n", flush=True)
        print(f"mesh {dict(mesh.shape)}; {'resuming at' if start else 'starting at'} step {start}")

    loop = _Loop(config, workdir, mesh, recipe, frozen, shardings, by_path, tx, start)
    state = loop.run(state, checkpoints, meta)
    checkpoints.close()
    return state.params


class _Loop:
    """The compiled functions and writers of one run."""

    def __init__(self, config, workdir, mesh, recipe, frozen, shardings, by_path, tx, start):
        self.config, self.workdir, self.mesh, self.recipe = config, workdir, mesh, recipe
        self.frozen, self.start = frozen, start
        self.batches = sharding.batch_sharding(mesh, None)
        replicated = NamedSharding(mesh, P())
        frozen_shardings = {p: by_path[p] for p in frozen}
        step = make_step(recipe.loss, tx, seed=config.seed, ema_decay=config.ema_decay)
        self.step = jax.jit(
            step,
            in_shardings=(shardings, frozen_shardings, self.batches),
            out_shardings=(shardings, replicated),
            donate_argnums=0,
        )
        self.held_out = jax.jit(recipe.held_out, out_shardings=replicated)
        self.writer = Writer(workdir, start)
        self.progress = Progress(start, config.steps, config.batch_size * config.accumulate)

    def run(self, state, checkpoints, meta):
        config, accumulate = self.config, self.config.accumulate
        held = sharding.put_batch(self.recipe.data.held_out, sharding.batch_sharding(self.mesh))
        with jax.set_mesh(self.mesh):
            if self.start == 0:
                self.preview(0, state, held)
                checkpoints.save(0, state, meta, force=True)
            stream = self.recipe.data.iterate(self.start * accumulate)
            pending: collections.deque = collections.deque()
            for step in range(self.start + 1, config.steps + 1):
                group = [next(stream) for _ in range(accumulate)]
                stacked = jax.tree.map(lambda *xs: np.stack(xs), *group)
                state, metrics = self.step(
                    state, self.frozen, sharding.put_batch(stacked, self.batches)
                )
                # Dispatch this step before reading the last one's metrics: the device never waits.
                pending.append((step, metrics, [g.sample_id for g in group]))
                if len(pending) > 1:
                    self.log(*pending.popleft())
                last = step == config.steps
                if step % config.sample_every == 0 or last:
                    self.preview(step, state, held)
                checkpoints.save(step, state, meta, force=last)
                if checkpoints.preempted(step):
                    checkpoints.save(step, state, meta, force=True)
                    self.progress.say(f"preempted: step {step} is saved; run again to go on")
                    break
            while pending:
                self.log(*pending.popleft())
        self.writer.close()
        self.progress.close()
        return state

    def log(self, step, metrics, ids):
        values = {k: float(v) for k, v in metrics.items()}
        rate = self.progress.advance({"loss": values["loss"], "flow": values.get("flow", 0.0)})
        sample_id = np.concatenate(ids).tolist()
        if not np.isfinite(values["loss"]):
            raise FloatingPointError(
                f"the loss of step {step} is {values['loss']}; samples {sample_id}. "
                "The last checkpoint is good: resume from it with a lower learning rate"
            )
        if step % self.config.log_every == 0 or step == self.config.steps:
            self.writer.write(step, values | {"samples_per_second": rate}, sample_id=sample_id)

    def preview(self, step, state, held):
        """Held-out loss and sample grid from the moving average if there is one."""
        params = state.ema or state.params
        values = {k: float(v) for k, v in self.held_out(params, self.frozen, held).items()}
        grid = None
        if self.recipe.shows:
            grid = samples.grid(self.recipe, params, self.frozen, held, step, self.workdir)
        self.writer.write(step, values)
        if grid is not None:
            self.writer.image(step, "samples", grid)
        shown = ", ".join(f"{k} {v:.4f}" for k, v in values.items())
        where = f"; grid in {self.workdir / 'samples'}" if self.recipe.shows else ""
        self.progress.say(f"step {step}: {shown}{where}")


def default_workdir(config_path: str) -> Path:
    """`configs/x2edit.py:512` -> runs/x2edit-512."""
    file, _, arg = config_path.partition(":")
    return Path("runs") / (Path(file).stem + (f"-{arg}" if arg else ""))


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)  # Orbax reports every file at INFO
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = Path(flags.FLAGS.workdir) if flags.FLAGS.workdir else default_workdir(path)
    began = time.monotonic()
    train(flags.FLAGS.config, workdir)
    print(f"done in {time.monotonic() - began:.0f} s; checkpoints in {workdir / 'checkpoints'}")


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Training config, as FILE.py[:ARG].")
    flags.DEFINE_string("workdir", "", "Where the run lives; default runs/CONFIG[-ARG].")
    flags.mark_flag_as_required("config")
    app.run(main)
