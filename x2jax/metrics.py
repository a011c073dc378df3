"""Metrics to the terminal, to `WORKDIR/metrics.jsonl` and to TensorBoard."""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from x2jax.trees import Params


class Writer:
    """Writes scalars on the first process; other processes' writers do nothing.

    A resumed run continues `metrics.jsonl` from its checkpoint: later lines are cut first, so every
    step stands there once.
    """

    def __init__(self, workdir: Path, start: int):
        self._file = self._board = None
        if jax.process_index() == 0:
            path = workdir / "metrics.jsonl"
            _truncate(path, start)
            self._file = path.open("a", buffering=1)
            self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=start + 1)

    def write(self, step: int, values: Mapping[str, float], **extra: Any) -> None:
        """One line a call: {"step": ..., name: value, ...}; `extra` goes to the file alone."""
        if self._file is None or self._board is None:
            return
        numbers = {k: float(v) for k, v in values.items()}
        self._file.write(json.dumps({"step": step, **numbers, **extra}) + "\n")
        for name, value in numbers.items():
            self._board.add_scalar(name, value, step)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A uint8 (H, W, 3) picture to TensorBoard."""
        if self._board is not None:
            self._board.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        if self._file is not None and self._board is not None:
            self._file.close()
            self._board.close()


def _truncate(path: Path, start: int) -> None:
    if not path.exists():
        return
    lines = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= start:
                lines.append(line + "\n")
        except (ValueError, KeyError):
            break  # the last line of a killed run may be cut
    path.write_text("".join(lines))


class Progress:
    """A progress bar over steps with rate and ETA; silent on other processes."""

    def __init__(self, start: int, total: int, batch_size: int):
        self._bar = tqdm(
            total=total,
            initial=start,
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
            disable=jax.process_index() != 0,
        )
        self._batch, self._last = batch_size, time.monotonic()

    def advance(self, values: Mapping[str, float]) -> float:
        """One step done, with numbers to show; returns samples a second since the last call."""
        now = time.monotonic()
        rate = self._batch / max(now - self._last, 1e-9)
        self._last = now
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
        self._bar.update()
        return rate

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if jax.process_index() == 0:
            tqdm.write(text)

    def close(self) -> None:
        self._bar.close()


def parameter_table(trainable: Params, frozen: Params, shardings: Mapping) -> str:
    """Name, shape, dtype, sharding and whether it trains: trainable in full, frozen by child."""
    rows = [
        (path, str(tuple(x.shape)), str(x.dtype), str(shardings[path].spec), "yes")
        for path, x in sorted(trainable.items())
    ]
    groups: dict[str, list] = {}
    for path, x in frozen.items():
        groups.setdefault("/".join(path.split("/")[:2]), []).append(x)
    for name, xs in sorted(groups.items()):
        count = sum(x.size for x in xs)
        rows.append(
            (name + "/...", f"{count:,}", "/".join(sorted({str(x.dtype) for x in xs})), "", "no")
        )
    head = ("parameter", "shape or count", "dtype", "sharding", "trains")
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(5)]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)).rstrip()
        for r in [head, *rows]
    ]
    total = sum(x.size for x in trainable.values()), sum(x.size for x in frozen.values())
    return "\n".join([*lines, f"trainable {total[0]:,}, frozen {total[1]:,} parameters"])
