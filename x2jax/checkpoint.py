"""Checkpoints through Orbax: the trainable tree, optimizer state and the data position.

The frozen base is never saved: `meta` records where each part came from and its fingerprint.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from x2jax.state import TrainState
from x2jax.trees import Params, matches

_POLICIES = ocp.checkpoint_managers


class Checkpointer:
    """Asynchronous checkpoints of a run under `WORKDIR/checkpoints`, the newest `keep` kept."""

    def __init__(self, workdir: str | Path, *, every: int, keep: int):
        self.directory = Path(workdir).resolve() / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                enable_async_checkpointing=True,
                save_decision_policy=_POLICIES.AnySavePolicy(
                    [
                        _POLICIES.FixedIntervalPolicy(every),
                        _POLICIES.PreemptionCheckpointingPolicy(),
                    ]
                ),
                preservation_policy=_POLICIES.LatestN(keep),
            ),
        )

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, meta: dict, *, force: bool = False) -> None:
        """Saves if the interval or a preemption asks for it, or if forced; returns at once."""
        if force and self.latest() == step:
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(_as_dict(state)), meta=ocp.args.JsonSave(meta)
        )
        self._manager.save(step, args=args, force=force)

    def restore(self, step: int, abstract: TrainState) -> tuple[TrainState, dict]:
        """State and meta of a step, placed by the shardings in `abstract`."""
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(_as_dict(abstract)), meta=ocp.args.JsonRestore()
        )
        restored = self._manager.restore(step, args=args)
        return TrainState(**restored["state"]), restored["meta"]

    def meta(self, step: int) -> dict:
        """Meta of a step alone, to check a run before its state is built."""
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["meta"]

    def preempted(self, step: int) -> bool:
        """Whether the platform asked this job to stop; poll it on every host at every step."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits for writes under way."""
        self._manager.wait_until_finished()
        self._manager.close()


def _as_dict(state: TrainState) -> dict[str, Any]:
    return {
        "step": state.step,
        "params": state.params,
        "opt_state": state.opt_state,
        "ema": state.ema,
    }


def load_trainable(
    workdir: str | Path,
    step: int | None = None,
    *,
    ema: bool = False,
    only: tuple[str, ...] = (r".*",),
) -> tuple[dict[str, np.ndarray], dict]:
    """The trainable tree and the meta of a run, on the host; the meta with its `step`.

    Args:
      workdir: a run's directory, or its `checkpoints` folder.
      step: which checkpoint; None for the newest.
      ema: the moving average instead of the parameters.
      only: rules on paths that say what is read.

    Raises:
      FileNotFoundError: no checkpoint there, or not of that step; the steps there are listed.
      ValueError: `ema` asked of a run without one.
    """
    root = Path(workdir).resolve()
    root = root if root.name == "checkpoints" else root / "checkpoints"
    steps = sorted(int(p.name) for p in root.glob("*") if p.name.isdigit()) if root.is_dir() else []
    if not steps:
        raise FileNotFoundError(f"no checkpoint under {root}: is {workdir} the --workdir of a run?")
    step = steps[-1] if step is None else step
    if step not in steps:
        raise FileNotFoundError(f"no checkpoint of step {step} under {root}; there are {steps}")
    item = "ema" if ema else "params"
    with ocp.PyTreeCheckpointer() as reader:
        metadata = reader.metadata(root / str(step) / "state").item_metadata[item]
    if not metadata:
        raise ValueError(f"the run in {workdir} kept no {item}: it was trained with ema_decay = 0")
    abstract = {
        p: jax.ShapeDtypeStruct(m.shape, m.dtype) for p, m in metadata.items() if matches(p, only)
    }
    meta = json.loads((root / str(step) / "meta" / "metadata").read_text()) | {"step": step}
    if not abstract:
        return {}, meta
    with ocp.PyTreeCheckpointer() as reader:
        restored = reader.restore(
            root / str(step) / "state",
            args=ocp.args.PyTreeRestore(
                item={item: abstract},
                restore_args={
                    item: {p: ocp.RestoreArgs(restore_type=np.ndarray) for p in abstract}
                },
                partial_restore=True,
            ),
        )
    params: Params = restored[item]
    return params, meta | {"step": step}
